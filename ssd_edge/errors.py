"""Errors that a user can act on, and their exit codes (see docs/cli.md).

A message states what happened, the values that disagree, and what to do next. Every other exception is a bug and ends
with exit code 1 and a traceback.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from types import ModuleType


class SSDEdgeError(Exception):
    """Base class of all errors that are shown without a traceback."""

    exit_code = 1


class InputError(SSDEdgeError):
    """Bad input or usage: a missing file, a corrupt image, an unknown key, a value out of range."""

    exit_code = 2


class EnvironmentUnfitError(SSDEdgeError):
    """This machine lacks what the command needs: a package, memory, disk, a writable folder."""

    exit_code = 3


class GateRefusedError(SSDEdgeError):
    """A quality gate refused the result (parity of an export, forgetting on a device); nothing was changed."""

    exit_code = 4


class BundleRefusedError(SSDEdgeError):
    """A bundle, checkpoint or generation is damaged or does not match its manifest."""

    exit_code = 5


class SlowerProviderError(SSDEdgeError):
    """Under ``--strict``: the backbone would run on a slower provider than requested."""

    exit_code = 6


def require(module: str, extra: str, purpose: str, install: str = "") -> ModuleType:
    """Import an optional package where it is used.

    Args:
        module: Import name, e.g. ``"onnxruntime"``.
        extra: Extra of this distribution that installs it, e.g. ``"device"``.
        purpose: Completes "is needed to …".
        install: What to install instead of the extra, which on a Jetson would also install PyPI's PyTorch.

    Raises:
        EnvironmentUnfitError: The package is missing; the message contains the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except (ImportError, OSError) as error:  # a missing shared library raises OSError
        raise EnvironmentUnfitError(
            f"the package '{module}' is needed to {purpose} and cannot be imported ({error}); "
            f"install it with: pip install {install or repr(f'ssd-edge[{extra}]')}"
        ) from error


def printable(text: str) -> str:
    """Return `text` with unprintable characters replaced by ``?``: no escape codes reach the terminal."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message, or its type if it has none: those of drivers can be long."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `` Did you mean 'x'?``, or an empty string if no known word is similar."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" Did you mean '{near[0]}'?" if near else ""
