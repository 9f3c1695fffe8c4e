"""Programs that measure; each is run by its path, and says how in its first lines."""
