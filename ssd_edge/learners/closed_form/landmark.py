"""`landmark`, the default learner: statistics along directions of landmark responses, values in closed form.

The keys of the neurons are embeddings of pretraining images. Their responses are projected onto the n directions that
separate pretraining classes best, and after each task the output weights are solved from sufficient statistics along
these directions. The state is exact for all earlier tasks, so there is neither a teacher nor replay.
docs/landmark.md describes the method and its ablations.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ssd_edge.config import setting
from ssd_edge.errors import BundleRefusedError, InputError
from ssd_edge.learners.base import HeadGraph, TensorSpec, check_drawn, check_unit
from ssd_edge.learners.closed_form.linear import PER_CLASS, LinearLearner
from ssd_edge.learners.closed_form.sums import gaussian_readout, likeliest_weight, ridge_strength, signal_scale
from ssd_edge.learners.gradient.network import respond, unit_rows
from ssd_edge.learners.priors import MOST_GAIN, Priors

# For random keys: the gain per √D (cosines are about 1/√D), and the expected signal of a direction as shares of its
# squared and plain variance. Chosen like the constants of `backbones.landmarks`.
RANDOM_GAIN, SIGNAL_OF_VARIANCE, SIGNAL_FLOOR = 0.5, 0.003, 0.001
DIRECTIONS = 900  # with random keys
MIN_VARIANCE = 1e-12
KEYS_ROUNDING = 2e-3  # of the length of keys in float16
ROUNDING = 4e-7  # relative error of float32 second moments, per √n and sample
DESCRIPTIONS = {  # of the constants that come with the backbone
    "keys": "the landmarks",
    "mean": "the landmarks' mean response",
    "projection": "the directions",
    "signal": "the directions' signal",
    "gain": "the landmarks' gain",
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of the default learner."""

    directions: int = setting(
        0, "number of directions n; the state grows with n²/2; 0: all of the backbone's, or 900",
        minimum=0, maximum=20000,
    )  # fmt: skip
    keys: Literal["pretrained", "random"] = setting(
        "pretrained", "keys of the neurons; random if the backbone has no landmarks"
    )
    prior_weight: float = setting(
        0.0, "weight of the expected within-class covariance in samples; 0: estimated", minimum=0.0
    )
    per_class: bool = setting(False, PER_CLASS)


