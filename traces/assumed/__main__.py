"""`python -m traces.assumed`: see `traces.assumed.command`."""

import sys

from traces.processes.ending import begin

if __name__ == "__main__":
    begin()
    # Only now: a signal that comes meanwhile is heard.
    from traces.assumed.command import main

    sys.exit(main())
