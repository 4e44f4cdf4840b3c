"""What is read of a machine and a stack: figures with their sources."""
