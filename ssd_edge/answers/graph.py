"""Graph that computes the scores of a learner from embeddings: operators of ONNX and constants, run by NumPy.

A learner writes its scores into a graph once (`Learner.write_head`). A device keeps the graph with each generation and
answers with it, so that it needs no PyTorch; `exporters.head` writes the same graph as an ONNX file.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ssd_edge.errors import BundleRefusedError, InputError

if TYPE_CHECKING:
    from torch import Tensor

EMBEDDINGS = "embeddings"  # name of the input
SHORTEST = 1e-12  # shorter vectors are not normalised, as in PyTorch
BATCH = 64  # embeddings that are scored at a time: FeCAM's graph has C·D numbers for each

Arrays = Sequence[np.ndarray]


@dataclasses.dataclass(frozen=True)
class Operator:
    """One operator of a graph.

    Attributes:
        kind: Its name in ONNX (opset 18).
        inputs: Names of its inputs.
        outputs: Names of its outputs.
        attributes: Its attributes: numbers, texts and lists of numbers.
    """

    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]


class TooLargeError(InputError):
    """The constants of a graph exceed its limit."""


class HeadGraph:
    """Operators and constants in the order in which they are added; values are referred to by name.

    Args:
        what: Name of the learner in messages.
        classes: C, the number of columns that the scores must have. A learner cuts off further ones, which were
            announced but not learned.
        most_bytes: Limit on the size of the constants.
        most_top: Largest K of `top`; None for no limit.

    Attributes:
        classes: C.
        operators: The operators.
        constants: Name → value, float32, int64 or bool.
    """

    def __init__(self, what: str, classes: int, most_bytes: int, most_top: int | None = None) -> None:
        self.classes = classes
        self.operators: list[Operator] = []
        self.constants: dict[str, np.ndarray] = {}
        self._what, self._most_bytes, self._most_top, self._bytes = what, most_bytes, most_top, 0

    def constant(self, name: str, value: np.ndarray | np.generic) -> str:
        """Add a constant and return its name, which must be unique.

        Raises:
            TooLargeError: The constants exceed the limit.
        """
        array = np.asarray(value)
        self._bytes += array.nbytes
        if self._bytes > self._most_bytes:
            raise TooLargeError(
                f"the head of {self._what} exceeds {self._most_bytes:,} bytes, the most that one file may hold; leave "
                "it out, or train a smaller learner"
            )
        self.constants[name] = array
        return name

    def weight(self, name: str, tensor: Tensor) -> str:
        """Add a float32 constant, which must be finite."""
        array = tensor.detach().cpu().float().contiguous().numpy()
        if not np.isfinite(array).all():
            raise InputError(
                f"the {name} of {self._what} contain NaN or infinity, so its scores are meaningless; train it again"
            )
        return self.constant(name, array)

    def add(self, operator: str, *inputs: str, output: str = "", outputs: int = 1, **attributes: Any) -> str:
        """Append an operator and return the name of its first output; output i > 0 is named ``<first output>/i``."""
        first = output or f"{len(self.operators)}/{operator}"
        names = (first, *(f"{first}/{index}" for index in range(1, outputs)))
        self.operators.append(Operator(operator, inputs, names, attributes))
        return first

    def scalar(self, value: float) -> str:
        """Add a float32 constant without dimensions."""
        return self.constant(f"scalar_{len(self.constants)}", np.float32(value))

    def indices(self, *values: int) -> str:
        """Add a constant int64 ``(n,)``."""
        return self.constant(f"indices_{len(self.constants)}", np.array(values, np.int64))

    def reduce(self, operator: str, x: str) -> str:
        """Reduce the last axis, keeping it with size 1."""
        return self.add(operator, x, self.indices(-1), keepdims=1)

    def divide(self, x: str, by: str, least: float) -> str:
        """Divide by ``max(by, least)``."""
        return self.add("Div", x, self.add("Max", by, self.scalar(least)))

    def unit(self, x: str) -> str:
        """Scale rows to unit length; a zero row stays zero."""
        return self.divide(x, self.reduce("ReduceL2", x), SHORTEST)

    def matmul(self, x: str, name: str, matrix: Tensor) -> str:
        """Multiply ``(N, n)`` by a constant ``(n, m)``."""
        return self.add("MatMul", x, self.weight(name, matrix))

    def affine(self, x: str, name: str, weight: Tensor, bias: Tensor) -> str:
        """Compute x Wᵀ + b with constants W ``(m, n)`` and b ``(m,)``."""
        return self.add("Gemm", x, self.weight(f"{name}_weight", weight.T), self.weight(f"{name}_bias", bias))

    def top(self, x: str, count: int, of: int, setting: str) -> str:
        """Select the `count` largest of the `of` values per row, descending; their indices are ``<output>/1``.

        Raises:
            InputError: There are more than `most_top`; `setting` is what to lower.
        """
        if self._most_top is not None and count > self._most_top:
            raise InputError(
                f"{self._what} needs the {count:,} largest of {of:,} values, but TensorRT's TopK supports at most "
                f"{self._most_top:,}; lower {setting} and train again, or leave the head out"
            )
        return self.add("TopK", x, self.indices(count), outputs=2, axis=1, largest=1, sorted=1)

    def column(self, x: str, index: int) -> str:
        """Select one column of ``(N, n)``, as ``(N, 1)``."""
        return self.add("Gather", x, self.indices(index), axis=1)


@np.errstate(all="ignore")
def run(
    operators: Sequence[Operator], constants: Mapping[str, np.ndarray], output: str, embeddings: np.ndarray
) -> np.ndarray:
    """Return the value named `output` of a graph for embeddings, in parts of at most `BATCH`.

    Args:
        operators: The operators.
        constants: The constants.
        output: Name of the result.
        embeddings: float32 ``(N, D)``, N ≥ 1.

    Raises:
        BundleRefusedError: The graph is damaged: an operator is unknown, or a value is missing or of a wrong shape.
    """
    try:
        parts = [
            _run(operators, constants, output, embeddings[start : start + BATCH])
            for start in range(0, len(embeddings), BATCH)
        ]
        return np.concatenate(parts)
    except (KeyError, ValueError, TypeError, IndexError) as error:
        raise BundleRefusedError(f"the head of the learner is damaged ({error}); install the bundle again") from error


def _run(
    operators: Sequence[Operator], constants: Mapping[str, np.ndarray], output: str, embeddings: np.ndarray
) -> np.ndarray:
    values = {**constants, EMBEDDINGS: embeddings}
    for one in operators:
        found = OPERATORS[one.kind]([values[name] for name in one.inputs], one.attributes)
        values.update(zip(one.outputs, found if isinstance(found, tuple) else (found,), strict=True))
    return values[output]


def _reduced(
    reduce: Callable[..., np.ndarray],
) -> Callable[[Arrays, Mapping[str, Any]], np.ndarray]:
    return lambda x, a: reduce(x[0], axis=tuple(x[1].tolist()), keepdims=bool(a["keepdims"]))


def _top(x: Arrays, attributes: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Select the largest values of each row in descending order; of equal ones, those with lower indices."""
    count = int(x[1][0])
    order = np.argsort(-x[0], axis=1, kind="stable")[:, :count]
    return np.take_along_axis(x[0], order, 1), order


