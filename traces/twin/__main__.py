"""`python -m traces.twin`: see `traces.twin.cli`."""

import sys

from traces.twin.cli import main

if __name__ == "__main__":
    sys.exit(main())
