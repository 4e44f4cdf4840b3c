"""The real machine: devices, their memory, what is launched on them, and what a run needs of them."""
