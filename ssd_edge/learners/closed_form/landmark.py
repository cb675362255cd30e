"""`landmark`, the default learner: landmark neurons, statistics along a subnetwork of them, values in closed form.

Trained by gradients to the letter of the paper, one softmax head forgets: every new class pushes down the
rows of the old ones. Here nothing is trained on the device. The neurons' keys are embeddings of pretraining images;
of what they answer only the Top-n directions are kept, those that carry most of the activity; and after each task the
values are solved from sufficient statistics along them, which no later task can spoil. What the former self
knew is in the statistics exactly, so there is no teacher to store and no image to replay.

Which part does what, and what of SSD was measured and left out: docs/landmark.md.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ssd_edge.config import setting
from ssd_edge.errors import InputError
from ssd_edge.learners.base import HeadGraph, TensorSpec
from ssd_edge.learners.closed_form.linear import PER_CLASS, LinearLearner
from ssd_edge.learners.closed_form.sums import gaussian_readout, likeliest_weight, ridge_strength, signal_scale
from ssd_edge.learners.gradient.network import prepare, respond, unit_rows
from ssd_edge.learners.priors import Priors

# Without a backbone's landmarks: the gain of random keys for each √D (a cosine with one is about 1/√D), and how the
# signal of a direction is guessed from its variance; chosen as the constants of `backbones.landmarks` were.
RANDOM_GAIN, OF_VARIANCE, FLOOR = 0.5, 0.003, 0.001
DIRECTIONS, TINY, ROUNDING = 900, 1e-12, 4e-7
SHIPPED = ("keys", "mean", "projection", "signal", "gain")


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of the default learner."""

    directions: int = setting(
        0, "n, along which statistics are kept; the state grows with n²/2; 0: all that the backbone brings, or 900",
        minimum=0, maximum=20000,
    )  # fmt: skip
    keys: Literal["pretrained", "random"] = setting("pretrained", "random where the backbone brings no landmarks")
    prior_weight: float = setting(
        0.0, "samples that the expected spread counts for beside those seen; 0: in closed form", minimum=0.0
    )
    per_class: bool = setting(False, PER_CLASS)


