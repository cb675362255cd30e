"""Sums over what a device has learned since its bundle, and the state of one device that had learned what many have.

Sums add up exactly. As in `exchange`, nothing is averaged, and the learner is solved once. What a device sends is not
believed: `parse` checks every number before anything is added.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from device_runtime.learning.edit import estimate_cost
from device_runtime.learning.exchange import Origin, check_base_classes, installed_state
from device_runtime.learning.guard import Limits
from device_runtime.learning.state import DeviceState, copy_learner
from device_runtime.results import Retention
from device_runtime.store.generations import Generations
from ssd_edge.classes import ClassRegistry, normalise_name
from ssd_edge.errors import BundleRefusedError, InputError
from ssd_edge.learners.base import LARGEST_COUNT, Learner, TensorSpec, check_state
from ssd_edge.learners.calibration import TEMPERATURES
from ssd_edge.learners.closed_form.linear import statistics_schema
from ssd_edge.learners.closed_form.sums import ClassStatistics
from ssd_edge.learners.unknown import CLOSEST

ANSWERS = {
    "scores": TensorSpec(
        ("C", 3), "float64", "number, sum and sum of squares of the scores of held-out images, see `Rejector`",
        least=-200 * LARGEST_COUNT, most=200 * LARGEST_COUNT,
    ),
    "held_out": TensorSpec(
        ("C", 3), "float64", "held-out images: tested, nearest to the class, accepted",
        least=0, most=LARGEST_COUNT, whole=True,
    ),
    "promised": TensorSpec(
        ("C", len(TEMPERATURES)), "float64", "summed probabilities of the answers to them, at fixed temperatures",
        least=0, most=LARGEST_COUNT,
    ),
}  # fmt: skip
LEARNER, STATISTICS = "learner.", "statistics."
_INSTALLATION, _SHA256 = re.compile("[0-9a-f]{16}"), re.compile("[0-9a-f]{64}")
LEAST_SCORE, MOST_SCORE = -math.log(2), -math.log(CLOSEST)  # `strength` of cosines of −1 and 1
MOST_CLASSES = 10_000  # that one device has taught


@dataclasses.dataclass(frozen=True)
class Contribution:
    """Sums over the images that a device has learned since its bundle was installed. Immutable.

    Attributes:
        origin: Which state they come from.
        classes: Names of the C classes that it has taught; a class of the bundle has the name that it has there.
        learner: `Learner.sums_since` of the learner, with these C rows.
        statistics: The same of class statistics that the learner does not hold; None if it holds them.
        answers: Tensors of `ANSWERS` about the images that were held out.
    """

    origin: Origin
    classes: tuple[str, ...]
    learner: Mapping[str, Tensor]
    statistics: Mapping[str, Tensor] | None
    answers: Mapping[str, Tensor]

    @property
    def images(self) -> list[int]:
        """Number of images of each class."""
        return [int(count) for count in self.learner["counts"]]

    @property
    def embeddings(self) -> Mapping[str, Tensor]:
        """Sums over the embeddings themselves: ``counts`` ``(C,)``, ``sums`` ``(C, D)`` and ``second``."""
        return self.learner if self.statistics is None else self.statistics

    @property
    def bytes(self) -> int:
        """Size of the tensors in bytes."""
        return sum(array.nbytes for array in self.to_arrays().values())

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Return all tensors as named arrays; with `about`, `parse` is the inverse."""
        parts = {LEARNER: self.learner, STATISTICS: self.statistics or {}, "": self.answers}
        return {f"{prefix}{name}": tensor.numpy() for prefix, part in parts.items() for name, tensor in part.items()}

    def about(self) -> dict[str, Any]:
        """Return everything but the tensors, as JSON values."""
        return {**dataclasses.asdict(self.origin), "classes": list(self.classes)}

    @classmethod
    def restored(cls, arrays: Mapping[str, np.ndarray], about: Mapping[str, Any]) -> Contribution:
        """Return a contribution from `to_arrays` and `about`, without checking it: see `parse`."""
        tensors = {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}

        def part(prefix: str) -> dict[str, Tensor]:
            return {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}

        answers = {name: tensor for name, tensor in tensors.items() if not name.startswith((LEARNER, STATISTICS))}
        facts = {**about, "merged": tuple(about["merged"])}
        classes = tuple(facts.pop("classes"))
        return cls(Origin(**facts), classes, part(LEARNER), part(STATISTICS) or None, answers)

    def without_few(self, least: int, base: DeviceState) -> Contribution:
        """Return the contribution without classes of fewer than `least` images.

        Args:
            least: Smallest number of images of a class that is sent.
            base: State of the bundle.

        Raises:
            InputError: A class has fewer, but products are summed over all classes, so that it cannot be left out.
        """
        few = [name for name, images in zip(self.classes, self.images, strict=True) if images < least]
        if not few:
            return self
        schemas = _schemas(base)
        if not all(spec.shape[0] == "C" for schema in schemas.values() for spec in schema.values()):
            raise InputError(
                f"nothing is sent, because {', '.join(few)} has fewer than {least} images, and one sum of products "
                "holds those of all classes; take more images of it (with learner.per_class=true, the class alone "
                "would be left out)"
            )
        kept = torch.tensor([row for row, name in enumerate(self.classes) if name not in few], dtype=torch.int64)
        return dataclasses.replace(
            self,
            classes=tuple(self.classes[row] for row in kept),
            learner={name: tensor[kept] for name, tensor in self.learner.items()},
            statistics=None if self.statistics is None else {n: tensor[kept] for n, tensor in self.statistics.items()},
            answers={name: tensor[kept] for name, tensor in self.answers.items()},
        )


