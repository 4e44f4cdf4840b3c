"""What keeps results whole whatever happens to processes: files, locks, signals, and workers whose parent is gone."""
