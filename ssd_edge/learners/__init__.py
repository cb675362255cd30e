"""Learners, one per file; `build`, `pack` and `restore` create, save and load them."""

from ssd_edge.learners.base import Learner, Task, TensorSpec
from ssd_edge.learners.registry import (
    AUTO,
    LEARNERS,
    build,
    pack,
    restore,
    settings_class,
    settings_of,
    wants_second_view,
)
from ssd_edge.learners.removal import without_rows

__all__ = [
    "AUTO",
    "LEARNERS",
    "Learner",
    "Task",
    "TensorSpec",
    "build",
    "pack",
    "restore",
    "settings_class",
    "settings_of",
    "wants_second_view",
    "without_rows",
]
