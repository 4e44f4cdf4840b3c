"""Recording: the streaming writer, the hooks, locating routers, and look-ahead, on tiny models made here."""
