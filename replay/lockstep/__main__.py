"""`python -m replay.lockstep`."""

from __future__ import annotations

import sys

from replay.lockstep.compare import main

if __name__ == "__main__":
    sys.exit(main())
