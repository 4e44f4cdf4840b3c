"""Real machines: the same runtime and policies on true-size copies, with a measured clock."""

from sim import start

start()
