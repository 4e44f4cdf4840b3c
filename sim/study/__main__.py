"""`python -m sim.study`."""

import sys

from sim.study.command import cli

if __name__ == "__main__":
    sys.exit(cli())
