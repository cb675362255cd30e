"""Results of the methods of `Device`. `Record.to_dict` returns the JSON object that ``--json`` prints."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from device_runtime.machine.vitals import Vitals
from device_runtime.store.record import GenerationSummary

_OPTIONAL = {"optional": True}  # metadata of a field whose key is left out while it is None


@dataclasses.dataclass(frozen=True)
class Record:
    """A dataclass that becomes one JSON object."""

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        found: dict[str, Any] = _plain(self)
        return found


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        fields = ((field, getattr(value, field.name)) for field in dataclasses.fields(value))
        return {
            field.metadata.get("key", field.name): _plain(item)
            for field, item in fields
            if item is not None or not field.metadata.get("optional")
        }
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


@dataclasses.dataclass(frozen=True)
class HeldOut(Record):
    """Accuracy on held-out images.

    Attributes:
        images: Number of held-out images.
        accuracy: Share that is classified correctly, 0..1; None without held-out images.
    """

    images: int
    accuracy: float | None


@dataclasses.dataclass(frozen=True)
class TaughtClass(Record):
    """A class that was taught.

    Attributes:
        label: Its name.
        images: Number of images it was taught with.
        new: True if the device did not know the class before.
        held_out: Accuracy on its held-out images; None after a merge.
        confused: Name of another class → number of its held-out images that were answered with it, most first; None
            after a merge, or if none was held out.
        digest: Digest of the set of images, by which it is known if it is taught again; None after a merge.
    """

    label: str
    images: int
    new: bool
    held_out: HeldOut | None = dataclasses.field(default=None, metadata=_OPTIONAL)
    confused: Mapping[str, int] | None = dataclasses.field(default=None, metadata=_OPTIONAL)
    digest: str | None = dataclasses.field(default=None, metadata=_OPTIONAL)


@dataclasses.dataclass(frozen=True)
class ClassRetention(Record):
    """Estimated accuracy on one old class before and after a change."""

    label: str
    accuracy_before: float
    accuracy_after: float
    drop: float


@dataclasses.dataclass(frozen=True)
class Retention(Record):
    """Estimated accuracy on the old classes before and after a change.

    Attributes:
        kind: One sentence on how the figures were obtained.
        accuracy_before: Mean accuracy before on the old classes of the bundle, 0..1; None if it cannot be estimated.
        accuracy_after: The same after it.
        drop: Mean loss of accuracy by this change, of all old classes.
        lost: Mean loss by this and all earlier changes since the classes were installed or taught.
        worst: The class with the largest drop.
    """

    kind: str
    accuracy_before: float | None
    accuracy_after: float | None
    drop: float
    lost: float = 0.0
    worst: ClassRetention | None = dataclasses.field(default=None, metadata=_OPTIONAL)


NO_OLD_CLASSES = Retention("no class was known before", None, None, 0.0)


@dataclasses.dataclass(frozen=True)
class Suspects(Record):
    """Images that a warning refers to.

    Attributes:
        kind: ``like`` for images that look like another class, ``far`` for outliers.
        label: Class that they were taught as.
        like: Class that they look like; None for outliers.
        indices: Their positions among the new images.
    """

    kind: str
    label: str
    like: str | None
    indices: list[int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Change(Record):
    """A change of the device's state that was committed.

    Attributes:
        generation: Number of the current generation after the change; 0 before the commit.
        classes: Class names after the change.
    """

    generation: int = 0
    classes: list[str] = dataclasses.field(default_factory=list)

    def info(self) -> dict[str, Any]:
        """Return what the generation and the journal record about the change: every field but those above."""
        fields = {key: value for key, value in self.to_dict().items() if key not in ("generation", "classes")}
        # the names of image files may be any bytes, but the record is UTF-8
        recorded: dict[str, Any] = json.loads(json.dumps(fields, ensure_ascii=False).encode("utf-8", "replace"))
        return recorded


@dataclasses.dataclass(frozen=True, kw_only=True)
class LearnResult(Change):
    """Result of `Device.learn_all`.

    Attributes:
        label: Names of the taught classes, joined by commas.
        images: Number of images.
        held_out: Accuracy on all held-out images.
        taught: The classes.
        old_classes: Estimated accuracy on the old classes.
        warnings: Sentences for the operator.
        suspects: Images that the warnings refer to.
        seconds: Wall time.
        peak_mb: Peak memory of the process while learning, MiB; None if the system does not report it.
        measured: Metrics that the learner reports.
    """

    label: str
    images: int
    held_out: HeldOut
    taught: list[TaughtClass]
    old_classes: Retention
    warnings: list[str]
    suspects: list[Suspects]
    seconds: float
    peak_mb: int | None
    measured: Mapping[str, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RenameResult(Change):
    """Result of `Device.rename`.

    Attributes:
        renamed: The old name and the new one.
    """

    renamed: tuple[str, str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ForgetResult(Change):
    """Result of `Device.forget`.

    Attributes:
        forgot: Name of the removed class.
        images: Number of images it was taught with.
        exact: True if the learner is as if the class had never been taught.
        left: One sentence on what remains of the class; empty if `exact`.
        old_classes: Estimated accuracy on the remaining classes.
        warnings: Sentences for the operator.
    """

    forgot: str
    images: int
    exact: bool
    left: str
    old_classes: Retention
    warnings: list[str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MergeLabelsResult(Change):
    """Result of `Device.merge_labels`.

    Attributes:
        merged_labels: Names of the merged classes.
        into: Name of the class that remains.
        old_classes: Estimated accuracy on all classes.
        warnings: Sentences for the operator.
    """

    merged_labels: list[str]
    into: str
    old_classes: Retention
    warnings: list[str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MergeResult(Change):
    """Result of `Device.merge`.

    Attributes:
        merged: Installation id of the other device.
        bundle_sha256: Of the bundle that it exported.
        taught: Classes that the other device has learned.
        old_classes: Estimated accuracy on the classes that this device knew.
        warnings: Sentences for the operator.
    """

    merged: str
    bundle_sha256: str
    taught: list[TaughtClass]
    old_classes: Retention
    warnings: list[str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RollbackResult(Change):
    """Result of `Device.rollback`.

    Attributes:
        previous: Number of the generation that was current before; ``from`` in JSON.
    """

    previous: int = dataclasses.field(metadata={"key": "from"})


@dataclasses.dataclass(frozen=True)
class ExportResult(Record):
    """Result of `Device.export`.

    Attributes:
        bundle: Path of the file.
        bytes: Its size.
        sha256: Its digest.
        generation: Number of the exported generation.
        classes: Class names.
        signed_by: Id of the key that signed it; None if it is unsigned.
    """

    bundle: str
    bytes: int
    sha256: str
    generation: int
    classes: list[str]
    signed_by: str | None


@dataclasses.dataclass(frozen=True)
class Status(Record):
    """Result of `Device.status`.

    Attributes:
        generation: Number of the current generation.
        classes: Class names.
        images: Class name → number of images it was taught with.
        learned_here: Names of the classes that were learned on the device.
        learner: Name of the learner.
        replay: True if the learner stores samples.
        state_bytes: Size of the learner's state.
        provider: What ran the backbone when it was last started; None if it never was.
        bundle: Name of the installed bundle.
        release: Its release.
        signed_by: Id of the key that signed it; None if it is unsigned.
        precision: Precision of the backbone.
        installation: Id of the installation.
        root: The device's root.
        machine: Memory, disk and temperatures.
        watched: See `device_runtime.store.watch_state.last_report`.
        warning: Why an older generation replaces the current one; empty if it does not.
        note: Why `provider` is not what the target is prepared for, or not the fastest; empty if it is.
        answers_with: ``NumPy``, or ``PyTorch`` and why.
    """

    generation: int
    classes: list[str]
    images: Mapping[str, int]
    learned_here: list[str]
    learner: str
    replay: bool
    state_bytes: int
    provider: str | None
    bundle: str
    release: int
    signed_by: str | None
    precision: str
    installation: str
    root: str
    machine: Vitals
    watched: Mapping[str, Any] | None
    warning: str
    note: str
    answers_with: str


@dataclasses.dataclass(frozen=True)
class HistoryEntry(GenerationSummary, Record):
    """A generation in `History`.

    Attributes:
        what: The change that created it, in a few words.
    """

    what: str = ""


@dataclasses.dataclass(frozen=True)
class History(Record):
    """Result of `Device.history`, oldest first.

    Attributes:
        generation: Number of the current generation.
        classes: Class names.
        generations: All generations.
        events: All events of the journal, as JSON objects.
    """

    generation: int
    classes: list[str]
    generations: list[HistoryEntry]
    events: list[Mapping[str, Any]]


def describe(info: Mapping[str, Any], most: int | None = None) -> str:
    """Return the change that created a generation in a few words, or an empty string if it is unknown.

    Args:
        info: The information that was committed with the generation, see `Change.info`.
        most: Number of taught classes to name; more of them are only counted. None: name all.
    """
    if "renamed" in info:
        return "rename '{}' to '{}'".format(*info["renamed"])
    if "forgot" in info:
        return f"forget '{info['forgot']}'{'' if info['exact'] else ', not exactly'}"
    if "merged_labels" in info:
        return f"merge {', '.join(map(repr, info['merged_labels']))} into '{info['into']}'"
    classes = info.get("taught", ())
    taught = ", ".join(f"'{one['label']}' ({one['images']} images)" for one in classes)
    if most is not None and len(classes) > most:
        taught = f"{len(classes)} classes ({sum(one['images'] for one in classes):,} images)"
    if "merged" in info:
        return f"merge with installation {info['merged']}: {taught}"
    return f"learn {taught}" if taught else f"install {info['bundle']}" if "bundle" in info else ""