def of_store(store: Generations) -> tuple[Contribution, DeviceState]:
    """Return what the current generation of a device has learned, and the state of its bundle; raises as `since`."""
    generation = store.current()
    state = DeviceState.read(generation.read)
    base = installed_state(store, state)
    facts = state.bundle
    origin = Origin(
        facts.installation,
        facts.merged,
        facts.bundle_sha256,
        facts.manifest["backbone"]["sha256"],
        generation.number,
    )
    return since(state, base, origin), base


def since(state: DeviceState, base: DeviceState, origin: Origin) -> Contribution:
    """Return what a device has learned since its bundle.

    Args:
        state: Its state.
        base: State of the bundle.
        origin: Which state it is.

    Raises:
        InputError: It has forgotten a class of the bundle, or one of its own approximately, so that what is left are
            not the sums of images; or its learner does not keep sums.
    """
    check_base_classes(base.registry, state.registry, "on this device")
    here = {entry.id: row for row, entry in enumerate(state.registry.entries)}
    to_here = torch.tensor([here[entry.id] for entry in base.registry.entries], dtype=torch.int64)
    first = {entry.id: row for row, entry in enumerate(base.registry.entries)}
    rows, earlier, names = [], [], []
    for row, entry in enumerate(state.registry.entries):
        old = first.get(entry.id)
        if entry.images > (0 if old is None else base.registry.entries[old].images):
            rows.append(row)
            earlier.append(-1 if old is None else old)
            names.append(entry.name if old is None else base.registry.names[old])
    kept, before = torch.tensor(rows, dtype=torch.int64), torch.tensor(earlier, dtype=torch.int64)
    sums = {LEARNER: state.learner.sums_since(base.learner, to_here)}
    if state.counted is not None:
        counted = state.counted.copy()
        counted.subtract(base.statistics, to_here)
        sums[STATISTICS] = counted.state()
    schemas = _schemas(base)
    chosen = {
        prefix: {
            name: tensor[kept] if schemas[prefix][name].shape[0] == "C" else tensor for name, tensor in part.items()
        }
        for prefix, part in sums.items()
    }
    answers = _answers_since(state, base, kept, before)
    found = Contribution(origin, tuple(names), chosen[LEARNER], chosen.get(STATISTICS), answers)
    try:
        _check_sums(found, base.learner, base.counted)
    except BundleRefusedError as error:
        raise InputError(
            "a class was forgotten on that device, but not exactly, so that what it has learned since its bundle is no "
            "longer known; install a bundle and teach it again"
        ) from error
    return found


