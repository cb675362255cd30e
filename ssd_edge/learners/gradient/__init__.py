"""Learners that are trained by gradient descent, and the sparse network behind SDMLP and SSD."""
