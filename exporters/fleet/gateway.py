"""Collect what devices have learned in a ledger, and write one bundle with all of it.

The ledger is a folder with the latest sums of every device. The bundle is always the common bundle plus these, so
nothing counts twice: not a device that answers twice, nor one that answers again after it has learned more. For the
same reason a device can be taken out again, exactly.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from device_runtime.learning import contribution
from device_runtime.learning.contribution import Contribution
from device_runtime.learning.exchange import Origin
from device_runtime.learning.export import answered_probe
from device_runtime.learning.guard import Limits
from device_runtime.learning.state import DeviceState
from exporters.fleet.names import Means, Yardstick, group
from ssd_edge import bundle as bundles
from ssd_edge import files
from ssd_edge.bundle import card
from ssd_edge.classes import MAX_NAME_LENGTH
from ssd_edge.errors import BundleRefusedError, InputError, SSDEdgeError
from ssd_edge.learners.closed_form.sums import ClassStatistics
from ssd_edge.system import utc_now

INDEX = "ledger.json"
KINDS = ("refused", "failed", "late", "repeated")


@dataclasses.dataclass(frozen=True)
class Reply:
    """Answer of one device, or the reason why there is none.

    Attributes:
        who: Name for the report: a node, or a file.
        arrays: Arrays of `Contribution.to_arrays`; None if there is no answer.
        about: The rest of it.
        problem: Why there is no answer.
        late: True if it did not answer in time, False if it failed.
    """

    who: str
    arrays: Mapping[str, np.ndarray] | None = None
    about: Any = None
    problem: str = ""
    late: bool = False


@dataclasses.dataclass(frozen=True)
class Conflict:
    """Devices that mean something else by a name.

    Attributes:
        name: The name.
        counted_as: Name under which their images count.
        devices: Their installation ids.
    """

    name: str
    counted_as: str
    devices: list[str]


@dataclasses.dataclass(frozen=True)
class Round:
    """Report of one round.

    Attributes:
        number: Its number, from 1.
        counted: Installation ids whose sums are new or have changed.
        unchanged: Installation ids that have learned nothing since they last answered, or nothing at all.
        repeated: Names of those that answered more than once.
        refused: Name → why the answer was not counted.
        failed: Name → why there was no answer.
        late: Names of those that did not answer in time.
        conflicts: Names that devices use for different things.
        bytes: Sizes of the sums that were sent: smallest, median and largest.
        seconds: Duration.
    """

    number: int
    counted: list[str]
    unchanged: list[str]
    repeated: list[str]
    refused: dict[str, str]
    failed: dict[str, str]
    late: list[str]
    conflicts: list[Conflict]
    bytes: list[int]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return dataclasses.asdict(self)

    def lines(self) -> Iterator[str]:
        """Yield the report for people: one line of counts, then one for each device or name that needs attention."""
        parts = [f"{len(self.counted)} counted"]
        parts += [f"{len(getattr(self, kind))} {kind}" for kind in (*KINDS, "unchanged") if getattr(self, kind)]
        yield f"round {self.number}: {', '.join(parts)}"
        for who, reason in (*self.refused.items(), *self.failed.items()):
            yield f"  {who}: {reason}"
        yield from (f"  {who}: did not answer in time; it is taken when it answers" for who in self.late)
        yield from (f"  {who}: answered more than once, counted once" for who in self.repeated)
        for one in self.conflicts:
            yield f"  '{one.name}' is something else on {', '.join(one.devices)}, and counts as '{one.counted_as}'"


@dataclasses.dataclass(frozen=True)
class Issued:
    """A bundle that a gateway has written.

    Attributes:
        bundle: Its path.
        bytes: Its size.
        sha256: Its digest.
        release: Its release number.
        signed_by: Id of the key that signed it; None if it is unsigned.
        devices: Number of devices whose images it counts.
        classes: Class name → number of images.
        old_classes: Estimated accuracy on the classes of the common bundle.
        warnings: Sentences for the operator.
        seconds: Duration.
    """

    bundle: str
    bytes: int
    sha256: str
    release: int
    signed_by: str | None
    devices: int
    classes: dict[str, int]
    old_classes: dict[str, Any]
    warnings: list[str]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return the result as JSON values."""
        return dataclasses.asdict(self)

    def lines(self) -> Iterator[str]:
        """Yield the result for people."""
        signed = f"signed by {self.signed_by}" if self.signed_by else "not signed"
        yield (
            f"{self.bundle}: {self.bytes / 1e6:.1f} MB, {len(self.classes)} classes, "
            f"{sum(self.classes.values()):,} images; devices: {self.devices}, release {self.release}, {signed}"
        )
        yield from (f"  warning: {warning}" for warning in self.warnings)


