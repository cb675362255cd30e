"""The crash-safe store of a device: generations, journal, consistency check."""
