"""Calibration and validation: what is measured becomes a profile, and the simulator is held against the machine."""
