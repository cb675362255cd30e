"""SSD-Edge: continual learning for edge devices (see README.md)."""

from ssd_edge.system import VERSION

__version__ = VERSION