def parse(arrays: Mapping[str, np.ndarray], about: Any, known: DeviceState) -> Contribution:
    """Return a contribution from `Contribution.to_arrays` and `Contribution.about`, after checking everything in it.

    Args:
        arrays: The arrays.
        about: The rest, from JSON.
        known: State of the same lineage that has learned at least what the bundle of the device had.

    Raises:
        BundleRefusedError: Something is missing, malformed, not finite, or not the sums of any images.
    """
    try:
        found = Contribution.restored(arrays, about)
        origin, classes = found.origin, found.classes
        ids = [(_INSTALLATION, one) for one in (origin.installation, *origin.merged)]
        ids += [(_SHA256, one) for one in (origin.base, origin.backbone)]
        if any(type(one) is not str or not shape.fullmatch(one) for shape, one in ids):
            raise ValueError("an id is malformed")
        if type(origin.generation) is not int or origin.generation < 1:
            raise ValueError(f"the generation is {origin.generation!r:.20}")
        if len(classes) > MOST_CLASSES or [normalise_name(name) for name in classes] != list(dict.fromkeys(classes)):
            raise ValueError("the class names are too many, repeat, or are not in normal form")
    except (KeyError, TypeError, ValueError, AttributeError, InputError) as error:
        raise BundleRefusedError(f"it does not say correctly what it is ({error})") from error
    schemas = _schemas(known)
    if found.statistics is not None and STATISTICS not in schemas:
        raise BundleRefusedError("it has class statistics beside those of its learner")
    for prefix, schema in schemas.items():
        part = found.learner if prefix == LEARNER else found.statistics or {}
        check_state(dict(part), schema, {"D": known.bundle.dim, "C": len(classes)}, prefix.rstrip("."))
    check_state(dict(found.answers), ANSWERS, {"C": len(classes)}, "held-out results")
    _check_answers(found.answers, found.learner["counts"])
    _check_sums(found, known.learner, known.counted)
    return found


def total(base: DeviceState, parts: Iterable[tuple[Contribution, Mapping[str, str]]]) -> Total:
    """Return a state with the sums of contributions, solved once.

    Args:
        base: State of the bundle that the first of the devices had installed.
        parts: Contributions, each with the names under which its classes are counted, where these differ.
    """
    learner = copy_learner(base.learner)
    counted = None if base.counted is None else base.counted.copy()
    found = Total(base, base.registry, learner, counted, defaultdict(list))

    def added() -> Iterator[tuple[Mapping[str, Tensor], Tensor]]:
        for part, names in parts:
            rows = found.count(part, names)
            if part.classes:
                yield part.learner, rows

    learner.add(added())
    return found


@dataclasses.dataclass
class Total:
    """Sums of a bundle and of contributions.

    Attributes:
        base: State of the bundle.
        registry: The classes of all.
        learner: The learner.
        counted: Class statistics that it does not hold.
        taught: Row → of each contribution its answers about the class, and the mean of its images.
    """

    base: DeviceState
    registry: ClassRegistry
    learner: Learner
    counted: ClassStatistics | None
    taught: dict[int, list[tuple[dict[str, Tensor], Tensor]]]

    @property
    def statistics(self) -> ClassStatistics:
        """Statistics of the embeddings of each class."""
        return self.state.statistics

    @property
    def state(self) -> DeviceState:
        """The state, with thresholds and held-out results of the bundle's classes only."""
        return self.base.replace(registry=self.registry, learner=self.learner, counted=self.counted)

    def count(self, part: Contribution, names: Mapping[str, str]) -> Tensor:
        """Count a contribution everywhere but in the learner; return its rows, int64 ``(C,)``."""
        rows = []
        embeddings, first = part.embeddings, self.base.statistics
        for number, (name, images) in enumerate(zip(part.classes, part.images, strict=True)):
            name = names.get(name, name)
            row = self.registry.row(name)
            if row is None:
                self.registry, row = self.registry.add(name, "device", images), len(self.registry)
            else:
                self.registry = self.registry.taught(name, images)
            rows.append(row)
            # A class of the bundle was tested against the mean of all images that the device knew.
            count, sums = embeddings["counts"][number], embeddings["sums"][number].double()
            if row < len(self.base.registry):
                count, sums = count + first.counts[row], sums + first.sums[row]
            answers = {key: tensor[number] for key, tensor in part.answers.items()}
            self.taught[row].append((answers, sums / count))
        to_here = torch.tensor(rows, dtype=torch.int64)
        if self.counted is not None and part.statistics is not None:
            self.counted.merge(ClassStatistics.unchecked(dict(part.statistics)), to_here)
        return to_here

    def finished(self, limits: Limits | None) -> tuple[DeviceState, Retention, list[str]]:
        """Return the state with thresholds for ``unknown`` and held-out results, its estimated cost, and warnings.

        Args:
            limits: Limits on forgetting the classes of the bundle; None for the defaults.

        Raises:
            GateRefusedError: The classes of the bundle would be forgotten more than that.
        """
        state, base, taught = self.state, self.base, dict(sorted(self.taught.items()))
        retention, warnings, record = estimate_cost(base, self.learner, base.statistics, limits)
        scores = {row: [(answers["scores"], mean) for answers, mean in parts] for row, parts in taught.items()}
        results = {row: (_summed("held_out", parts), _summed("promised", parts)) for row, parts in taught.items()}
        rejector = base.rejector.gathered(scores, state.statistics)
        record = record.gathered(self.learner, state.statistics, results)
        finished = state.replace(rejector=rejector, record=record)
        finished.check()
        return finished, retention, warnings


