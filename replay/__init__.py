"""Real machines: the same runtime and policies on true-size copies, with a measured clock."""

import os
import sys

# The packages beside this one, not what bears their names in the current folder.
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from sim import start

del sys.path[0]

start()
