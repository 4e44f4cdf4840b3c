"""The simulated machine, and one policy over one workload on it."""