class Gateway:
    """The common bundle of a fleet, and the ledger of what its devices have learned.

    Args:
        folder: Folder of the ledger; created if it does not exist.
        base: The bundle that the first of the devices had installed.

    Raises:
        InputError: The ledger belongs to another bundle, or the bundle's learner does not keep sums.
        BundleRefusedError: The ledger or the bundle is damaged.
    """

    def __init__(self, folder: Path, base: bundles.Bundle) -> None:
        self.folder, self.base, self.state = Path(folder), base, DeviceState.of_bundle(base)
        self.state.learner.sums_since(self.state.learner)  # refuses learners without sums
        self._index: dict[str, Any] = {"base": base.sha256, "issued": [], "left_out": [], "round": 0, "devices": {}}
        files.make_directory(self.folder)
        if files.exists(self.folder / INDEX):
            found = files.read_json(self.folder / INDEX)
            if not isinstance(found, dict) or found.keys() != self._index.keys():
                raise BundleRefusedError(f"{self.folder / INDEX} is damaged; restore the file")
            self._index = found
        if self._index["base"] != base.sha256:
            raise InputError(
                f"the ledger {self.folder} is of the bundle {self._index['base'][:12]}…, not of {base.sha256[:12]}…; "
                "name that bundle, or another folder"
            )

    @property
    def devices(self) -> list[str]:
        """Installation ids whose images count."""
        return sorted(key for key, entry in self._index["devices"].items() if entry["classes"])

    def gather(self, replies: Iterable[Reply]) -> Round:
        """Take the answers of a round into the ledger.

        Args:
            replies: The answers, which may be produced while they are taken.
        """
        began, devices = time.monotonic(), self._index["devices"]
        known = contribution.total(self.state, self._parts()).state
        owners = {one: key for key, entry in devices.items() for one in (key, *entry["merged"])}
        counted: dict[str, list[str]] = {}
        found: dict[str, Any] = {key: {} for key in ("refused", "failed", "late", "repeated", "unchanged")}
        sizes: list[int] = []
        for reply in replies:
            if reply.arrays is None:
                found["late" if reply.late else "failed"][reply.who] = reply.problem
                continue
            try:
                part = contribution.parse(reply.arrays, reply.about, known)
                self._check_origin(part, owners)
            except SSDEdgeError as error:
                found["refused"][reply.who] = str(error)
                continue
            sizes.append(part.bytes)
            key, entry = part.origin.installation, devices.get(part.origin.installation)
            data = files.tensor_bytes(part.to_arrays(), part.about())
            if key in counted or key in found["unchanged"]:
                found["repeated"][reply.who] = key
                if entry is None or part.origin.generation <= entry["generation"]:
                    continue
            elif (entry is None and not part.classes) or (entry is not None and entry["sha256"] == files.sha256(data)):
                found["unchanged"][key] = reply.who
                continue
            files.write_bytes(self._path(key), data)
            earlier = {} if entry is None else entry["classes"]
            devices[key] = {
                "merged": list(part.origin.merged),
                "generation": part.origin.generation,
                "sha256": files.sha256(data),
                "classes": {name: earlier.get(name, "") for name in part.classes},
            }
            owners |= dict.fromkeys((key, *part.origin.merged), key)
            counted[key] = list(part.classes)
        conflicts = self._name_classes()
        self._index["round"] += 1
        self._save()
        report = Round(
            number=self._index["round"],
            counted=sorted(counted),
            unchanged=sorted(found["unchanged"]),
            repeated=list(found["repeated"]),
            refused=found["refused"],
            failed=found["failed"],
            late=list(found["late"]),
            conflicts=conflicts,
            bytes=[min(sizes), int(np.median(sizes)), max(sizes)] if sizes else [],
            seconds=round(time.monotonic() - began, 2),
        )
        files.write_json(self.folder / f"round-{report.number:06d}.json", report.to_dict())
        return report

    def leave_out(self, installation: str) -> None:
        """Take a device out: its images no longer count, its sums are deleted, and later answers are refused.

        Raises:
            InputError: There is no such device.
        """
        if installation not in self._index["devices"]:
            raise InputError(
                f"no device '{installation}' is in the ledger {self.folder}; it has: "
                f"{', '.join(self.devices) or 'none'}"
            )
        del self._index["devices"][installation]
        self._index["left_out"].append(installation)
        self._save()
        self._path(installation).unlink(missing_ok=True)

    def issue(self, output: Path, key: Path | None = None, limits: Limits | None = None) -> Issued:
        """Write a bundle with everything in the ledger, which every device of the fleet can install.

        Args:
            output: File to write; its stem becomes the name of the bundle.
            key: Private key that signs it; None: unsigned.
            limits: Limits on forgetting the classes of the common bundle; None for the defaults.

        Raises:
            InputError: Nothing was learned, or there is no such key.
            GateRefusedError: The classes of the common bundle would be forgotten more than that.
        """
        began, sign = time.monotonic(), None
        if not self.devices:
            raise InputError("no device has learned anything since the common bundle; nothing was written")
        if key is not None:
            from ssd_edge.bundle import signing

            sign = signing.signer(key)
        files.check_output(output)
        merged = contribution.total(self.state, self._parts())
        state, retention, warnings = merged.finished(limits)
        contents, state = state.verified_contents()
        manifest = {
            **self.base.manifest,
            "name": output.stem[: bundles.MAX_TITLE_LENGTH],
            "created": utc_now(),
            "release": self.base.manifest["release"] + len(self._index["issued"]) + 1,
            "classes": state.registry.names,
            "metrics": {},  # they were measured before
            "fleet": {"bundle_sha256": self.base.sha256, "devices": len(self.devices)},
        }
        manifest.pop("device", None)
        probe = answered_probe(state.probe, len(state.registry), state.scores)
        text = card.amend(state.card.decode(), state.registry, [f"added what {len(self.devices)} devices have learned"])
        entries = {role: contents[path] for role, path in bundles.ROLES.items() if path in contents}
        entries |= {"backbone": self.base.read("backbone"), "probe": probe, "card": text.encode()}
        packed = bundles.pack(manifest, {bundles.ROLES[role]: (role, data) for role, data in entries.items()}, sign)
        opened = bundles.parse(packed, allow_control_flow=True)
        self._index["issued"].append(opened.sha256)
        self._save()  # first: what is learned from this bundle on belongs to the fleet
        bundles.write(output, packed)
        return Issued(
            bundle=str(output),
            bytes=len(packed),
            sha256=opened.sha256,
            release=manifest["release"],
            signed_by=opened.signature.key if opened.signature else None,
            devices=len(self.devices),
            classes={entry.name: entry.images for entry in state.registry.entries},
            old_classes=retention.to_dict(),
            warnings=warnings,
            seconds=round(time.monotonic() - began, 2),
        )

    def _path(self, installation: str) -> Path:
        return self.folder / f"{installation}.safetensors"

    def _save(self) -> None:
        files.write_json(self.folder / INDEX, self._index)

    def _contributions(self) -> Iterator[tuple[str, Contribution]]:
        """Yield the installation ids in the ledger, each with its sums, which were checked when they came."""
        for key in self.devices:
            yield key, Contribution.restored(*files.read_tensors(self._path(key)))

    def _parts(self) -> Iterator[tuple[Contribution, Mapping[str, str]]]:
        """Yield all sums in the ledger, each with the names under which its classes count."""
        for key, part in self._contributions():
            names = self._index["devices"][key]["classes"]
            yield part, {name: names.get(name) or name for name in part.classes}

    def _check_origin(self, part: Contribution, owners: Mapping[str, str]) -> None:
        """Check that a device belongs to the fleet, and that nothing it has learned counts already.

        Raises:
            InputError: It does not, or something does.
        """
        origin = part.origin
        if origin.base not in (self.base.sha256, *self._index["issued"]):
            raise InputError(f"it started from the bundle {origin.base[:12]}…, which is not one of this fleet")
        if origin.backbone != self.base.manifest["backbone"]["sha256"]:
            raise InputError("it has another backbone than the common bundle")
        if left := {origin.installation, *origin.merged} & set(self._index["left_out"]):
            raise InputError(f"installation {', '.join(sorted(left))} was left out")
        for one in (origin.installation, *origin.merged):
            if owners.get(one, origin.installation) != origin.installation:
                raise InputError(f"what was learned in installation {one} counts already, with that of {owners[one]}")

    def _name_classes(self) -> list[Conflict]:
        """Decide under which names classes count that have none yet; return the conflicts of all devices."""
        devices, base = self._index["devices"], self.state.statistics
        scatter, freedom = base.scatter_within(), base.degrees_of_freedom
        taught: dict[str, list[_Taught]] = defaultdict(list)
        for row, name in enumerate(self.state.registry.names):
            taught[name].append(_Taught("", name, base.sums[row], float(base.counts[row])))
        for key, part in self._contributions():
            own = ClassStatistics.unchecked(dict(part.embeddings))
            scatter, freedom = scatter + own.scatter_within(), freedom + own.degrees_of_freedom
            for row, name in enumerate(part.classes):
                called = devices[key]["classes"][name]
                taught[name].append(_Taught(key, called, own.sums[row], float(own.counts[row])))
        yardstick, used = Yardstick.of(scatter, freedom, _means(taught.values())), set(taught)
        used |= {called for entry in devices.values() for called in entry["classes"].values()}
        for name, parts in sorted(taught.items()):
            new = [one for one in parts if not one.called]
            known: dict[str, list[_Taught]] = defaultdict(list)
            for one in parts:
                if one.called:
                    known[one.called].append(one)
            names = list(known)
            groups = group(yardstick, _means(known.values()), _means([one] for one in new)) if new else []
            for one, number in zip(new, groups, strict=True):
                while number >= len(names):
                    names.append(name if name not in names else _another(name, {*names, *used}))
                devices[one.device]["classes"][name] = names[number]
        conflicts: dict[tuple[str, str], list[str]] = defaultdict(list)
        for key, entry in devices.items():
            for name, called_as in entry["classes"].items():
                if called_as != name:
                    conflicts[name, called_as].append(key)
        return [Conflict(name, called_as, sorted(keys)) for (name, called_as), keys in sorted(conflicts.items())]