def _scatter(x: Arrays, attributes: Mapping[str, Any]) -> np.ndarray:
    result: np.ndarray = x[0].copy()
    np.put_along_axis(result, x[1], x[2], attributes["axis"])
    return result


# What learners use of opset 18, with the attributes that they give.
OPERATORS: dict[str, Callable[[Arrays, Mapping[str, Any]], np.ndarray | tuple[np.ndarray, ...]]] = {
    "Abs": lambda x, a: np.abs(x[0]),
    "Add": lambda x, a: x[0] + x[1],
    "Clip": lambda x, a: np.clip(x[0], x[1], x[2]),
    "Concat": lambda x, a: np.concatenate(x, a["axis"]),
    "ConstantOfShape": lambda x, a: np.zeros(x[0], np.float32),
    "Cos": lambda x, a: np.cos(x[0]),
    "Div": lambda x, a: x[0] / x[1],
    "Exp": lambda x, a: np.exp(x[0]),
    "Gather": lambda x, a: np.take(x[0], x[1], a["axis"]),
    "Gemm": lambda x, a: x[0] @ x[1] + x[2],
    "Less": lambda x, a: x[0] < x[1],
    "Log": lambda x, a: np.log(x[0]),
    "MatMul": lambda x, a: x[0] @ x[1],
    "Max": lambda x, a: np.maximum(x[0], x[1]),
    "Mul": lambda x, a: x[0] * x[1],
    "Neg": lambda x, a: -x[0],
    "Pow": lambda x, a: x[0] ** x[1],
    "ReduceL2": _reduced(lambda x, **how: np.sqrt(np.square(x).sum(**how))),
    "ReduceMax": _reduced(np.max),
    "ReduceMin": _reduced(np.min),
    "ReduceSum": _reduced(np.sum),
    "ReduceSumSquare": _reduced(lambda x, **how: np.square(x).sum(**how)),
    "Relu": lambda x, a: np.maximum(x[0], 0),
    "ScatterElements": _scatter,
    "Shape": lambda x, a: np.array(x[0].shape, np.int64),
    "Sign": lambda x, a: np.sign(x[0]),
    "Sin": lambda x, a: np.sin(x[0]),
    "Sub": lambda x, a: x[0] - x[1],
    "TopK": _top,
    "Transpose": lambda x, a: np.transpose(x[0], a["perm"]),
    "Where": lambda x, a: np.where(x[0], x[1], x[2]),
}
