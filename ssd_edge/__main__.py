"""Entry point of ``python -m ssd_edge``."""

from ssd_edge.cli import main

main()
