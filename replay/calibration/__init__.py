"""What a machine's calibration measures, and the profile that simulations take of it."""