def _summed(key: str, parts: Iterable[tuple[Mapping[str, Tensor], Tensor]]) -> Tensor:
    return torch.stack([answers[key] for answers, _ in parts]).sum(0)


def _schemas(state: DeviceState) -> dict[str, dict[str, TensorSpec]]:
    """Return the tensors that a contribution to a state has, by prefix."""
    schemas = {LEARNER: state.learner.sums_schema()}
    if state.counted is not None:
        schemas[STATISTICS] = statistics_schema(state.bundle.dim, per_class=False)
    return schemas


def _answers_since(state: DeviceState, base: DeviceState, rows: Tensor, before: Tensor) -> dict[str, Tensor]:
    """Return the tensors of `ANSWERS` about the rows of some classes.

    Args:
        state: State of the device.
        base: State of its bundle.
        rows: Rows in `state`, int64 ``(C,)``.
        before: Their rows in `base`, negative for a class that it does not have, int64 ``(C,)``.
    """

    def more(now: Tensor, earlier: Tensor) -> Tensor:
        return now[rows] - _at(earlier, before)

    count, total, squares = more(state.rejector.scores, base.rejector.scores).unbind(1)
    count = count.clamp_min(0)
    # The scores of the bundle's images were turned with the mean of the class, so a difference may be slightly off.
    total = total.maximum(LEAST_SCORE * count).minimum(MOST_SCORE * count)
    squares = squares.maximum(total.square() / count.clamp_min(1)).minimum(MOST_SCORE**2 * count)
    names = ("tested", "nearest", "right")
    tests = torch.stack([more(getattr(state.record, name), getattr(base.record, name)) for name in names], 1)
    tests = tests.clamp_min(0).cummin(1).values
    promised = more(state.record.promised, base.record.promised).clamp_min(0).minimum(tests[:, :1])
    return {"scores": torch.stack([count, total, squares], 1), "held_out": tests, "promised": promised}


def _at(tensor: Tensor, rows: Tensor) -> Tensor:
    """Return some rows of a tensor, zero for a negative row."""
    found = tensor.new_zeros(len(rows), *tensor.shape[1:])
    known = rows >= 0
    found[known] = tensor[rows[known]]
    return found


def _check_sums(part: Contribution, learner: Learner, counted: ClassStatistics | None) -> None:
    """Check that a contribution can be the sums of images.

    Args:
        part: The contribution.
        learner: Learner that has learned at least what the bundle of the device had.
        counted: The same of class statistics beside it.

    Raises:
        BundleRefusedError: It cannot.
    """
    if not part.classes:
        return
    if bool((part.learner["counts"] < 1).any()):
        raise BundleRefusedError("a class in it has no images")
    learner.check_part(part.learner)
    if part.statistics is not None and counted is not None:
        if not torch.equal(part.statistics["counts"], part.learner["counts"]):
            raise BundleRefusedError("its learner and its class statistics count other images")
        ClassStatistics.unchecked(dict(part.statistics)).check(counted)


def _check_answers(answers: Mapping[str, Tensor], images: Tensor) -> None:
    """Check that held-out results do not contradict each other, or the numbers of images ``(C,)``.

    Raises:
        BundleRefusedError: They do.
    """
    tested, (count, total, squares) = answers["held_out"], answers["scores"].unbind(1)
    possible = (tested[:, 1:] <= tested[:, :-1]).all(1) & (answers["promised"] <= tested[:, :1] + 1e-6).all(1)
    possible &= (
        (tested[:, 0] <= images)
        & (count <= images)
        & (count >= 0)
        & (count == count.round())
        & (squares <= (MOST_SCORE**2 + 1e-6) * count)
    )
    possible &= (total >= (LEAST_SCORE - 1e-6) * count) & (total <= (MOST_SCORE + 1e-6) * count)
    if not bool(possible.all()):
        raise BundleRefusedError("its held-out results contradict each other")
