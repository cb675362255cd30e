"""Base class of learners, the tasks they learn, and the schema of their state.

A learner works on standardised embeddings and class rows (0, 1, …); class names live in the class registry. Task
boundaries are known during learning but never during prediction. No tensor of the state grows with the number of
samples: `Learner.schema` lists every tensor with its shape and the reason for storing it.
"""

from __future__ import annotations

import abc
import copy
import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from ssd_edge.answers.graph import HeadGraph
from ssd_edge.errors import BundleRefusedError, InputError
from ssd_edge.learners.priors import Priors

if TYPE_CHECKING:
    from ssd_edge.learners.closed_form.sums import ClassStatistics

# Callback with the fraction of the task that is done, 0 to 1. If it returns True, a learner that trains for several
# epochs stops after the current one and finishes the task normally.
Progress = Callable[[float], bool | None]

DTYPES = {
    "float16": torch.float16,
    "float32": torch.float32,
    "float64": torch.float64,
    "int64": torch.int64,
    "uint8": torch.uint8,
    "uint32": torch.uint32,
}
# Limit of any number in a state: such a number is finite in float32, and its square is in float64.
LARGEST = 1e30
LARGEST_COUNT = 2.0**53  # whole numbers up to here are exact in float64
# Limit of random numbers that follow from a setting and the seed and are not part of the state: 256 MiB.
MOST_DRAWN = 2**26


@dataclasses.dataclass(frozen=True)
class Task:
    """Labelled embeddings that arrive together.

    Attributes:
        embeddings: standardised embeddings, float32 ``(N, D)``.
        labels: class rows, int64 ``(N,)``.
        second: embeddings of the second views of the images, ``(N, D)``; None without. Learners that cannot use them
            ignore them.
    """

    embeddings: Tensor
    labels: Tensor
    second: Tensor | None = None

    def __post_init__(self) -> None:
        """Check shapes, types and values.

        Raises:
            InputError: the shapes or dtypes are wrong, there are no samples, a row is negative, or an embedding is
                not finite.
        """
        if self.embeddings.ndim != 2 or self.labels.shape != self.embeddings.shape[:1]:
            raise InputError(
                f"a task needs embeddings of shape (N, D) and labels of shape (N,), but got "
                f"{tuple(self.embeddings.shape)} and {tuple(self.labels.shape)}"
            )
        if (self.embeddings.dtype, self.labels.dtype) != (torch.float32, torch.int64):
            raise InputError(
                "a task needs embeddings of dtype torch.float32 and labels of dtype torch.int64, but got "
                f"{self.embeddings.dtype} and {self.labels.dtype}"
            )
        if not len(self.labels):
            raise InputError("a task must contain at least one sample")
        if int(self.labels.min()) < 0:
            raise InputError(f"labels must be class rows of at least 0, but the smallest is {int(self.labels.min())}")
        second = self.embeddings if self.second is None else self.second
        if (second.shape, second.dtype) != (self.embeddings.shape, self.embeddings.dtype):
            raise InputError(
                f"second views need embeddings like those of the images, {tuple(self.embeddings.shape)} and "
                f"{self.embeddings.dtype}, but got {tuple(second.shape)} and {second.dtype}"
            )
        if not bool(torch.isfinite(self.embeddings).all() and torch.isfinite(second).all()):
            raise InputError("an embedding contains NaN or infinity; check the backbone and the images")

    @property
    def rows(self) -> Tensor:
        """Distinct class rows, ascending."""
        rows: Tensor = torch.unique(self.labels)
        return rows

    def of(self, chosen: Tensor) -> Task:
        """Return the chosen samples; a mask, bool ``(N,)``, or indices."""
        second = None if self.second is None else self.second[chosen]
        return Task(self.embeddings[chosen], self.labels[chosen], second)


# Symbols for axes that are indexed by class row: C all rows, S rows up to the last one learned.
CLASS_AXES = frozenset("CS")


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """Description of one tensor of a learner's state.

    Attributes:
        shape: sizes or symbols; a symbol stands for the same size everywhere in a state.
        dtype: key of `DTYPES`.
        reason: why the tensor is stored.
        shipped: True for a constant that came with the backbone. It is stored so that a state is self-contained, but
            does not count as learned (`Learner.memory_bytes`).
        least: smallest value allowed.
        most: largest value allowed.
        whole: True if only whole numbers are allowed.
        adds: True for sums over samples, which add up when learners are merged.
    """

    shape: tuple[str | int, ...]
    dtype: str
    reason: str
    shipped: bool = False
    least: float = -LARGEST
    most: float = LARGEST
    whole: bool = False
    adds: bool = False


