"""Learning and editing on the device, and the checks that guard a commit."""
