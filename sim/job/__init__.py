"""One job: its configuration, what is made of it, what it writes, how it ends."""