class Landmark(LinearLearner):
    """Landmark responses along n directions; values solved in closed form."""

    name: ClassVar[str] = "landmark"
    display: str = "landmark"
    candidate = True
    Settings: ClassVar[type] = Settings
    single: ClassVar[bool] = True

    def __init__(
        self, dim: int, settings: Any, priors: Priors, seed: int = 0, device: str | torch.device = "cpu"
    ) -> None:
        landmarks = priors.landmarks if settings.keys == "pretrained" else None
        self.shipped: dict[str, Tensor] = {}  # empty: random keys, drawn again from the seed
        if landmarks is not None:
            brought = landmarks.projection.shape[1]
            directions = settings.directions or brought
            if directions > brought:
                raise InputError(
                    f"learner.directions is {directions:,}, but the backbone's landmarks have {brought:,}; lower it, "
                    f"or make others: ssd-edge pretrain PACKAGE --student student.directions={directions}"
                )
            self.shipped = {
                "keys": torch.from_numpy(landmarks.keys).half(),
                "mean": torch.from_numpy(landmarks.mean),
                "projection": torch.from_numpy(landmarks.projection[:, :directions].copy()).half(),
                "signal": torch.from_numpy(landmarks.signal[:directions].copy()),
                "gain": torch.tensor([landmarks.gain], dtype=torch.float32),
            }
        self.directions = len(self.shipped["signal"]) if self.shipped else settings.directions or DIRECTIONS
        super().__init__(dim, settings, priors, seed, device)
        self._prepare()
        if landmarks is None and settings.keys == "pretrained":
            self.note = "the backbone brings no landmarks; random keys are used"

    def _prepare(self) -> None:
        """The constants as they are computed with."""
        if self.shipped:
            self.keys = self.shipped["keys"].float().to(self.device)
            self.mean = self.shipped["mean"].to(self.device)
            self.projection = self.shipped["projection"].float().to(self.device)
            self.gain = float(self.shipped["gain"][0])
        else:
            generator = torch.Generator().manual_seed(self.seed)
            self.keys = unit_rows(torch.randn(self.directions, self.dim, generator=generator)).to(self.device)
            self.gain = RANDOM_GAIN * math.sqrt(self.dim)

    def feature_count(self) -> int:
        return self.directions

    def features(self, embeddings: Tensor) -> Tensor:
        """Activity along the directions, ``(N, n)``."""
        response = respond(prepare(embeddings, None) @ self.keys.T, self.gain)
        return (response - self.mean) @ self.projection if self.shipped else response

    def _write_features(self, graph: HeadGraph, x: str) -> str:
        response = graph.add("Exp", graph.matmul(graph.unit(x), "keys", self.gain * self.keys.T))
        if not self.shipped:
            return response
        centred = graph.add("Sub", response, graph.weight("mean", self.mean))
        return graph.matmul(centred, "projection", self.projection)

    def solve(self) -> tuple[Tensor, Tensor, dict[str, float]]:
        statistics, freedom, size = self.statistics, self.statistics.degrees_of_freedom, self.directions
        identity, scatter = torch.eye(size, dtype=torch.float64), statistics.scatter_within()
        # Rounding second moments to float32 can turn a scatter indefinite by about this much a sample.
        square = float(statistics.second.diagonal().mean()) / max(statistics.total, 1.0)
        rounding = max(ROUNDING * math.sqrt(size) * square, TINY)
        variance = max(float(scatter.trace()) / freedom / size, rounding) if freedom else 1.0
        weight = self.settings.prior_weight or max(self._weight(scatter, variance), 1.0)
        # on the directions of landmarks the spread within pretraining classes is the identity
        covariance = (weight * variance * identity + scatter) / (weight + freedom) + rounding * identity
        if self.shipped:
            signal = self.shipped["signal"].double().diag()
        else:
            signal = OF_VARIANCE * covariance @ covariance * (size / covariance.trace()) + FLOOR * covariance
        taught = statistics.counts > 0
        centre = statistics.means.sum(0) / taught.sum().clamp_min(1)
        scale = signal_scale(statistics.means, statistics.counts, covariance, signal)
        means = (statistics.means - centre) * taught[:, None]
        values, bias = gaussian_readout(means, statistics.counts, covariance, scale * signal)
        return values, bias - centre @ values, {"prior_weight": weight, "signal_scale": scale}

    def _weight(self, scatter: Tensor, variance: float) -> float:
        """How many samples the prior spread counts for: the more cautious of two choices in closed form.

        The weight under which the scatter is likeliest trusts too few images where they vary unlike pretraining's; the
        λ of generalised cross-validation, which here is the same weight, where they are very few.
        """
        freedom = self.statistics.degrees_of_freedom
        if freedom < 1:
            return 1.0
        weight = ridge_strength(self.statistics) / variance
        if self.shipped:
            prior = variance * torch.eye(self.directions, dtype=torch.float64)
            weight = max(weight, likeliest_weight(scatter, freedom, prior))
        return weight

    def _common(self) -> dict[str, Any]:
        words = {"keys": "the landmarks", "mean": "the landmarks' mean response", "projection": "the directions",
                 "signal": "the directions' signal", "gain": "the landmarks' gain"}  # fmt: skip
        return {
            **super()._common(),
            "whether there are landmarks": bool(self.shipped),  # before what only one of the two has
            "the number of directions": self.directions,
            **({words[name]: tensor for name, tensor in self.shipped.items()} or {"the seed of the keys": self.seed}),
        }

    def schema(self) -> dict[str, TensorSpec]:
        own = super().schema()
        if not self.shipped:
            return own
        n = self.directions
        return {
            **own,
            "keys": TensorSpec(("r", "D"), "float16", "W1, the landmarks", shipped=True),
            "mean": TensorSpec(("r",), "float32", "what they answer on average", shipped=True),
            "projection": TensorSpec(("r", n), "float16", "the Top-n directions of their activity", shipped=True),
            "signal": TensorSpec((n,), "float32", "how far class means lie apart along each", shipped=True),
            "gain": TensorSpec((1,), "float32", "of their response", shipped=True),
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what `state_dict` gave, bit for bit; landmarks come with it or not."""
        self.shipped = {name: state[name] for name in SHIPPED if name in state}
        brought = self.shipped.get("projection")
        if brought is not None and brought.ndim:
            self.directions = brought.shape[-1]
        else:
            self.directions = self.settings.directions or DIRECTIONS
        super().load_state_dict(state)

    def _tensors(self) -> dict[str, Tensor]:
        return {**super()._tensors(), **self.shipped}

    def _load(self, tensors: dict[str, Tensor]) -> None:
        super()._load(tensors)
        self.shipped = {name: tensors[name] for name in self.shipped}
        self._prepare()
