"""`python -m traces`: see `traces.cli`."""

import sys

from traces.installed import warn_if_mixed

if __name__ == "__main__":
    warn_if_mixed()
    # Only now: another distribution may have overwritten what this needs.
    from traces.cli import main

    sys.exit(main())
