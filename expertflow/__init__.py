"""ExpertFlow: adaptive expert prefetching for offloaded Mixture-of-Experts models (arXiv 2510.26730).

The system itself: runtime loop, slots, copy queue, the six parts of a policy, metrics and bounds.
It knows no SimPy, no torch, no Hydra, no file and no clock: two machines drive it, a simulated one
(`sim`) and a real one.
"""

from expertflow.core import start

start()
