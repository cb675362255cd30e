"""The Learner contract: everything that is learned, and how. The workstation and the device use the same one.

A learner sees standardised embeddings and class *rows* (0, 1, …); names live in the class registry. Boundaries
between tasks are known while learning and never while predicting, and nothing in the state grows with the
number of samples seen (no replay): `schema` lists every tensor with its shape and the reason for keeping it.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from ssd_edge.errors import BundleRefusedError, InputError
from ssd_edge.learners.priors import Priors

# Told the share of the present task that is done, 0..1. Where it answers True, a learner that goes over its task
# several times stops after the present epoch and ends the task as if that had been the last one.
Progress = Callable[[float], bool | None]

DTYPES = {
    "float16": torch.float16,
    "float32": torch.float32,
    "float64": torch.float64,
    "int64": torch.int64,
    "uint8": torch.uint8,
    "uint32": torch.uint32,
}


@dataclasses.dataclass(frozen=True)
class Task:
    """Labelled embeddings that arrive together.

    Attributes:
        embeddings: standardised, float32 ``(N, D)``.
        labels: rows, int64 ``(N,)``.
    """

    embeddings: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        """Check shapes, types and values.

        Raises:
            InputError: shapes that disagree, another type, no sample, a negative row, NaN or infinity.
        """
        if self.embeddings.ndim != 2 or self.labels.shape != self.embeddings.shape[:1]:
            raise InputError(
                f"a task needs embeddings (N, D) and labels (N,), but has {tuple(self.embeddings.shape)} "
                f"and {tuple(self.labels.shape)}"
            )
        if (self.embeddings.dtype, self.labels.dtype) != (torch.float32, torch.int64):
            raise InputError(
                "a task needs embeddings of torch.float32 and labels of torch.int64, but has "
                f"{self.embeddings.dtype} and {self.labels.dtype}"
            )
        if not len(self.labels):
            raise InputError("a task without samples cannot be learned; give it images")
        if int(self.labels.min()) < 0:
            raise InputError(f"class rows start at 0, but a label is {int(self.labels.min())}")
        if not bool(torch.isfinite(self.embeddings).all()):
            raise InputError("an embedding holds NaN or infinity; check the backbone and its images")

    @property
    def rows(self) -> Tensor:
        """The rows that occur, ascending."""
        return self.labels.unique()


# Letters of a shape that count classes: a row of the learner is a place on such an axis. C is all of them, S those up
# to the last one taught, P those of a former self. Every other letter has nothing to do with classes.
CLASS_AXES = frozenset("CSP")


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """One tensor of a learner's state: symbolic shape (letters must agree), dtype, and why it is kept.

    `shipped`: it came with the backbone and never changes. It is kept beside the state so that a state is complete, but
    is no part of what was learned (`Learner.memory_bytes`).
    """

    shape: tuple[str | int, ...]
    dtype: str
    reason: str
    shipped: bool = False


BASE_SCHEMA = {
    "seen": TensorSpec(("S",), "uint8", "which classes have been taught"),
    "tasks_learned": TensorSpec((1,), "int64", "position in the random streams"),
}


class HeadGraph(Protocol):
    """ONNX graph that a learner writes its scores into (`Learner.write_head`).

    Values are referred to by name. ``add`` and the methods built on it append an operator and return the name of its
    first output; ``weight`` and ``indices`` add a constant. `exporters.head` has the implementation, so that learners
    import neither it nor onnx.

    Attributes:
        classes: C, the number of columns that the scores must have.
    """

    @property
    def classes(self) -> int: ...

    def add(self, operator: str, *inputs: str, output: str = "", outputs: int = 1, **attributes: Any) -> str:
        """Append an operator; output i > 0 is named ``<first output>/i``."""

    def weight(self, name: str, tensor: Tensor) -> str:
        """Add a float32 constant, which must be finite."""

    def indices(self, *values: int) -> str:
        """Add a constant int64 ``(n,)``."""

    def scalar(self, value: float) -> str:
        """Add a float32 constant without dimensions."""

    def reduce(self, operator: str, x: str) -> str:
        """Reduce the last axis, keeping it with size 1."""

    def divide(self, x: str, by: str, least: float) -> str:
        """Divide by ``max(by, least)``."""

    def unit(self, x: str) -> str:
        """Scale rows to unit length; a zero row stays zero."""

    def matmul(self, x: str, name: str, matrix: Tensor) -> str:
        """Multiply ``(N, n)`` by a constant ``(n, m)``."""

    def affine(self, x: str, name: str, weight: Tensor, bias: Tensor) -> str:
        """Compute x Wᵀ + b with constants W ``(m, n)`` and b ``(m,)``."""

    def top(self, x: str, count: int, of: int, setting: str) -> str:
        """Select the `count` largest of the `of` values per row, descending; their indices are ``<output>/1``."""

    def column(self, x: str, index: int) -> str:
        """Select one column of ``(N, n)``, as ``(N, 1)``."""


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
        removal: how completely `remove` takes out a class. ``exact``: as if it had never been taught; ``with
            per_class``: exact if ``learner.per_class`` is set, otherwise the pooled second moment keeps the class's
            share of the within-class covariance; ``output only``: the class is never predicted again, but shared
            weights keep what they learned from it.
        Settings: frozen dataclass of its settings.

    Args:
        dim: D of the embeddings.
        settings: a frozen dataclass; see each learner's `Settings`.
        priors: what pretraining knows; may be empty.
        seed: of everything random. Task t draws from (seed, t) alone, so a resumed run continues bit for bit.
        device: where large tensors live.
    """

    name: ClassVar[str]
    display: str
    family: ClassVar[Literal["closed form", "gradient"]]
    panel: ClassVar[bool] = False
    baseline: ClassVar[bool] = False
    candidate: ClassVar[bool] = False
    replay: ClassVar[bool] = False
    removal: ClassVar[Literal["exact", "with per_class", "output only"]]
    Settings: ClassVar[type]

    def __init__(
        self, dim: int, settings: Any, priors: Priors, seed: int = 0, device: str | torch.device = "cpu"
    ) -> None:
        self.dim = dim
        self.settings = settings
        self.seed = seed
        self.device = torch.device(device)
        self.seen = torch.zeros(0, dtype=torch.uint8)  # (C,), 1 where a class has been taught
        self.tasks_learned = 0
        self.note = ""  # one sentence where the learner could not start as its settings ask; a run prints it

    @abc.abstractmethod
    def _learn(self, task: Task, progress: Progress) -> dict[str, float]:
        """Learn one checked task; `seen` and `tasks_learned` are kept by `learn`."""

    @abc.abstractmethod
    def scores(self, embeddings: Tensor) -> Tensor:
        """Scores ``(N, C)`` of embeddings ``(N, D)``, higher is likelier; on the CPU, float32."""

    @abc.abstractmethod
    def schema(self) -> dict[str, TensorSpec]:
        """Every tensor of the state beyond `BASE_SCHEMA`."""

    @abc.abstractmethod
    def _tensors(self) -> dict[str, Tensor]:
        """The state's tensors, as `schema` describes them."""

    @abc.abstractmethod
    def _load(self, tensors: dict[str, Tensor]) -> None:
        """Take over tensors that have passed `schema`."""

    def write_head(self, graph: HeadGraph, x: str) -> str | None:
        """Write the operators that compute `scores` into an ONNX graph.

        Args:
            graph: to write into.
            x: name of the embeddings ``(N, D)``, N ≥ 1.

        Returns:
            Name of the scores ``(N, graph.classes)``; None if they cannot be written as a graph.

        Raises:
            InputError: the settings or the state of this learner rule out a graph.
        """
        return None

    def expect(self, classes: int) -> None:  # noqa: B027  an announcement that most learners do not need
        """Announce how many classes the stream will have; classes may also arrive unannounced."""

    def learn(self, task: Task, progress: Progress | None = None) -> dict[str, float]:
        """Learn one task from its own data alone.

        Args:
            task: embeddings and rows; rows never seen before are new classes.
            progress: told the share done; see `Progress`.

        Returns:
            Measurements, e.g. losses; keys depend on the learner. ``epochs``: how many a learner with epochs went over.

        Raises:
            InputError: the embeddings have another dimension, or the learner diverged.
        """
        self._check_dim(task.embeddings)
        classes = int(task.labels.max()) + 1
        measured = self._learn(task, progress or (lambda share: None))
        if classes > len(self.seen):
            self.seen = torch.cat([self.seen, self.seen.new_zeros(classes - len(self.seen))])
        self.seen[task.rows.cpu()] = 1
        self.tasks_learned += 1
        return measured

    def remove(self, row: int, approximately: bool = False) -> bool:
        """Forget one class, as if it had never been taught. The other classes keep their rows.

        Args:
            row: of the class.
            approximately: where it cannot be taken out exactly, take out what can be: of one second moment of all
                classes what such a class adds on average, of a trained network the class's output. What the shared
                numbers have learned from its samples stays.

        Returns:
            Whether it was exact; always without `approximately`.

        Raises:
            InputError: the class has not been taught, or this learner cannot take one out.
        """
        self._check_taught(row, "taken out")
        exact = self._remove(row, approximately)
        self.seen[row] = 0
        return exact

    def join(self, row: int, into: int) -> None:
        """Count what one class was taught with as taught to another, as if both had had one row from the start.

        Args:
            row: untaught from now on.
            into: the class that stays.

        Raises:
            InputError: either has not been taught, both are the same, or this learner cannot join two.
        """
        for each in (row, into):
            self._check_taught(each, "joined")
        if row == into:
            raise InputError(f"row {row} cannot be joined with itself; name two rows")
        self._join(row, into)
        self.seen[row] = 0

    def merge(self, other: Learner, rows: Tensor | None = None) -> None:
        """Add what another learner of the same kind has seen, as if this one had seen it too.

        Args:
            other: of the same kind and settings; it stays as it is.
            rows: int64; its row i is row ``rows[i]`` here, and two may become one. None: the same rows.

        Raises:
            InputError: this learner cannot be merged, or the two disagree in something that must be equal.
        """
        rows = self._check_same(other, rows, "merged")
        self._merge(other, rows)
        missing = int(rows.max()) + 1 - len(self.seen) if len(rows) else 0
        self.seen = torch.cat([self.seen, self.seen.new_zeros(max(missing, 0))])
        self.seen[rows[other.seen == 1]] = 1
        self.tasks_learned += other.tasks_learned

    def subtract(self, other: Learner, rows: Tensor | None = None) -> None:
        """Take out what another learner has seen: the inverse of `merge`, but for rounding.

        Two learners that went on from a common one and are merged have seen its samples twice; without them once they
        have seen all that either has.

        Args:
            other: what this one contains, as by `merge`; it stays as it is.
            rows: int64; its row i is row ``rows[i]`` here. None: the same rows.

        Raises:
            InputError: as `merge`, or this learner has fewer samples of a class than the other; it is unchanged then.
        """
        rows = self._check_same(other, rows, "subtracted")
        left = self._subtract(other, rows)
        self.seen[left == 0] = 0
        self.tasks_learned = max(self.tasks_learned - other.tasks_learned, 0)

    def _remove(self, row: int, approximately: bool) -> bool:
        raise InputError(
            f"{self.display} cannot take a class out: what it learned of it is spread over its weights; take it out "
            "approximately, which blanks its output alone"
        )

    def _join(self, row: int, into: int) -> None:
        raise InputError(
            f"{self.display} cannot join two classes: what it learned of them is spread over its weights; take one "
            "out approximately and teach its images again as the other"
        )

    def _common(self) -> dict[str, Any]:
        """What two learners of this kind must have in common to be merged: by name, a tensor or a plain value."""
        raise InputError(f"{self.display} cannot be merged: what two of them learned apart does not add up")

    def _shared_settings(self) -> dict[str, Any]:
        """The least that `_common` holds."""
        settings = dataclasses.asdict(self.settings)
        return {"the embedding's size": self.dim, **{f"learner.{key}": value for key, value in settings.items()}}

    def _merge(self, other: Any, rows: Tensor) -> None:
        """Add the other's state; both have passed `merge`'s checks. Whoever gives `_common` gives this too."""
        raise NotImplementedError

    def _subtract(self, other: Any, rows: Tensor) -> Tensor:
        """Take out the other's state, and say how many samples are left of each row ``(C,)``; else as `_merge`."""
        raise NotImplementedError

    def _check_taught(self, row: int, done: str) -> None:
        if not 0 <= row < len(self.seen) or not self.seen[row]:
            taught = ", ".join(map(str, self.seen.nonzero().flatten().tolist())) or "none"
            raise InputError(f"row {row} has not been taught, so it cannot be {done}; rows taught: {taught}")

    def _check_same(self, other: Learner, rows: Tensor | None, done: str) -> Tensor:
        """Check that two learners may be merged or subtracted; the other's rows as they are called here."""
        mine = self._common()
        if type(other) is not type(self):
            raise InputError(f"only learners of one kind can be {done}, but these are {self.display}, {other.display}")
        for what, value in other._common().items():
            if isinstance(value, Tensor):
                equal, values = torch.equal(value.cpu(), mine[what].cpu()), ""
            else:
                equal, values = value == mine[what], f" ({mine[what]} and {value})"
            if not equal:
                raise InputError(
                    f"two learners that differ in {what}{values} cannot be {done}; start both with the same"
                )
        rows = torch.arange(len(other.seen)) if rows is None else rows
        if rows.dtype != torch.int64 or rows.shape != other.seen.shape or bool((rows < 0).any()):
            raise InputError(
                f"what is to be {done} needs a row of at least 0 for each of the other learner's {len(other.seen)} "
                f"rows, but was given {rows.tolist()}"
            )
        return rows

    def _renumber(self, tensors: dict[str, Tensor], rows: Tensor) -> None:  # noqa: B027  most hold no such number
        """Change in a state whatever names rows, or counts them, by a number.

        Args:
            tensors: of the state; changed.
            rows: that are left out, int64, ascending; those above move up.
        """

    def predict(self, embeddings: Tensor) -> Tensor:
        """Rows int64 ``(N,)``: the best-scored class among those taught. No task is named.

        Raises:
            InputError: wrong dimension, or nothing has been taught.
        """
        self._check_dim(embeddings)
        if not bool(self.seen.any()):
            raise InputError("nothing has been taught yet; learn a class first")
        scores = self.scores(embeddings)[:, : len(self.seen)]
        return scores.masked_fill(self.seen[: scores.shape[1]] == 0, -torch.inf).argmax(1)

    def state_dict(self) -> dict[str, Tensor]:
        """All tensors, copied to the CPU: enough to go on learning or predicting elsewhere, whatever comes after."""
        tensors = {**self._tensors(), "seen": self.seen, "tasks_learned": torch.tensor([self.tasks_learned])}
        return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what `state_dict` gave, bit for bit.

        Raises:
            BundleRefusedError: a tensor is missing, unknown, or of another shape or dtype.
        """
        check_state(state, {**BASE_SCHEMA, **self.schema()}, {"D": self.dim}, self.name)
        self.seen = state["seen"].clone()
        self.tasks_learned = int(state["tasks_learned"][0])
        self._load({name: tensor.clone() for name, tensor in state.items() if name not in BASE_SCHEMA})

    def constants(self) -> dict[str, Tensor]:
        """The tensors of the state that came with the backbone and never change."""
        shipped = {name for name, spec in self.schema().items() if spec.shipped}
        return {name: tensor for name, tensor in self._tensors().items() if name in shipped}

    def memory_bytes(self) -> int:
        """Bytes of the state: all that must persist beyond the backbone package, so without `constants`."""
        shipped = self.constants()
        kept = [tensor for name, tensor in self.state_dict().items() if name not in shipped]
        return sum(tensor.numel() * tensor.element_size() for tensor in kept)

    def generator(self, purpose: int = 0) -> torch.Generator:
        """Random numbers that depend on the seed, the number of tasks learned and the purpose only."""
        mixed = (self.seed * 1_000_003 + self.tasks_learned * 8_191 + purpose * 131) % (2**63 - 1)
        return torch.Generator().manual_seed(mixed)

    def _check_dim(self, embeddings: Tensor) -> None:
        if embeddings.ndim != 2 or embeddings.shape[1] != self.dim:
            raise InputError(
                f"this learner takes embeddings of {self.dim} values, but was given {tuple(embeddings.shape)}; "
                "use the backbone that it was trained with"
            )


def check_state(state: dict[str, Tensor], schema: dict[str, TensorSpec], bound: dict[str, int], what: str) -> None:
    """Check names, dtypes and shapes of a state against a schema.

    Args:
        state: tensors by name.
        schema: what they must be. A spec whose shape holds a letter binds it for all others.
        bound: letters known beforehand.
        what: the learner's name, for the error.

    Raises:
        BundleRefusedError: with the two values that disagree.
    """
    if set(state) != set(schema):
        missing, extra = sorted(set(schema) - set(state)), sorted(set(state) - set(schema))
        raise BundleRefusedError(
            f"the state is not one of '{what}': missing {missing or 'nothing'}, unknown {extra or 'nothing'}"
        )
    bound = dict(bound)
    for name, spec in schema.items():
        tensor = state[name]
        if tensor.dtype != DTYPES[spec.dtype]:
            raise BundleRefusedError(f"the tensor '{name}' of '{what}' must be {spec.dtype}, but is {tensor.dtype}")
        fits = tensor.ndim == len(spec.shape) and all(
            size == (bound.setdefault(symbol, size) if isinstance(symbol, str) else symbol)
            for symbol, size in zip(spec.shape, tensor.shape, strict=True)
        )
        if not fits:
            wanted = tuple(bound.get(s, s) if isinstance(s, str) else s for s in spec.shape)
            raise BundleRefusedError(
                f"the tensor '{name}' of '{what}' must have the shape {wanted}, but has {tuple(tensor.shape)}"
            )
