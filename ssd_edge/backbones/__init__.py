"""Backbones: networks, pretraining, packages, and the embedders that run them."""
