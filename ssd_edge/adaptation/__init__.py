"""Adapt the last stages of a backbone, its tail, and leave the rest, its trunk, frozen."""
