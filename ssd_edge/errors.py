"""Errors that a user can act on, and the exit code of each (see docs/cli.md).

A message says what happened, the two values that disagree, and what to do next.
Anything that is not one of these is a defect of the program and ends with exit code 1 and a traceback.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from types import ModuleType


class SSDEdgeError(Exception):
    """Base of all errors that are shown as one sentence, without a traceback."""

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
    """A bundle, checkpoint or generation is damaged or not what its manifest says."""

    exit_code = 5


class SlowerProviderError(SSDEdgeError):
    """Under ``--strict``: what runs is slower than what was asked for."""

    exit_code = 6


def require(module: str, extra: str, purpose: str, install: str = "") -> ModuleType:
    """Import an optional package where it is used.

    Args:
        module: import name, e.g. ``"onnxruntime"``.
        extra: the extra of this distribution that installs it, e.g. ``"device"``.
        purpose: completes "is needed to …".
        install: what to install in place of the extra, which on a Jetson would bring PyPI's PyTorch along.

    Raises:
        EnvironmentUnfitError: in one sentence, with the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except (ImportError, OSError) as error:  # a missing shared library raises OSError
        raise EnvironmentUnfitError(
            f"the package '{module}' is needed to {purpose} and cannot be imported ({error}); "
            f"install it with: pip install {install or repr(f'ssd-edge[{extra}]')}"
        ) from error


def printable(text: str) -> str:
    """Text with `?` for what is no letter: a stranger's words must bring no escape codes to a terminal."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`` Did you mean 'x'?``, or an empty string when nothing known is near."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" Did you mean '{near[0]}'?" if near else ""
