"""Labelled images from folders, archives, CIFAR, MNIST, Tiny-ImageNet and the digits of scikit-learn."""

from ssd_edge.data.arrays import Images
from ssd_edge.data.datasets import Dataset, find, load, photographs

__all__ = ["Dataset", "Images", "find", "load", "photographs"]
