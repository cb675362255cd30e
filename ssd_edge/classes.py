"""Class registry: class id ↔ name ↔ row.

A *row* is a position in a learner's value matrix. An *id* names a class within one lineage of states and
is never given twice, also after its class has been removed. Names are what people see.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from ssd_edge.errors import BundleRefusedError, InputError, did_you_mean

MAX_NAME_LENGTH = 64
RESERVED_NAMES = frozenset({"unknown"})


def normalise_name(name: str) -> str:
    """The NFC form of a class name, stripped of surrounding blanks.

    Raises:
        InputError: empty, reserved, longer than 64 characters, or with control characters.
    """
    clean = unicodedata.normalize("NFC", name).strip()
    if not clean:
        raise InputError("a class name is empty; give it at least one visible character")
    if clean.casefold() in RESERVED_NAMES:
        raise InputError(f"the class name '{clean}' is reserved: it answers what was not taught; choose another")
    if len(clean) > MAX_NAME_LENGTH:
        raise InputError(f"the name '{clean[:20]}…' has {len(clean)} characters, but at most {MAX_NAME_LENGTH} fit")
    # Cc control, Cf format (bidirectional overrides), Cs lone surrogate, Zl/Zp line separators
    bad = next((c for c in clean if unicodedata.category(c) in {"Cc", "Cf", "Cs", "Zl", "Zp"}), None)
    if bad is not None:
        raise InputError(f"the class name {clean!r} holds the control character U+{ord(bad):04X}; remove it")
    return clean


@dataclass(frozen=True)
class ClassEntry:
    """One class: `origin` is ``base`` (from a bundle) or ``device``; `images` is how many it was taught with."""

    id: int
    name: str
    origin: str = "base"
    images: int = 0


class ClassRegistry:
    """The classes of a learner, in the order of its rows. Immutable: what changes it returns a new registry."""

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
        """The row of a name, or None."""
        clean = normalise_name(name)
        return next((row for row, entry in enumerate(self.entries) if entry.name == clean), None)

    def add(self, name: str, origin: str = "base", images: int = 0) -> ClassRegistry:
        """A registry with one more class, at the next row and with a new id.

        Raises:
            InputError: the name is bad or already taken.
        """
        clean = normalise_name(name)
        if self.row(clean) is not None:
            raise InputError(f"the class '{clean}' exists already; choose another name. Known: {', '.join(self.names)}")
        entry = ClassEntry(self.next_id, clean, origin, images)
        return ClassRegistry((*self.entries, entry), self.next_id + 1)

    def rename(self, name: str, new: str) -> ClassRegistry:
        """A registry in which one class has another name; its id and row stay.

        Raises:
            InputError: no such class, or the new name is bad or taken.
        """
        row, clean = self.row_of(name), normalise_name(new)
        if self.row(clean) not in (None, row):
            raise InputError(f"the class '{clean}' exists already; choose another name. Known: {', '.join(self.names)}")
        return self._with(row, name=clean)

    def taught(self, name: str, images: int) -> ClassRegistry:
        """A registry in which one class was taught with so many images more.

        Raises:
            InputError: no such class.
        """
        row = self.row_of(name)
        return self._with(row, images=self.entries[row].images + images)

    def without(self, name: str) -> ClassRegistry:
        """A registry without one class: rows above it move up, and its id is given to no other.

        Raises:
            InputError: no such class.
        """
        row = self.row_of(name)
        return ClassRegistry(self.entries[:row] + self.entries[row + 1 :], self.next_id)

    def joined(self, name: str, into: str) -> ClassRegistry:
        """A registry in which the images of one class count as those of another, and its own name is gone.

        Raises:
            InputError: one of the two is not known, or both are the same.
        """
        row, kept = self.row_of(name), self.row_of(into)
        if row == kept:
            raise InputError(f"the class '{self.names[row]}' cannot be joined with itself; name two classes")
        return self.taught(into, self.entries[row].images).without(name)

    def row_of(self, name: str) -> int:
        """The row of a known name.

        Raises:
            InputError: no such class.
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
        """A JSON value from which `from_json` restores an equal registry."""
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
            BundleRefusedError: not what `to_json` writes.
        """
        try:
            entries = [
                ClassEntry(int(item["id"]), normalise_name(item["name"]), str(item["origin"]), int(item["images"]))
                for item in value["classes"]
            ]
            registry = cls(entries, int(value["next_id"]))
        except (KeyError, TypeError, ValueError, AttributeError, InputError) as error:
            raise BundleRefusedError(f"the class registry is damaged ({error}); restore the file") from error
        if any(entry.id >= registry.next_id or entry.id < 0 for entry in entries):
            raise BundleRefusedError(
                f"the class registry gives ids {[e.id for e in entries][:10]}, but {registry.next_id} as the next"
            )
        return registry
