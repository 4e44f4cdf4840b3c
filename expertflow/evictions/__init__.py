"""Evictions: who leaves? One file each."""
