"""Where experts are computed, and what never leaves the GPU."""
