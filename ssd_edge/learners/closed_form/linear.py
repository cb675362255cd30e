"""Base class of closed-form learners whose scores are linear in features: one pass, independent of sample order."""

from __future__ import annotations

import abc
import bisect
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]  # PyTorch does not list it

from ssd_edge.answers.graph import HeadGraph
from ssd_edge.errors import InputError, first_line
from ssd_edge.learners.base import (
    BASE_SCHEMA,
    DTYPES,
    LARGEST_COUNT,
    Learner,
    Progress,
    Task,
    TensorSpec,
    check_state,
)
from ssd_edge.learners.closed_form.sums import PROBES, ClassStatistics, check_seen
from ssd_edge.learners.priors import Priors

NEVER = -1e30  # bias of a class without samples; −∞ is not allowed in a state
BATCH = 4096
PER_CLASS = "store second moments per class: classes can be removed exactly, at C times the memory"
LIMIT = "size limit of the state in MB at budget_classes; wider embeddings are projected at random; 0: no limit"
BUDGET_CLASSES = "number of classes that the budget must hold"

COUNTS = TensorSpec(
    ("C",), "float64", "number of samples of each class", least=0, most=LARGEST_COUNT, whole=True, adds=True
)


def statistics_schema(size: int, per_class: bool, single: bool = False, views: bool = False) -> dict[str, TensorSpec]:
    """Return the specification of the tensors of `ClassStatistics` over `size` features."""
    kind = "float32" if single else "float64"
    triangle = size * (size + 1) // 2
    scope = "of each class, upper triangles" if per_class else "of all classes, upper triangle"
    leading = ("C",) if per_class else ()
    apart = TensorSpec(
        (*leading, size, min(size, PROBES)), kind, "sketch of the differences of the images' two views", adds=True
    )
    return {
        "counts": COUNTS,
        "sums": TensorSpec(("C", size), kind, "sum of the features of each class", adds=True),
        "second": TensorSpec((*leading, triangle), kind, f"second moments of the features {scope}", adds=True),
        **({"apart": apart} if views else {}),
    }


def restore_statistics(arrays: Mapping[str, np.ndarray], dim: int, owner: str = "class statistics") -> ClassStatistics:
    """Restore the statistics of embeddings in a run, bundle or generation.

    Args:
        arrays: arrays of the file.
        dim: dimension D of the embeddings.
        owner: name for error messages.

    Raises:
        BundleRefusedError: they are damaged, of another dimension, or of no possible embeddings.
    """
    state = {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}
    check_state(state, statistics_schema(dim, per_class=False), {}, owner)
    return ClassStatistics.from_state(state)


def features_within(
    megabytes: float, classes: int, most: int, schema: Callable[[int], Mapping[str, TensorSpec]]
) -> int:
    """Return the largest number of features whose state fits into a budget.

    Args:
        megabytes: the budget; 1 MB is a million bytes.
        classes: number of classes that it must hold.
        most: largest number of features to return.
        schema: returns the tensors of a state with some number of features, all of whose symbols count classes.

    Raises:
        InputError: two features do not fit.
    """

    def size_of(features: int) -> float:
        specs = {**BASE_SCHEMA, **schema(features)}.values()
        shapes = ((DTYPES[spec.dtype].itemsize, *spec.shape) for spec in specs)
        return sum(math.prod(classes if isinstance(n, str) else n for n in shape) for shape in shapes) / 1e6

    if size_of(2) > megabytes:
        raise InputError(
            f"learner.budget_mb={megabytes:g} is too small for two features and {classes} classes, which need "
            f"{size_of(2):g} MB; raise it or lower learner.budget_classes"
        )
    fitting = bisect.bisect_right(range(2, most + 1), megabytes, key=size_of)
    return fitting + 1


def random_directions(dim: int, count: int, seed: int) -> Tensor:
    """Return orthonormal directions as columns, float32 ``(dim, count)``; the same on every machine up to rounding.

    Args:
        dim: dimension D of the embeddings.
        count: number of directions, at most D. With D there is nothing to project: the result is empty.
        seed: seed of the draw.
    """
    if count == dim:
        return torch.zeros(0, 0)
    generator = torch.Generator().manual_seed(seed)
    axes, upper = torch.linalg.qr(torch.randn(dim, count, generator=generator))
    directions: Tensor = axes * upper.diagonal().sign()  # the signs of a QR decomposition depend on the library
    return directions


