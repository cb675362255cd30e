"""Backbones: networks, pretraining, packages, and embedders."""
