"""The Flower app of a fleet."""
