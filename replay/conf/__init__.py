"""Configuration that only a replay has: the machine it runs on."""
