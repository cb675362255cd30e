"""Head: what answers with embeddings, in one safetensors file that NumPy can read and run.

It holds the graph of a learner's scores, what the learner is, and the temperatures of the probabilities. It follows
from the learner, which is what learns; a device writes it anew with every generation.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ssd_edge import files
from ssd_edge.answers.graph import HeadGraph, Operator, run
from ssd_edge.errors import BundleRefusedError

NAME = "head.safetensors"  # in a generation
MOST_BYTES = 2**25  # of constants; a generation with more answers with PyTorch
COMPARED = 5  # classes with the best scores, among which probabilities are distributed
_GRAPH = "graph/"  # prefix of constants
_TEMPERATURES = "temperatures"


@dataclasses.dataclass(frozen=True)
class Head:
    """The scores of a learner as a graph, and what else is known about it; immutable.

    Attributes:
        learner: Name of the learner.
        replay: True if it stores samples.
        state_bytes: Size of its state.
        classes: Number of classes C.
        dim: Number of features D.
        temperatures: Of the answers with each class, float64 ``(C,)``; None while no held-out images are on record.
        operators: Operators of the graph; empty if only PyTorch can compute the scores.
        constants: Constants of the graph.
        scores: Name of the scores.
        without: Why the graph is empty, or an empty string.
    """

    learner: str
    replay: bool
    state_bytes: int
    classes: int
    dim: int
    temperatures: np.ndarray | None
    operators: Sequence[Operator] = ()
    constants: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    scores: str = ""
    without: str = ""

    def with_graph(self, graph: HeadGraph, scores: str) -> Head:
        """Return a head with a graph whose result is called `scores`."""
        return dataclasses.replace(self, operators=graph.operators, constants=graph.constants, scores=scores)

    def score(self, embeddings: np.ndarray) -> np.ndarray:
        """Return the scores of embeddings ``(N, D)``, float32 ``(N, C)``.

        Raises:
            BundleRefusedError: The graph is damaged.
        """
        if not len(embeddings) or not self.classes:
            return np.zeros((len(embeddings), self.classes), np.float32)
        found = run(self.operators, self.constants, self.scores, embeddings)
        if found.shape != (len(embeddings), self.classes) or found.dtype != np.float32:
            raise BundleRefusedError(
                f"the head of the learner gives {found.dtype} {found.shape} for {len(embeddings)} images and "
                f"{self.classes} classes; install the bundle again"
            )
        return found

    def to_bytes(self) -> bytes:
        """Return the content of a file from which `parse` restores an equal head."""
        arrays = {f"{_GRAPH}{name}": value for name, value in self.constants.items()}
        if self.temperatures is not None:
            arrays[_TEMPERATURES] = self.temperatures
        fields = {
            name: getattr(self, name)
            for name in ("learner", "replay", "state_bytes", "classes", "dim", "scores", "without")
        }
        operators = [[one.kind, one.inputs, one.outputs, dict(one.attributes)] for one in self.operators]
        return files.tensor_bytes(arrays, {**fields, "operators": operators})

    @classmethod
    def parse(cls, data: bytes, what: str = NAME) -> Head:
        """Restore from the bytes of `to_bytes`.

        Args:
            data: The bytes.
            what: Name of the file for messages.

        Raises:
            BundleRefusedError: They are something else.
        """
        arrays, fields = files.parse_tensors(data, what)
        temperatures = arrays.pop(_TEMPERATURES, None)
        constants = {name.removeprefix(_GRAPH): value for name, value in arrays.items()}
        try:
            operators = [
                Operator(str(kind), tuple(map(str, inputs)), tuple(map(str, outputs)), dict(attributes))
                for kind, inputs, outputs, attributes in fields.pop("operators")
            ]
            head = cls(**fields, temperatures=temperatures, operators=operators, constants=constants)
            counts: list[Any] = [head.state_bytes, head.classes, head.dim]
            if any(type(count) is not int or count < 0 for count in counts) or type(head.replay) is not bool:
                raise ValueError(f"the values {counts} and {head.replay!r:.20}")
            texts: list[Any] = [head.learner, head.scores, head.without]
            if not all(isinstance(text, str) for text in texts):
                raise ValueError(f"the names {texts!r:.80}")
            if temperatures is not None and (
                temperatures.shape != (head.classes,) or temperatures.dtype != np.float64 or (temperatures <= 0).any()
            ):
                raise ValueError(f"temperatures {temperatures.dtype} {temperatures.shape} for {head.classes} classes")
        except (ValueError, TypeError, KeyError) as error:
            raise BundleRefusedError(f"{what} is damaged ({error}); install the bundle again") from error
        return head


@dataclasses.dataclass(frozen=True)
class Limits:
    """Thresholds for ``unknown``: the part of `ssd_edge.learners.unknown.Rejector` that answers.

    Attributes:
        factors: What multiplies each axis and, last, everything else; float32 ``(R + 1,)``.
        axes: Orthonormal axes, float32 ``(R, D)``.
        directions: Whitened mean of each class at unit length, float32 ``(C, D)``.
        thresholds: Smallest cosine of each class that is accepted, float32 ``(C,)``.
    """

    factors: np.ndarray
    axes: np.ndarray
    directions: np.ndarray
    thresholds: np.ndarray

    @classmethod
    def from_state(cls, arrays: Mapping[str, np.ndarray]) -> Limits:
        """Restore from the arrays of `Rejector.state`.

        Raises:
            BundleRefusedError: An array is missing or has a wrong shape.
        """
        try:
            limits = cls(
                arrays["whitening"], arrays["axes"].astype(np.float32), arrays["directions"], arrays["thresholds"]
            )
            (rank, dim), (classes, features) = limits.axes.shape, limits.directions.shape
            if (limits.factors.shape, limits.thresholds.shape, features) != ((rank + 1,), (classes,), dim):
                raise ValueError("arrays of different sizes")
        except (KeyError, ValueError) as error:
            raise BundleRefusedError(
                f"the thresholds for 'unknown' are damaged ({error}); install the bundle again"
            ) from error
        return limits

    @np.errstate(all="ignore")
    def whiten(self, embeddings: np.ndarray) -> np.ndarray:
        """Return embeddings in the space in which `directions` are, float32 ``(N, D)``."""
        rest = self.factors[-1]
        white: np.ndarray = rest * embeddings + (embeddings @ self.axes.T * (self.factors[:-1] - rest)) @ self.axes
        return white

    @np.errstate(all="ignore")
    def margins(self, embeddings: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Return by how much the cosine of each embedding exceeds the threshold of a class, float32 ``(N,)``.

        Args:
            embeddings: float32 ``(N, D)``.
            rows: Row of the class of each, int64 ``(N,)``.
        """
        white = self.whiten(embeddings)
        lengths = np.maximum(np.sqrt(np.square(white).sum(1)), np.finfo(np.float32).tiny)
        margins: np.ndarray = (white * self.directions[rows]).sum(1) / lengths - self.thresholds[rows]
        return margins


@np.errstate(all="ignore")
def confidence(scores: np.ndarray, temperatures: np.ndarray) -> np.ndarray:
    """Return the probability of the best class of each image among the best few, float64 ``(N,)``.

    Args:
        scores: Scores of the learned classes, ``(N, C)``.
        temperatures: Of the answers with each class, float64 ``(C,)``.
    """
    best = -np.sort(-scores.astype(np.float64), axis=1)[:, :COMPARED]
    below = (best - best[:, :1]) / temperatures[scores.argmax(1), None]
    shares: np.ndarray = 1.0 / np.exp(below).sum(1)
    return shares
