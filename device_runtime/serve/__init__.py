"""The service that a console, programs and a building talk to: one process that holds the device warm."""
