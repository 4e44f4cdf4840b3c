"""`python -m traces`: see `traces.cli`."""

import sys

from traces.cli import main

if __name__ == "__main__":
    sys.exit(main())
