"""Tests of `python -m sim.study`."""
