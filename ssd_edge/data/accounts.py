"""Account of a data set: every file besides the images that are used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ssd_edge.errors import printable

SHOWN = 3  # names in a sentence


@dataclass(frozen=True)
class Accounts:
    """Files and folders beside the images that are used. Names are those of error messages.

    Attributes:
        skipped: A sentence for each file that cannot be used, if they are left out (``data.skip_bad``).
        outside: Images outside any class folder, which are not used.
        empty: Class folders without images.
        repeated: Members of an archive of which a later one has the same name and is used instead.
        identical: Groups of files with the same content.
        alike: Pairs of the same content, the first in the training images, the second in the test images.
        others: Number of files of other kinds by the end of their names, e.g. ``.txt``.
        junk: Number of hidden files and files of operating systems.
    """

    skipped: tuple[str, ...] = ()
    outside: tuple[str, ...] = ()
    empty: tuple[str, ...] = ()
    repeated: tuple[str, ...] = ()
    identical: tuple[tuple[str, ...], ...] = ()
    alike: tuple[tuple[str, str], ...] = ()
    others: tuple[tuple[str, int], ...] = ()
    junk: int = 0

    def warnings(self) -> list[str]:
        """Return a sentence for each thing that may surprise."""
        found = []
        if self.skipped:
            found.append(
                f"{_count(self.skipped, 'file')} left out, as they cannot be used: {_some(self.skipped, '; ')}"
            )
        if self.outside:
            found.append(f"{_count(self.outside, 'image')} outside any class folder, not used: {_some(self.outside)}")
        if self.empty:
            found.append(f"{_count(self.empty, 'class folder')} without images: {_some(self.empty)}")
        if self.repeated:
            found.append(
                f"{_count(self.repeated, 'file')} of the archive replaced by later ones of the same name, as when "
                f"unpacking it: {_some(self.repeated)}; give them names of their own to use them all"
            )
        if self.alike:
            pairs = [f"{train} = {test}" for train, test in self.alike]
            found.append(
                f"{_count(self.alike, 'test image')} identical to training images, so that accuracy is overstated: "
                f"{_some(pairs)}"
            )
        if copies := sum(len(group) - 1 for group in self.identical):
            pairs = [" = ".join(group) for group in self.identical]
            found.append(f"{copies:,} {'copy' if copies == 1 else 'copies'} of other files: {_some(pairs)}")
        return found

    def ignored(self) -> str:
        """Return what was not looked at as a phrase, or an empty text."""
        others = sum(count for _, count in self.others)
        kinds = ", ".join(f"{ending or 'no ending'} {count:,}" for ending, count in self.others[:5])
        parts = [
            f"{others:,} other file{'s' * (others > 1)} ({kinds}{', …' if len(self.others) > 5 else ''})"
            if others
            else "",
            f"{self.junk:,} hidden or system file{'s' * (self.junk > 1)}" if self.junk else "",
        ]
        return " and ".join(filter(None, parts))

    def sentences(self) -> list[str]:
        """Return all there is to say, as lines for people."""
        ignored = self.ignored()
        return [
            *(f"warning: {warning}" for warning in self.warnings()),
            *([f"not looked at: {ignored}"] if ignored else []),
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return the values and the sentences about them as a JSON object; a file name may be any bytes."""
        return {
            **{key: _shown(value) for key, value in asdict(self).items()},
            "others": dict(self.others),
            "warnings": _shown(self.warnings()),
            "ignored": printable(self.ignored()),
        }


def _shown(value: Any) -> Any:
    """Return a value with `printable` texts."""
    if isinstance(value, str):
        return printable(value)
    return list(map(_shown, value)) if isinstance(value, list | tuple) else value


def _count(found: Sequence[object], noun: str) -> str:
    return f"{len(found):,} {noun}{'s' * (len(found) != 1)}"


def _some(names: Sequence[str], between: str = ", ") -> str:
    more = f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
    return between.join(names[:SHOWN]) + more
