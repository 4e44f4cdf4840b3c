"""Recording: the streaming writer, the hooks, locating routers, and look-ahead, on tiny models made here."""

import os

# Read when the hub's client is first imported: no test may use the network.
os.environ["HF_HUB_OFFLINE"] = "1"
