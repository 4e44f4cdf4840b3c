"""Places: where is each expert computed? One file each."""