@dataclasses.dataclass(frozen=True)
class _Taught:
    """Images to which one device, or the common bundle, gives a name.

    Attributes:
        device: Its installation id; empty for the bundle.
        called: Name under which it counts; empty if that is to be decided.
        sums: Sum of the embeddings, float64 ``(D,)``.
        count: Number of images.
    """

    device: str
    called: str
    sums: Tensor
    count: float


def _means(groups: Iterable[Iterable[_Taught]]) -> Means:
    """Return the mean of each group, and how many images it is of."""
    parts = [list(one) for one in groups]
    counts = [sum(part.count for part in one) for one in parts]
    sums = [torch.stack([part.sums for part in one]).sum(0) / count for one, count in zip(parts, counts, strict=True)]
    return Means(torch.stack(sums) if sums else torch.zeros(0, 1).double(), torch.tensor(counts, dtype=torch.float64))


def _another(name: str, taken: Collection[str]) -> str:
    """Return a name that is not taken for what other devices mean by `name`."""
    for number in itertools.count(2):
        suffix = f" ({number})"
        if (free := name[: MAX_NAME_LENGTH - len(suffix)] + suffix) not in taken:
            return free
    raise AssertionError


def exported(path: Path, bases: Mapping[str, DeviceState]) -> Contribution:
    """Return what a device has learned, from a bundle that it has exported.

    Args:
        path: The bundle.
        bases: States of the bundles that devices of the fleet install, by their digests.

    Raises:
        InputError: It started from another bundle, or as `contribution.since`.
        BundleRefusedError: It is damaged.
    """
    opened = bundles.read(path, allow_control_flow=True)  # its backbone is not run
    origin = Origin.of(opened.manifest)
    if origin.base not in bases:
        raise InputError(
            f"that device started from the bundle {origin.base[:12]}…, which is neither the common one nor one that "
            "was named as issued by this fleet"
        )
    return contribution.since(DeviceState.of_bundle(opened), bases[origin.base], origin)
