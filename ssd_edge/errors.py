"""Errors that a user can act on, and their exit codes (see docs/cli.md).

A message states what happened, the values that disagree, and what to do next. Every other exception is a bug and ends
with exit code 1 and a traceback.
"""

from __future__ import annotations

import difflib
import errno
import importlib
import re
from collections.abc import Iterable, Sequence
from types import ModuleType

# Of PyTorch, CUDA, ONNX Runtime and the loader of shared libraries, which have no exception for it.
_NO_MEMORY = re.compile(
    r"failed to map segment|can(no|')t allocate memory|out of memory|bad.alloc|failed to allocate memory", re.IGNORECASE
)


class SSDEdgeError(Exception):
    """Base class of all errors that are shown without a traceback."""

    exit_code = 1

    def __str__(self) -> str:
        """Return the message as one line without control codes: names in it may come from an untrusted file."""
        return printable(super().__str__())


class InputError(SSDEdgeError):
    """Bad input or usage: a missing file, a corrupt image, an unknown key, a value out of range."""

    exit_code = 2


class BadFilesError(InputError):
    """Files that cannot be used, all of them at once.

    Args:
        problems: A sentence for each, which begins with its name.
        total: Number of files that were looked at.
        lever: How to go on without them.

    Attributes:
        problems: See above.
        summary: The message without the sentences, for those who have shown them all.
    """

    SHOWN = 3  # in the message

    def __init__(self, problems: Sequence[str], total: int, lever: str = "--skip-bad") -> None:
        self.problems = tuple(problems)
        count, shown = len(self.problems), "; ".join(self.problems[: self.SHOWN])
        more = f"; and {count - self.SHOWN:,} more" if count > self.SHOWN else ""
        self.summary = f"{count:,} of {total:,} files cannot be used. To go on without them: {lever}"
        if count == 1:
            super().__init__(f"{shown}. To go on without it: {lever}")
        else:
            super().__init__(
                f"{count:,} of {total:,} files cannot be used: {shown}{more}. To go on without them: {lever}"
            )


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


_ADVICE = {
    errno.ENOSPC: "the disk is full: free some space",
    errno.EDQUOT: "the disk quota is used up: free some space",
    errno.EFBIG: "the file would be larger than the file system or the limit of this process (ulimit -f) allows",
    errno.EROFS: "the file system is read-only: remount it or choose another folder",
    errno.EACCES: "permission denied: choose a folder that you may write to",
    errno.EPERM: "permission denied: choose a folder that you may write to",
    errno.EMFILE: "too many open files: raise the limit (ulimit -n)",
    errno.ENFILE: "too many open files on this machine: stop other programs",
    errno.ENOMEM: "too little memory: stop other programs",
    errno.ENOTDIR: "a part of the path is a file, not a folder (below a device's root, links are not followed either)",
    errno.ENOENT: "it does not exist: check the path",
    errno.EISDIR: "a folder has this name: choose another",
    errno.EEXIST: "something has this name already: remove it or choose another",
    errno.ENOTEMPTY: "a folder that is not empty has this name already: remove it or choose another",
    errno.ELOOP: "it is a symbolic link, which is not followed here: replace it by what it points to",
    errno.ENAMETOOLONG: "the name is too long: choose a shorter one",
    errno.EBUSY: "it is in use: try again",
    errno.EXDEV: "its folder lies on two file systems: choose another",
    errno.EIO: "the disk reports an error: it may be failing",
    errno.ENXIO: "it is not a regular file: remove it or choose another path",
    errno.ESTALE: "the network share was replaced: mount it again",
    errno.ETIMEDOUT: "the network share does not respond: check the connection",
    errno.EINVAL: "the file system does not support this: choose a folder on a local disk",
    errno.EOPNOTSUPP: "the file system does not support this: choose a folder on a local disk",
    errno.ENOSYS: "the file system does not support this: choose a folder on a local disk",
}


def system_problem(error: OSError) -> str:
    """Return what an error of the operating system means and what to do, e.g. ``the disk is full: free some space``."""
    known = _ADVICE.get(error.errno or 0)
    return known or f"{error.strerror or first_line(error)}: see the messages of the system (dmesg), then try again"


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
        if isinstance(meaning := meaning_of(error), EnvironmentUnfitError):
            raise meaning from error
        raise EnvironmentUnfitError(
            f"the package '{module}' is needed to {purpose} and cannot be imported ({error}); "
            f"install it with: pip install {install or repr(f'ssd-edge[{extra}]')}"
        ) from error


def meaning_of(error: BaseException) -> SSDEdgeError | None:
    """Return the error of this module that another exception means to the user, or None if it is a bug."""
    if isinstance(error, SSDEdgeError):
        return error
    text = str(error)
    memory = next((line.strip() for line in text.splitlines() if _NO_MEMORY.search(line)), "")
    if memory or isinstance(error, MemoryError):
        return EnvironmentUnfitError(
            f"there is not enough memory ({memory[:200] or type(error).__name__}); end other programs, raise the limit "
            "(ulimit -v), or use fewer images, a smaller learner or a smaller backbone"
        )
    if isinstance(error, RecursionError):
        return InputError("an input is nested too deeply to be read; simplify it")
    if isinstance(error, UnicodeEncodeError) and "\ud800" <= error.object[error.start] <= "\udfff":
        name = error.object[max(0, error.start - 40) : error.end + 40]
        return InputError(f"a name is not valid UTF-8: '{name}'; rename the file or folder")
    return None


def printable(text: str) -> str:
    """Return text as one line for a terminal: other white space becomes a space, any other unprintable character ``?``.

    Control codes of both kinds (C0, C1), characters that reverse the text around them, invisible ones and names that
    are not UTF-8 are unprintable.
    """
    if text.isprintable():
        return text
    return "".join(letter if letter.isprintable() else " " if letter.isspace() else "?" for letter in text)


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message, or its type if it has none: those of drivers can be long."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `` Did you mean 'x'?``, or an empty string if no known word is similar."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" Did you mean '{near[0]}'?" if near else ""