class Landmark(LinearLearner):
    """Probabilistic LDA on landmark responses along n directions."""

    name: ClassVar[str] = "landmark"
    display: str = "landmark"
    candidate = True
    Settings: ClassVar[type] = Settings
    single: ClassVar[bool] = True

    def _configure(self) -> None:
        self.shipped: dict[str, Tensor] = {}  # empty with random keys, which are drawn from the seed
        self.directions: int = self.settings.directions or DIRECTIONS

    def _start(self, priors: Priors) -> None:
        settings: Settings = self.settings
        landmarks = priors.landmarks if settings.keys == "pretrained" else None
        if landmarks is not None:
            available = landmarks.projection.shape[1]
            directions = settings.directions or available
            if directions > available:
                raise InputError(
                    f"learner.directions is {directions:,}, but the backbone's landmarks have {available:,}; lower it, "
                    f"or make new ones: ssd-edge pretrain PACKAGE --student student.directions={directions}"
                )
            self.shipped = {
                "keys": torch.from_numpy(landmarks.keys).half(),
                "mean": torch.from_numpy(landmarks.mean),
                "projection": torch.from_numpy(landmarks.projection[:, :directions].copy()).half(),
                "signal": torch.from_numpy(landmarks.signal[:directions].copy()),
                "gain": torch.tensor([landmarks.gain], dtype=torch.float32),
            }
            self.directions = directions
        elif settings.keys == "pretrained":
            self.note = "the backbone has no landmarks; random keys are used"
        super()._start(priors)
        self.keys, self.mean, self.projection, self.gain = self._constants()

    def _constants(self) -> tuple[Tensor, Tensor, Tensor, float]:
        """Return keys, mean and projection on the device, and the gain; mean and projection are empty if unused."""
        if self.shipped:
            keys, mean, projection = (self.shipped[name] for name in ("keys", "mean", "projection"))
            gain = float(self.shipped["gain"][0])
            return keys.float().to(self.device), mean.to(self.device), projection.float().to(self.device), gain
        check_drawn(self.directions * self.dim, f"the keys of {self.directions:,} directions")
        generator = torch.Generator().manual_seed(self.seed)
        keys = unit_rows(torch.randn(self.directions, self.dim, generator=generator)).to(self.device)
        return keys, torch.zeros(0), torch.zeros(0, 0), RANDOM_GAIN * math.sqrt(self.dim)

    def feature_count(self) -> int:
        return self.directions

    def features(self, embeddings: Tensor) -> Tensor:
        """Return the responses along the directions, ``(N, n)``."""
        response = respond(unit_rows(embeddings) @ self.keys.T, self.gain)
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
        # Rounding the second moments to float32 can make the scatter indefinite by about this much per sample.
        square = float(statistics.second.diagonal().mean()) / max(statistics.total, 1.0)
        rounding = max(ROUNDING * math.sqrt(size) * square, MIN_VARIANCE)
        variance = max(float(scatter.trace()) / freedom / size, rounding) if freedom else 1.0
        weight = self.settings.prior_weight or max(self._weight(scatter, variance), 1.0)
        # The prior is a multiple of the identity, which is the within-class covariance of pretraining classes.
        covariance = (weight * variance * identity + scatter) / (weight + freedom) + rounding * identity
        if self.shipped:
            signal = self.shipped["signal"].double().diag()
        else:
            signal = SIGNAL_OF_VARIANCE * covariance @ covariance * (size / covariance.trace())
            signal = signal + SIGNAL_FLOOR * covariance
        learned = statistics.counts > 0
        centre = statistics.means.sum(0) / learned.sum().clamp_min(1)
        scale = signal_scale(statistics.means, statistics.counts, covariance, signal)
        means = (statistics.means - centre) * learned[:, None]
        values, bias = gaussian_readout(means, statistics.counts, covariance, scale * signal)
        return values, bias - centre @ values, {"prior_weight": weight, "signal_scale": scale}

    def _weight(self, scatter: Tensor, variance: float) -> float:
        """Return the weight of the prior covariance in samples: the larger of two estimates.

        The maximum-likelihood weight is too small if the images vary unlike those of pretraining; the λ of generalised
        cross-validation, which is the same weight on this scale, is too small for very few images.
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
        shipped = {DESCRIPTIONS[name]: tensor for name, tensor in self.shipped.items()}
        return {
            **super()._common(),
            "the presence of landmarks": bool(self.shipped),  # first: the items below exist for one kind only
            "the number of directions": self.directions,
            **(shipped or {"the seed of the keys": self.seed}),
        }

    def schema(self) -> dict[str, TensorSpec]:
        learned, n = super().schema(), self.directions
        if not self.shipped:
            return learned
        return {
            **learned,
            "keys": TensorSpec(("r", "D"), "float16", "landmarks, the keys of the neurons", shipped=True),
            "mean": TensorSpec(("r",), "float32", "mean responses of the landmarks", shipped=True, least=0),
            "projection": TensorSpec(("r", n), "float16", "directions of the responses", shipped=True),
            "signal": TensorSpec(
                (n,), "float32", "expected variance of class means per direction", shipped=True, least=0
            ),
            "gain": TensorSpec((1,), "float32", "gain of the responses", shipped=True, least=0, most=MOST_GAIN),
        }

    def _check(self, state: dict[str, Tensor]) -> None:
        super()._check(state)
        if self.shipped:
            check_unit(state["keys"], KEYS_ROUNDING, "the landmarks")
            largest, most = float(state["mean"].max()), math.exp(float(state["gain"][0]))
            if largest > (1 + KEYS_ROUNDING) * most:
                raise BundleRefusedError(
                    f"the mean response of a landmark is {largest:g}, but its largest is {most:g}; restore the file"
                )
            if not bool(state["signal"].any()):
                raise BundleRefusedError("the directions of the landmarks have no signal; restore the file")

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore a state from `state_dict`, with or without landmarks."""
        self.shipped = {name: state[name] for name in DESCRIPTIONS if name in state}
        projection = self.shipped.get("projection")
        if projection is not None and projection.ndim:
            self.directions = projection.shape[-1]
        else:
            self.directions = self.settings.directions or DIRECTIONS
        super().load_state_dict(state)

    def _tensors(self) -> dict[str, Tensor]:
        return {**super()._tensors(), **self.shipped}

    def _load(self, tensors: dict[str, Tensor]) -> None:
        super()._load(tensors)
        self.shipped = {name: tensors[name] for name in self.shipped}
        self.keys, self.mean, self.projection, self.gain = self._constants()
