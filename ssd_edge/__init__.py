"""SSD-Edge: continual learning for edge devices (see README.md)."""

__version__ = "0.1.0"
