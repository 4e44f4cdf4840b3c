"""`python -m traces.twin`: see `traces.twin.cli`."""

import sys

from traces.processes.ending import begin

if __name__ == "__main__":
    begin()
    # Only now: a signal that comes meanwhile is heard.
    from traces.twin.cli import main

    sys.exit(main())