BASE_SCHEMA = {
    "seen": TensorSpec(("S",), "uint8", "1 for each learned class", most=1),
    "tasks_learned": TensorSpec(
        (1,), "int64", "number of tasks learned; selects the random numbers", least=0, most=LARGEST_COUNT
    ),
}


class Learner(abc.ABC):
    """Base class of all learners.

    A subclass declares what it is in class variables; `learners.registry` derives every list of learners from them.

    Attributes:
        name: ``learner.name`` in a configuration.
        display: name in tables and reports. An instance whose settings change the method may override it.
        family: how it learns: solved from sufficient statistics, or trained by gradient descent.
        panel: True if a run with ``run.panel`` compares it as a head on the same embeddings.
        baseline: True if a run with ``run.baselines`` trains it beside the main learner.
        candidate: True if ``learner.name=auto`` tries it.
        replay: True if its state stores samples of earlier tasks; reports and cards say so.
        second_views: True if it can learn from a second view of each image, with the setting `second_view`.
        removal: how completely `remove` takes out a class. ``exact``: as if it had never been taught; ``with
            per_class``: exact if ``learner.per_class`` is set, otherwise the pooled second moment keeps the class's
            share of the within-class covariance; ``output only``: the class is never predicted again, but shared
            weights keep what they learned from it.
        Settings: frozen dataclass of its settings.

    Args:
        dim: dimension D of the embeddings.
        settings: instance of `Settings`.
        priors: statistics from pretraining; may be empty. None: no initial state, so that nothing is allocated before
            `load_state_dict` has checked what it restores; it must be called next.
        seed: random seed. Task t draws from (seed, t) alone, so a resumed run is bit-identical.
        device: where large tensors are stored.
    """

    name: ClassVar[str]
    display: str
    family: ClassVar[Literal["closed form", "gradient"]]
    panel: ClassVar[bool] = False
    baseline: ClassVar[bool] = False
    candidate: ClassVar[bool] = False
    replay: ClassVar[bool] = False
    second_views: ClassVar[bool] = False
    removal: ClassVar[Literal["exact", "with per_class", "output only"]]
    Settings: ClassVar[type]

    def __init__(
        self, dim: int, settings: Any, priors: Priors | None, seed: int = 0, device: str | torch.device = "cpu"
    ) -> None:
        self.dim = dim
        self.settings = settings
        self.seed = seed
        self.device = torch.device(device)
        self.seen = torch.zeros(0, dtype=torch.uint8)  # (S,), 1 for each learned class
        self.tasks_learned = 0
        self.note = ""  # set if the settings ask for something the priors lack; runs print it
        self._configure()
        if priors is not None:
            self._start(priors)

    def _configure(self) -> None:  # noqa: B027  some need nothing
        """Set and check what follows from dimension and settings alone; allocate nothing of their size."""

    @abc.abstractmethod
    def _start(self, priors: Priors) -> None:
        """Create the state before the first task."""

    @abc.abstractmethod
    def _learn(self, task: Task, progress: Progress) -> dict[str, float]:
        """Learn a validated task; `learn` updates `seen` and `tasks_learned`."""

    @abc.abstractmethod
    def scores(self, embeddings: Tensor) -> Tensor:
        """Return scores of embeddings ``(N, D)``: float32 ``(N, C)`` on the CPU, higher is more likely."""

    @abc.abstractmethod
    def schema(self) -> dict[str, TensorSpec]:
        """Return the specification of every tensor of the state except those of `BASE_SCHEMA`."""

    @abc.abstractmethod
    def _tensors(self) -> dict[str, Tensor]:
        """Return the tensors of the state, as `schema` describes them."""

    @abc.abstractmethod
    def _load(self, tensors: dict[str, Tensor]) -> None:
        """Restore the state from tensors that match `schema`."""

    def _check(self, state: dict[str, Tensor]) -> None:  # noqa: B027  tensors of some are independent
        """Check that tensors which match `schema` also match each other.

        Args:
            state: all tensors, including those of `BASE_SCHEMA`.

        Raises:
            BundleRefusedError: they do not.
        """

    def write_head(self, graph: HeadGraph, x: str) -> str | None:
        """Write the operators that compute `scores` into a graph: that of a device, or of an ONNX file.

        Args:
            graph: to write into.
            x: name of the embeddings ``(N, D)``, N ≥ 1.

        Returns:
            Name of the scores ``(N, graph.classes)``; None if they cannot be written as a graph.

        Raises:
            InputError: the settings or the state of this learner rule out a graph.
        """
        return None

    @property
    def wants_second_view(self) -> bool:
        """True if the learner learns from a second view of each image, see `Task`."""
        return self.second_views and bool(self.settings.second_view)

    def expect(self, classes: int) -> None:  # noqa: B027  most learners ignore it
        """Announce the number of classes of the stream; a learner must also accept unannounced classes."""

    def learn(self, task: Task, progress: Progress | None = None) -> dict[str, float]:
        """Learn one task from its samples alone.

        Args:
            task: embeddings and class rows; new rows are new classes.
            progress: callback, see `Progress`.

        Returns:
            Measurements such as losses; the keys depend on the learner. Learners with epochs report ``epochs``.

        Raises:
            InputError: the embeddings have the wrong dimension, or training diverged.
        """
        self._check_dim(task.embeddings)
        classes = int(task.labels.max()) + 1
        measured = self._learn(task, progress or (lambda share: None))
        if classes > len(self.seen):
            self.seen = torch.cat([self.seen, self.seen.new_zeros(classes - len(self.seen))])
        self.seen[task.rows.cpu()] = 1
        self.tasks_learned += 1
        return measured

    def sums_of(self, task: Task) -> ClassStatistics | None:
        """Return the sums over some samples, without learning them; `add` learns their `state`. None: it has no sums.

        Args:
            task: samples and their class rows.
        """
        return None

    def held_out_scores(self, task: Task, part: Tensor) -> Tensor | None:
        """Return scores of samples just learned, each as if those of its part of the task had not been.

        Args:
            task: The last task learned.
            part: Number of the part of each sample, int64 ``(N,)``; negative: it is never held out.

        Returns:
            ``(N, C)``, −∞ for samples that are never held out; None if telling would take as long as learning again.
        """
        return None

    def remove(self, row: int, approximately: bool = False) -> bool:
        """Remove a class as if it had never been learned. The other classes keep their rows.

        Args:
            row: class row.
            approximately: accept an approximate removal if an exact one is impossible, see `removal`.

        Returns:
            True if the removal was exact. Always True without `approximately`.

        Raises:
            InputError: the class has not been learned, or it cannot be removed exactly.
        """
        self._check_learned(row, "removed")
        exact = self._remove(row, approximately)
        self.seen[row] = 0
        return exact

    def join(self, row: int, into: int) -> None:
        """Join one class into another, as if their samples had been learned as one class.

        Args:
            row: row of the class to join; it is no longer learned afterwards.
            into: row of the class that remains.

        Raises:
            InputError: a class has not been learned, both rows are the same, or this learner cannot join classes.
        """
        for each in (row, into):
            self._check_learned(each, "joined")
        if row == into:
            raise InputError(f"row {row} cannot be joined with itself; choose two different rows")
        self._join(row, into)
        self.seen[row] = 0

    def merge(
        self,
        other: Learner,
        rows: Tensor | None = None,
        base: Learner | None = None,
        base_rows: Tensor | None = None,
    ) -> None:
        """Merge another learner, as if this one had learned its samples too.

        Args:
            other: learner with the same settings; it is not changed.
            rows: int64 mapping from rows of `other` to rows of this learner; several may map to one. None: identity.
            base: common ancestor that both continued from, whose samples then count once; None: there is none. If this
                learner equals it, the result equals `other` bit for bit.
            base_rows: int64 mapping from rows of `base` to rows of this learner. None: identity.

        Raises:
            InputError: learners of this kind cannot be merged, they are incompatible, or this one has fewer samples of
                a class than `base`; it is unchanged then.
        """
        rows = self._check_compatible(other, rows, "merged")
        if base is not None:
            self._take(base, self._check_compatible(base, base_rows, "subtracted"))
        self._put(other, rows)
        self._refresh()

    def add(self, parts: Iterable[tuple[Mapping[str, Tensor], Tensor]]) -> None:
        """Add what other learners have learned since they had the state of this one, and solve once.

        Args:
            parts: for each of them its `sums_since`, checked with `holding`, and the int64 mapping from their rows to
                rows of this learner.
        """
        for sums, rows in parts:
            self._put(self.holding(sums), rows)
        self._refresh()

    def sums_since(self, base: Learner, base_rows: Tensor | None = None) -> dict[str, Tensor]:
        """Return the sums over the samples that were learned since a learner had the state of `base`.

        Args:
            base: learner that this one continued from.
            base_rows: int64 mapping from rows of `base` to rows of this learner. None: identity.

        Raises:
            InputError: as `subtract`.
        """
        rest = copy.deepcopy(self)
        rest._take(base, rest._check_compatible(base, base_rows, "subtracted"))  # not solved: it may be a few samples
        return {name: tensor for name, tensor in rest._tensors().items() if name in self.sums_schema()}

    def sums_schema(self) -> dict[str, TensorSpec]:
        """Return the part of `schema` that adds up when learners are merged."""
        return {name: spec for name, spec in self.schema().items() if spec.adds}

    def holding(self, sums: Mapping[str, Tensor]) -> Learner:
        """Return a learner of this kind with these sums alone. It can be added, but not asked.

        Args:
            sums: tensors of `sums_schema`, whose shapes and ranges have been checked.

        Raises:
            InputError: learners of this kind cannot be merged.
        """
        self._common()
        part = copy.copy(self)
        part._hold(dict(sums))
        part.seen, part.tasks_learned = (sums["counts"] > 0).byte(), 1
        return part

    def check_part(self, sums: Mapping[str, Tensor]) -> None:  # noqa: B027  counts and sums alone can be anything
        """Check the sums of `sums_since` of a learner that has learned no more than this one and the samples in them.

        Raises:
            BundleRefusedError: no samples have these sums, up to the rounding of the states that they came from.
        """

    def subtract(self, other: Learner, rows: Tensor | None = None) -> None:
        """Subtract another learner: the inverse of `merge`, up to rounding.

        Args:
            other: learner whose samples this one contains; it is not changed.
            rows: int64 mapping from rows of `other` to rows of this learner. None: identity.

        Raises:
            InputError: as `merge`, or this learner has fewer samples of a class than `other`; it is unchanged then.
        """
        self._take(other, self._check_compatible(other, rows, "subtracted"))
        self._refresh()

    def _put(self, other: Learner, rows: Tensor) -> None:
        """Add a compatible learner; `_refresh` must follow."""
        self._merge(other, rows)
        missing = int(rows.max()) + 1 - len(self.seen) if len(rows) else 0
        self.seen = torch.cat([self.seen, self.seen.new_zeros(max(missing, 0))])
        self.seen[rows[other.seen == 1]] = 1
        self.tasks_learned += other.tasks_learned

    def _take(self, other: Learner, rows: Tensor) -> None:
        """Subtract a compatible learner; `_refresh` must follow."""
        left = self._subtract(other, rows)
        self.seen[left == 0] = 0
        self.tasks_learned = max(self.tasks_learned - other.tasks_learned, 0)

    def _remove(self, row: int, approximately: bool) -> bool:
        raise InputError(
            f"{self.display} cannot remove a class exactly: its shared weights keep what they learned from it. Remove "
            "it approximately, which zeroes its output only"
        )

    def _join(self, row: int, into: int) -> None:
        raise InputError(
            f"{self.display} cannot join two classes: its shared weights mix what they learned from both. Remove one "
            "approximately and learn its images again as the other"
        )

    def _common(self) -> dict[str, Any]:
        """Return what two learners must share to be merged: description → tensor or plain value.

        Raises:
            InputError: learners of this kind cannot be merged.
        """
        raise InputError(f"{self.display} cannot be merged: weights trained separately do not add up")

    def _shared_settings(self) -> dict[str, Any]:
        """Return the part of `_common` that all mergeable learners need."""
        settings = dataclasses.asdict(self.settings)
        return {"the embedding dimension": self.dim, **{f"learner.{key}": value for key, value in settings.items()}}

    def _refresh(self) -> None:  # noqa: B027  most have nothing to solve
        """Solve again after `_merge` and `_subtract`."""

    def _hold(self, sums: dict[str, Tensor]) -> None:
        """Replace the sums by others. Required if `_common` is implemented and `_subtract` is possible."""
        raise NotImplementedError

    def _merge(self, other: Any, rows: Tensor) -> None:
        """Add the state of a compatible learner. Required if `_common` is implemented."""
        raise NotImplementedError

    def _subtract(self, other: Any, rows: Tensor) -> Tensor:
        """Subtract the state of a compatible learner; return the remaining samples per row ``(C,)``."""
        raise NotImplementedError

    def _check_learned(self, row: int, action: str) -> None:
        if not 0 <= row < len(self.seen) or not self.seen[row]:
            learned = ", ".join(map(str, self.seen.nonzero().flatten().tolist())) or "none"
            raise InputError(f"row {row} has not been learned and cannot be {action}; learned rows: {learned}")

    def _check_compatible(self, other: Learner, rows: Tensor | None, action: str) -> Tensor:
        """Check that `other` can be merged or subtracted; return the row mapping."""
        mine = self._common()
        if type(other) is not type(self):
            raise InputError(
                f"only learners of the same kind can be {action}, but these are {self.display} and {other.display}"
            )
        for description, value in other._common().items():
            if isinstance(value, Tensor):
                equal, values = torch.equal(value.cpu(), mine[description].cpu()), ""
            else:
                equal, values = value == mine[description], f" ({mine[description]} and {value})"
            if not equal:
                raise InputError(
                    f"learners that differ in {description}{values} cannot be {action}; build both with the same"
                )
        rows = torch.arange(len(other.seen)) if rows is None else rows
        if rows.dtype != torch.int64 or rows.shape != other.seen.shape or bool((rows < 0).any()):
            raise InputError(
                f"rows must map each of the {len(other.seen)} rows of the learner to be {action} to a row of at least "
                f"0, but is {rows.tolist()}"
            )
        return rows

    def renumber(self, tensors: dict[str, Tensor], rows: Tensor) -> None:  # noqa: B027  most store no row numbers
        """Update the tensors of a state that store row numbers or row counts, after rows were deleted.

        Args:
            tensors: the state; modified in place.
            rows: deleted rows, int64, ascending.
        """

    def predict(self, embeddings: Tensor) -> Tensor:
        """Return the learned class row with the highest score, int64 ``(N,)``, without knowing the task.

        Raises:
            InputError: the dimension is wrong, or no class has been learned.
        """
        self._check_dim(embeddings)
        if not bool(self.seen.any()):
            raise InputError("no class has been learned yet; learn one first")
        scores = self.scores(embeddings)[:, : len(self.seen)]
        return scores.masked_fill(self.seen[: scores.shape[1]] == 0, -torch.inf).argmax(1)

    def state_dict(self) -> dict[str, Tensor]:
        """Return copies of all tensors on the CPU: enough to continue learning elsewhere."""
        tensors = {**self._tensors(), "seen": self.seen, "tasks_learned": torch.tensor([self.tasks_learned])}
        return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore a state from `state_dict`, bit for bit.

        Nothing is allocated beyond a small multiple of the tensors before they are checked; afterwards, at most
        `MOST_DRAWN` numbers.

        Raises:
            BundleRefusedError: a tensor is missing or unknown, has the wrong shape, dtype or values, or contradicts
                another one.
        """
        sizes = check_state(state, {**BASE_SCHEMA, **self.schema()}, {"D": self.dim}, self.name)
        if sizes["S"] > sizes.get("C", sizes["S"]):
            raise BundleRefusedError(
                f"the state of '{self.name}' has {sizes['S']} learned rows, but outputs for {sizes['C']}; restore the "
                "file"
            )
        self._check(state)
        self.seen = state["seen"].clone()
        self.tasks_learned = int(state["tasks_learned"][0])
        self._load({name: tensor.clone() for name, tensor in state.items() if name not in BASE_SCHEMA})

    def constants(self) -> dict[str, Tensor]:
        """Return the tensors of the state that came with the backbone and never change."""
        shipped = {name for name, spec in self.schema().items() if spec.shipped}
        return {name: tensor for name, tensor in self._tensors().items() if name in shipped}

    def class_statistics(self) -> ClassStatistics | None:
        """Return the statistics of the embeddings of each class if they are part of the state, or else None.

        They are not a copy: they change with the learner, and must not be changed.
        """
        return None

    def memory_bytes(self) -> int:
        """Return the size of the state in bytes, without `constants`."""
        shipped = self.constants()
        learned = [tensor for name, tensor in self.state_dict().items() if name not in shipped]
        return sum(tensor.numel() * tensor.element_size() for tensor in learned)

    def generator(self, purpose: int = 0) -> torch.Generator:
        """Return a generator seeded by the seed, the number of tasks learned and `purpose` alone."""
        mixed = (self.seed * 1_000_003 + self.tasks_learned * 8_191 + purpose * 131) % (2**63 - 1)
        return torch.Generator().manual_seed(mixed)

    def _check_dim(self, embeddings: Tensor) -> None:
        if embeddings.ndim != 2 or embeddings.shape[1] != self.dim:
            raise InputError(
                f"this learner expects embeddings of shape (N, {self.dim}), but got {tuple(embeddings.shape)}; use the "
                "backbone that it was trained with"
            )


def check_unit(matrix: Tensor, rounding: float, what: str, or_shorter: bool = False) -> None:
    """Check that rows have unit length or are zero.

    Args:
        matrix: ``(r, n)``.
        rounding: largest difference of a length from 1.
        what: name for the message, plural.
        or_shorter: accept rows of any smaller length.

    Raises:
        BundleRefusedError: a row has another length.
    """
    lengths = matrix.double().norm(dim=1)
    wrong = lengths > 1 + rounding if or_shorter else (lengths > 0) & ((lengths - 1).abs() > rounding)
    if bool(wrong.any()):
        raise BundleRefusedError(
            f"{what} must have unit length, but one has {float(lengths[wrong][0]):g}; restore the file"
        )


def check_drawn(count: int, of: str) -> None:
    """Check the number of random numbers that a setting asks for.

    Args:
        count: their number.
        of: what they are, for the message.

    Raises:
        InputError: there are more than `MOST_DRAWN`.
    """
    if count > MOST_DRAWN:
        raise InputError(
            f"{of} are {count:,} random numbers, but at most {MOST_DRAWN:,} are allowed; lower the setting"
        )


def check_state(
    state: Mapping[str, Tensor], schema: Mapping[str, TensorSpec], bound: Mapping[str, int], owner: str
) -> dict[str, int]:
    """Check the names, dtypes, shapes and values of a state against a schema.

    Args:
        state: tensors by name.
        schema: expected tensors by name.
        bound: sizes of symbols that are known beforehand.
        owner: name for error messages.

    Returns:
        The sizes of all symbols.

    Raises:
        BundleRefusedError: a tensor is missing or unknown, or has the wrong shape, dtype or values.
    """
    if set(state) != set(schema):
        missing, extra = sorted(set(schema) - set(state)), sorted(set(state) - set(schema))
        raise BundleRefusedError(
            f"the state does not match '{owner}': missing tensors {missing or 'none'}, unknown {extra or 'none'}"
        )
    sizes = dict(bound)
    for name, spec in schema.items():
        tensor = state[name]
        if tensor.dtype != DTYPES[spec.dtype]:
            raise BundleRefusedError(f"the tensor '{name}' of '{owner}' must be {spec.dtype}, but is {tensor.dtype}")
        fits = tensor.ndim == len(spec.shape) and all(
            size == (sizes.setdefault(symbol, size) if isinstance(symbol, str) else symbol)
            for symbol, size in zip(spec.shape, tensor.shape, strict=True)
        )
        if not fits:
            expected = tuple(sizes.get(s, s) if isinstance(s, str) else s for s in spec.shape)
            raise BundleRefusedError(
                f"the tensor '{name}' of '{owner}' must have the shape {expected}, but has {tuple(tensor.shape)}"
            )
    for name, spec in schema.items():  # after all shapes
        _check_values(state[name], spec, f"the tensor '{name}' of '{owner}'")
    return sizes


def _check_values(tensor: Tensor, spec: TensorSpec, what: str) -> None:
    """Check that all values of a tensor are in the range of its specification, which NaN is not."""
    if not tensor.numel():
        return
    if tensor.dtype == torch.uint32:  # PyTorch has few kernels for it
        tensor = tensor.to(torch.int64)
    least, most = (float(value) for value in tensor.aminmax())
    if not (spec.least <= least and most <= spec.most):
        raise BundleRefusedError(
            f"{what} must be from {spec.least:g} to {spec.most:g}, but has values from {least:g} to {most:g}; restore "
            "the file"
        )
    if spec.whole and not torch.equal(tensor, tensor.round()):
        raise BundleRefusedError(f"{what} must be whole numbers, but is not; restore the file")
