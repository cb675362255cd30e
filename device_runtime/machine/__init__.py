"""The machine: board, packages, doctor and profile."""
