"""`python -m traces`: see `traces.cli`."""

import sys

from traces.processes.ending import begin

if __name__ == "__main__":
    begin()
    # Only now: a signal that comes meanwhile is heard.
    from traces.installed import start

    start()
    # Only now: another distribution may have overwritten what this needs.
    from traces.cli import main

    sys.exit(main())
