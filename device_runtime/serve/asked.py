"""Errors in what someone asks a station for."""

from __future__ import annotations

from ssd_edge.errors import EnvironmentUnfitError, InputError, SSDEdgeError, meaning_of, system_problem


class BusyError(EnvironmentUnfitError):
    """More was asked for at once than the device does; the same may be asked again."""


class UnknownError(InputError):
    """Something is named that does not exist."""


def meaning(error: Exception) -> SSDEdgeError | None:
    """Return what an exception means to a person, or None if it is a bug."""
    if isinstance(error, OSError):
        return EnvironmentUnfitError(f"the operating system refused: {system_problem(error)}")
    return meaning_of(error)
