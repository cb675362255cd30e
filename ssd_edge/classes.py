"""Class registry: class id ↔ name ↔ row.

A *row* is a position in a learner's value matrix. An *id* identifies a class within one lineage of generations and is
never reused, even after its class has been removed. The *name* is shown to people.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from ssd_edge.errors import BundleRefusedError, InputError, did_you_mean

MAX_NAME_LENGTH = 64
MAX_COUNT = 2**53  # of images and ids: every JSON reader holds such a number exactly
ORIGINS = frozenset({"base", "device"})
UNKNOWN = "unknown"  # answer for an image of no known class
RESERVED_NAMES = frozenset({UNKNOWN})

# Letters that look like one of "unknown", after compatibility decomposition and case folding; the common ones of
# Unicode's confusables.txt.
_LOOKALIKES = str.maketrans(
    {
        letter: latin
        for latin, letters in {
            "u": "υսᴜʋꞟꓴ",
            "n": "ոռηνпɴƞꓠ",
            "k": "кκқᴋĸƙⲕꓗᏦ",
            "o": "оοօσøөᴏᴑⲟꓳ0٥०০੦๐໐၀〇",
            "w": "ѡԝաωшɯᴡⲱꓪᏔᎳ",
        }.items()
        for letter in letters
    }
)
# Characters without a glyph in other categories than Cf: joiners, fillers, the blank pattern of Braille, tags.
_INVISIBLE = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\uffa0\ufff0-\ufff8\U000e0000-\U000e0fff]"
)
_VARIATION = re.compile("[\ufe00-\ufe0f]")  # added to emoji by some keyboards only


def normalise_name(name: str) -> str:
    """Return a class name in Unicode normal form NFC, without surrounding white space and variation selectors.

    Raises:
        InputError: The name is empty or blank, reserved or looks like a reserved one, longer than 64 characters, or
            contains control characters or invisible ones.
    """
    clean = _VARIATION.sub("", unicodedata.normalize("NFC", name)).strip()
    if len(clean) > MAX_NAME_LENGTH:
        raise InputError(
            f"the class name '{clean[:20]}…' has {len(clean)} characters, but at most {MAX_NAME_LENGTH} are allowed"
        )
    kinds = {letter: unicodedata.category(letter) for letter in clean}
    if "Cs" in kinds.values():  # from a file name
        raise InputError(f"the class name {clean!r} is not valid UTF-8; rename the folder")
    # Cc control, Cf format (bidirectional overrides), Zl/Zp line separators
    bad = next((c for c in clean if kinds[c] in {"Cc", "Cf", "Zl", "Zp"}), None)
    if bad is not None:
        raise InputError(f"the class name {clean!r} contains the control character U+{ord(bad):04X}; remove it")
    if found := _INVISIBLE.search(clean):
        raise InputError(f"the class name {clean!r} contains the invisible character U+{ord(found[0]):04X}; remove it")
    if not any(kind[0] in "LNPS" for kind in kinds.values()):  # nothing but spaces and accents
        raise InputError("a class name is empty; use at least one visible character")
    if _skeleton(clean) in RESERVED_NAMES:
        like = "is" if clean.casefold() in RESERVED_NAMES else "looks like 'unknown', which is"
        raise InputError(f"the class name '{clean}' {like} reserved for images of no known class; choose another")
    return clean


def _skeleton(name: str) -> str:
    """Return a name without accents and spaces, with look-alikes of the letters of "unknown" replaced by them."""
    letters = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", name).casefold())
    plain = "".join(letter for letter in letters if unicodedata.category(letter)[0] not in "MZ")
    return plain.translate(_LOOKALIKES)


@dataclass(frozen=True)
class ClassEntry:
    """One class of a registry.

    Attributes:
        id: Identifier, never reused.
        name: Normalised name.
        origin: ``base`` (from a bundle) or ``device`` (learned on a device).
        images: Number of images that it was learned from.
    """

    id: int
    name: str
    origin: str = "base"
    images: int = 0


class ClassRegistry:
    """The classes of a learner, in the order of its rows. Immutable: methods that change it return a new registry."""

    def __init__(self, entries: Iterable[ClassEntry] = (), next_id: int | None = None) -> None:
        self.entries = tuple(entries)
        used = [entry.id for entry in self.entries]
        names = [entry.name for entry in self.entries]
        if len(set(used)) != len(used) or len(set(names)) != len(names):
            raise InputError(f"class ids {used} and names {names} must not repeat")
        self.next_id = max(used, default=-1) + 1 if next_id is None else next_id

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def names(self) -> list[str]:
        """Names by row."""
        return [entry.name for entry in self.entries]

    def row(self, name: str) -> int | None:
        """Return the row of a class, or None if the name is unknown."""
        clean = normalise_name(name)
        return next((row for row, entry in enumerate(self.entries) if entry.name == clean), None)

    def add(self, name: str, origin: str = "base", images: int = 0) -> ClassRegistry:
        """Return a registry with one more class, at the next row and with a new id.

        Raises:
            InputError: The name is invalid or already taken.
        """
        clean = normalise_name(name)
        if self.row(clean) is not None:
            raise InputError(f"the class '{clean}' exists already; choose another name. Known: {', '.join(self.names)}")
        entry = ClassEntry(self.next_id, clean, origin, images)
        return ClassRegistry((*self.entries, entry), self.next_id + 1)

    def rename(self, name: str, new: str) -> ClassRegistry:
        """Return a registry in which a class has another name and keeps its id and row.

        Raises:
            InputError: The class is unknown, or the new name is invalid or taken.
        """
        row, clean = self.row_of(name), normalise_name(new)
        if self.row(clean) not in (None, row):
            raise InputError(f"the class '{clean}' exists already; choose another name. Known: {', '.join(self.names)}")
        return self._with(row, name=clean)

    def taught(self, name: str, images: int) -> ClassRegistry:
        """Return a registry in which the image count of a class is increased by `images`.

        Raises:
            InputError: The class is unknown.
        """
        row = self.row_of(name)
        return self._with(row, images=self.entries[row].images + images)

    def without(self, name: str) -> ClassRegistry:
        """Return a registry without a class; the rows after it move up, and its id is not reused.

        Raises:
            InputError: The class is unknown.
        """
        row = self.row_of(name)
        return ClassRegistry(self.entries[:row] + self.entries[row + 1 :], self.next_id)

    def joined(self, name: str, into: str) -> ClassRegistry:
        """Return a registry in which the class `name` is merged into the class `into`.

        Raises:
            InputError: One of the two is unknown, or both are the same.
        """
        row, kept = self.row_of(name), self.row_of(into)
        if row == kept:
            raise InputError(f"the class '{self.names[row]}' cannot be merged with itself; name two classes")
        return self.taught(into, self.entries[row].images).without(name)

    def row_of(self, name: str) -> int:
        """Return the row of a known class.

        Raises:
            InputError: The class is unknown.
        """
        row = self.row(name)
        if row is None:
            hint = did_you_mean(name, self.names)
            raise InputError(f"no class '{name}' is known.{hint} Known: {', '.join(self.names) or 'none'}")
        return row

    def _with(self, row: int, **changes: Any) -> ClassRegistry:
        entries = list(self.entries)
        entries[row] = replace(entries[row], **changes)
        return ClassRegistry(entries, self.next_id)

    def to_json(self) -> dict[str, Any]:
        """Return a JSON value from which `from_json` restores an equal registry."""
        return {
            "next_id": self.next_id,
            "classes": [
                {"id": entry.id, "name": entry.name, "origin": entry.origin, "images": entry.images}
                for entry in self.entries
            ],
        }

    @classmethod
    def from_json(cls, value: Any) -> ClassRegistry:
        """Restore and check a registry.

        Raises:
            BundleRefusedError: The value is not what `to_json` writes.
        """
        try:
            entries = [
                ClassEntry(_count(item["id"]), normalise_name(item["name"]), item["origin"], _count(item["images"]))
                for item in value["classes"]
            ]
            if unknown := {entry.origin for entry in entries} - ORIGINS:
                raise ValueError(f"the origin {min(unknown)!r:.40}")
            registry = cls(entries, _count(value["next_id"]))
        except (KeyError, TypeError, ValueError, OverflowError, AttributeError, InputError) as error:
            raise BundleRefusedError(f"the class registry is damaged ({error}); restore the file") from error
        if any(entry.id >= registry.next_id for entry in entries):
            raise BundleRefusedError(
                f"the class registry has the ids {[e.id for e in entries][:10]}, but the next id is "
                f"{registry.next_id}; restore the file"
            )
        return registry


def _count(value: Any) -> int:
    """Return a whole number from 0 to `MAX_COUNT`.

    Raises:
        ValueError: it is something else.
    """
    if type(value) is not int or not 0 <= value <= MAX_COUNT:
        raise ValueError(f"a count is {value!r:.40}")
    return value
