"""Learners that are solved in closed form from sufficient statistics."""
