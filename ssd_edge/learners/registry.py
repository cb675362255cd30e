"""The registry of learners: build them from settings, pack and restore their state."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from ssd_edge.config import parse_section
from ssd_edge.errors import BundleRefusedError, InputError, did_you_mean
from ssd_edge.learners.base import BASE_SCHEMA, Learner
from ssd_edge.learners.closed_form.fecam import FeCAM
from ssd_edge.learners.closed_form.flymodel import FlyModel
from ssd_edge.learners.closed_form.klda import KLDA
from ssd_edge.learners.closed_form.ncm import NCM
from ssd_edge.learners.closed_form.ranpac import RanPAC
from ssd_edge.learners.closed_form.ridge import Ridge
from ssd_edge.learners.closed_form.slda import SLDA
from ssd_edge.learners.gradient.der import DER
from ssd_edge.learners.gradient.finetune import FineTune
from ssd_edge.learners.gradient.icarl import ICaRL
from ssd_edge.learners.gradient.lwf import LwF
from ssd_edge.learners.gradient.masks import PackNet, Piggyback, SupSup
from ssd_edge.learners.gradient.penalties import PenaltySettings
from ssd_edge.learners.gradient.pmr import PMR
from ssd_edge.learners.gradient.sdmlp import SDMLPLearner
from ssd_edge.learners.gradient.ssd import SSD
from ssd_edge.learners.priors import Priors

# All learners, in the order of tables, legends and colours; every other list of learners is a query on this one.
LEARNERS: dict[str, type[Learner]] = {
    kind.name: kind
    for kind in (
        *(SLDA, SSD, SDMLPLearner, FineTune, LwF, ICaRL, DER, PMR, PackNet, Piggyback, SupSup),
        *(NCM, Ridge, RanPAC, KLDA, FeCAM, FlyModel),
    )
}
BASELINES = tuple(name for name, kind in LEARNERS.items() if kind.baseline)
PANEL = tuple(name for name, kind in LEARNERS.items() if kind.panel)
CANDIDATES = tuple(name for name, kind in LEARNERS.items() if kind.candidate)
CLOSED_FORM = tuple(name for name, kind in LEARNERS.items() if kind.family == "closed form")
SUMMED = tuple(name for name, kind in LEARNERS.items() if kind.sums_of is not Learner.sums_of)  # state is sums
MOST_FEATURES = 2**31  # of an embedding
AUTO = "auto"  # not a learner: `train` replaces it with the choice of `learners.auto` before a run starts


def _kind(name: Any) -> type[Learner]:
    if name == AUTO:
        raise InputError(
            f"learner.name={AUTO} is only resolved by `ssd-edge train` at the start of a run; choose a learner here: "
            f"{', '.join(LEARNERS)}"
        )
    if not isinstance(name, str) or name not in LEARNERS:
        known = (*LEARNERS, AUTO)
        hint = did_you_mean(str(name), known)
        raise InputError(f"unknown learner.name '{name}'.{hint} Known: {', '.join(known)}")
    return LEARNERS[name]


def settings_class(name: str) -> type:
    """Return the settings class of a learner.

    Raises:
        InputError: the name is unknown.
    """
    return _kind(name).Settings


def wants_second_view(options: Mapping[str, Any]) -> bool:
    """Return True if a learner with these options learns from a second view of each image; raises as `settings_of`."""
    settings = settings_of(options)
    return LEARNERS[options["name"]].second_views and bool(settings.second_view)


def settings_of(options: Mapping[str, Any]) -> Any:
    """Parse and check the settings of a learner.

    Args:
        options: ``name`` and settings of that learner.

    Returns:
        Instance of the learner's `Settings`.

    Raises:
        InputError: the name or a setting is unknown, a value has the wrong type or is out of range, or a penalty is set
            for a learner that is not trained by gradient descent.
    """
    values = dict(options)
    kind = _kind(values.pop("name", None))
    known = {field.name for field in dataclasses.fields(kind.Settings)}
    penalties = {field.name for field in dataclasses.fields(PenaltySettings)}
    for key in values:
        if key in penalties - known:
            suitable = [
                name
                for name, other in LEARNERS.items()
                if issubclass(other.Settings, PenaltySettings) and not other.replay
            ]
            raise InputError(
                f"learner.{key} requires a learner that is trained by gradient descent, but '{kind.name}' is not; "
                f"remove it, or use one of {', '.join(suitable)}"
            )
    return parse_section(kind.Settings, values, "learner")


def build(
    options: Mapping[str, Any], dim: int, priors: Priors, seed: int = 0, device: str | torch.device = "cpu"
) -> Learner:
    """Build a new learner.

    Args:
        options: ``name`` and settings of that learner.
        dim: dimension D of the embeddings.
        priors: priors of the backbone package.
        seed: random seed.
        device: device to compute on.

    Raises:
        InputError: see `settings_of`.
    """
    settings = settings_of(options)
    return _kind(options["name"])(dim, settings, priors, seed, device)


def pack(learner: Learner) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Return the state as arrays and metadata for `files.write_tensors`; `restore` is the inverse."""
    arrays = {name: tensor.numpy() for name, tensor in learner.state_dict().items()}
    settings = {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in dataclasses.asdict(learner.settings).items()
    }
    reasons = {name: spec.reason for name, spec in {**BASE_SCHEMA, **learner.schema()}.items()}
    metadata = {
        "learner": learner.name,
        "settings": settings,
        "dim": learner.dim,
        "seed": learner.seed,
        "reasons": reasons,
    }
    return arrays, metadata


def restore(
    arrays: Mapping[str, np.ndarray],
    metadata: Mapping[str, Any],
    device: str | torch.device = "cpu",
    dim: int | None = None,
) -> Learner:
    """Restore a learner from `pack`; its predictions are bit-identical.

    Nothing is believed that could harm later: `Learner.load_state_dict` checks every tensor against the settings, the
    range of its values and the other tensors before anything of the size that a setting names is allocated.

    Args:
        arrays: the tensors.
        metadata: kind, settings, dimension and seed of the learner.
        device: device to compute on.
        dim: dimension D of the embeddings that it will be used with; None: not known.

    Raises:
        BundleRefusedError: the metadata or a tensor does not match the learner, or its dimension is not `dim`.
    """
    try:
        settings = settings_of({**metadata["settings"], "name": metadata["learner"]})
        size, seed = metadata["dim"], metadata["seed"]
        if type(size) is not int or not 1 <= size < MOST_FEATURES:
            raise ValueError(f"dim is {size!r}")
        if type(seed) is not int or not -(2**63) <= seed < 2**63:
            raise ValueError(f"seed is {seed!r}")
        if dim not in (None, size):
            raise ValueError(f"dim is {size}, but the embeddings have {dim} features")
        learner = _kind(metadata["learner"])(size, settings, None, seed, device)
        learner.load_state_dict({name: torch.from_numpy(np.array(array)) for name, array in arrays.items()})
    except (KeyError, TypeError, ValueError, InputError) as error:
        raise BundleRefusedError(
            f"the metadata of the learner's state is invalid ({error}); restore the file"
        ) from error
    return learner
