"""`python -m traces`: see `traces.cli`."""

import sys

from traces.installed import start
from traces.processes.ending import begin

if __name__ == "__main__":
    begin()
    start()
    # Only now: another distribution may have overwritten what this needs.
    from traces.cli import main

    sys.exit(main())
