"""Learners trained by gradient descent, and the sparse network of SDMLP and SSD."""
