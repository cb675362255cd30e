"""Installing bundles, and whose bundles a device accepts."""
