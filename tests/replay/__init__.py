"""Do real copies and kernels do what the runtime asks, and is it reported as it happened? On the CPU; never speed."""
