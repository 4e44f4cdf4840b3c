"""Orders: what runs first within a layer? One file each."""