class LinearLearner(Learner):
    """Base class of learners with scores x W + b, where x are features of the embedding.

    W and b are solved from `ClassStatistics` of the features after every change. Learners are merged and subtracted and
    classes joined exactly; with the setting `per_class`, classes are also removed exactly.

    Attributes:
        single: True to store the statistics in float32.
        statistics: of the features.
        values: W, float32 ``(F, C)``.
        bias: b, float32 ``(C,)``.
    """

    family = "closed form"
    removal = "with per_class"
    single: ClassVar[bool] = False

    def _start(self, priors: Priors) -> None:
        views = self.wants_second_view
        self.statistics = ClassStatistics(self.feature_count(), self.settings.per_class, self.single, views)
        self.values = torch.zeros(self.feature_count(), 0)
        self.bias = torch.zeros(0)

    def feature_count(self) -> int:
        """Return the number of features F."""
        return self.dim

    def features(self, embeddings: Tensor) -> Tensor:
        """Return features ``(N, F)`` of embeddings ``(N, D)``."""
        return embeddings

    def class_statistics(self) -> ClassStatistics | None:
        return self.statistics if type(self).features is LinearLearner.features else None

    @abc.abstractmethod
    def solve(self) -> tuple[Tensor, Tensor, dict[str, float]]:
        """Return W ``(F, C)``, b ``(C,)`` and measurements, solved from the statistics."""

    def _learn(self, task: Task, progress: Progress) -> dict[str, float]:
        self._count(self.statistics, task, progress)
        measured = self._update()
        progress(1.0)
        return measured

    def sums_of(self, task: Task) -> ClassStatistics:
        sums = ClassStatistics(self.feature_count(), self.settings.per_class, views=self.wants_second_view)
        self._count(sums, task, lambda done: False)
        return sums

    def _count(self, statistics: ClassStatistics, task: Task, progress: Progress) -> None:
        """Add samples to statistics."""
        statistics.grow(int(task.labels.max()) + 1)
        for start in range(0, len(task.labels), BATCH):
            part = slice(start, start + BATCH)
            features = self.features(task.embeddings[part].to(self.device))
            second = None
            if self.wants_second_view and task.second is not None:
                second = self.features(task.second[part].to(self.device))
            statistics.add(features, task.labels[part], second)
            progress(0.9 * start / len(task.labels))

    def _update(self) -> dict[str, float]:
        self.statistics.settle()
        try:
            values, bias, measured = self.solve()
        except LinAlgError as error:  # numbers beyond float32, or statistics that only rounding left
            raise InputError(
                f"{self.display} cannot be solved with these samples ({first_line(error)}); check their embeddings"
            ) from error
        # Contiguous: a different memory layout would change the last bits of a product after a restart.
        self.values, self.bias = values.float().contiguous(), bias.float().clamp_min(NEVER)
        return measured

    def _remove(self, row: int, approximately: bool) -> bool:
        if not (self.settings.per_class or approximately):
            raise InputError(
                f"{self.display} stores one second moment for all classes, so a class cannot be removed exactly. "
                "Remove it approximately, or set learner.per_class=true and learn all classes again"
            )
        exact = self.statistics.remove(row, approximately)
        self._update()
        return exact

    def _join(self, row: int, into: int) -> None:
        self.statistics.join(row, into)
        self._update()

    def _common(self) -> dict[str, Any]:
        return self._shared_settings()

    def _merge(self, other: LinearLearner, rows: Tensor) -> None:
        self.statistics.merge(other.statistics, rows)

    def _subtract(self, other: LinearLearner, rows: Tensor) -> Tensor:
        self.statistics.subtract(other.statistics, rows)
        return self.statistics.counts

    def _hold(self, sums: dict[str, Tensor]) -> None:
        self.statistics = ClassStatistics.unchecked(sums)

    def check_part(self, sums: Mapping[str, Tensor]) -> None:
        ClassStatistics.unchecked(dict(sums)).check(self.statistics)

    def _refresh(self) -> None:
        self._update()

    def scores(self, embeddings: Tensor) -> Tensor:
        values, bias = self.values.to(self.device), self.bias.to(self.device)
        parts = [(self.features(part.to(self.device)) @ values + bias).cpu() for part in torch.split(embeddings, BATCH)]
        return torch.cat(parts) if parts else torch.zeros(0, self.values.shape[1])

    def write_head(self, graph: HeadGraph, x: str) -> str:
        values, bias = self.values[:, : graph.classes], self.bias[: graph.classes]
        return graph.affine(self._write_features(graph, x), "output", values.T, bias)

    def _write_features(self, graph: HeadGraph, x: str) -> str:
        """Write `features` into an ONNX graph; return the name of the result."""
        return x

    def schema(self) -> dict[str, TensorSpec]:
        return self._schema_of(self.feature_count())

    def _schema_of(self, size: int) -> dict[str, TensorSpec]:
        """Return `schema` for `size` features."""
        return {
            **statistics_schema(size, self.settings.per_class, self.single, self.wants_second_view),
            "values": TensorSpec((size, "C"), "float32", "solved from the statistics"),
            "bias": TensorSpec(("C",), "float32", "solved from the statistics", least=float(np.float32(NEVER))),
        }

    def _tensors(self) -> dict[str, Tensor]:
        return {**self.statistics.state(), "values": self.values, "bias": self.bias}

    def _check(self, state: dict[str, Tensor]) -> None:
        check_seen(state, self.name)

    def _load(self, tensors: dict[str, Tensor]) -> None:
        self.statistics = ClassStatistics.from_state(tensors)
        self.values, self.bias = tensors["values"], tensors["bias"]
