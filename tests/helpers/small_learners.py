"""Small learners of every kind, with tasks for them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ssd_edge.learners import LEARNERS, Learner, Task, build
from ssd_edge.learners.priors import Priors

DIM = 12
SMALL = {"neurons": 48, "k": 4, "epochs": 3, "batch": 16}
OPTIONS: dict[str, dict[str, Any]] = {
    "ssd": {"name": "ssd", **SMALL},
    "sdmlp": {"name": "sdmlp", **SMALL},
    "finetune": {"name": "finetune", "neurons": 20, "epochs": 3, "batch": 16},
    "ncm": {"name": "ncm"},
    "slda": {"name": "slda"},
    "ridge": {"name": "ridge"},
    "ranpac": {"name": "ranpac", "features": 30},
    "klda": {"name": "klda", "features": 30},
    # settings that add tensors to the state or random draws to a task
    "ssd, random selection": {
        "name": "ssd", **SMALL, "selection": "random", "outputs": "arriving", "gaba": "keep",
    },
    "one-cycle finetune": {
        "name": "finetune", "neurons": 20, "epochs": 3, "batch": 16, "optimiser": "adamw", "one_cycle": True,
        "weight_decay": 0.05, "outputs": "arriving",
    },
    "two hidden layers": {"name": "ssd", **SMALL, "layers": 2},
    "masked": {"name": "sdmlp", **SMALL, "inhibition": "mask"},
    "sdmlp, ewc": {"name": "sdmlp", **SMALL, "penalty": "ewc", "layers": 2},
    "ssd, si": {"name": "ssd", **SMALL, "penalty": "si", "outputs": "arriving"},
    "sdmlp, mas": {"name": "sdmlp", **SMALL, "penalty": "mas"},
    "finetune, online ewc": {
        "name": "finetune", "neurons": 20, "epochs": 3, "batch": 16, "penalty": "online_ewc", "layers": 2,
    },
    "finetune, si": {"name": "finetune", "neurons": 20, "epochs": 3, "batch": 16, "penalty": "si"},
    "lwf": {"name": "lwf", "neurons": 20, "epochs": 3, "batch": 16},
    "lwf, mas": {"name": "lwf", "neurons": 20, "epochs": 3, "batch": 16, "penalty": "mas"},
    "icarl": {"name": "icarl", "neurons": 20, "epochs": 3, "batch": 16, "memory": 24},
    "der": {"name": "der", "neurons": 20, "epochs": 3, "batch": 16, "memory": 24},
    "der++": {"name": "der", "neurons": 20, "epochs": 3, "batch": 16, "memory": 24, "label_weight": 0.5},
    "pmr": {"name": "pmr", "neurons": 20, "epochs": 3, "batch": 16, "memory": 24},
    "packnet": {"name": "packnet", "neurons": 20, "epochs": 3, "batch": 16, "retrain": 2},
    "piggyback": {"name": "piggyback", "neurons": 20, "epochs": 3, "batch": 16, "mask_lr": 0.01},
    "supsup": {"name": "supsup", "neurons": 40, "epochs": 3, "batch": 16, "score_lr": 0.05},
    "supsup, logit": {"name": "supsup", "neurons": 40, "epochs": 3, "batch": 16, "score_lr": 0.05, "infer": "logit"},
    "fecam": {"name": "fecam"},
    "flymodel": {"name": "flymodel", "neurons": 50, "inputs_per_neuron": 4, "active": 0.1},
    "slda by class": {"name": "slda", "per_class": True},
    "slda, two views": {"name": "slda", "second_view": True},
    "slda by class, two views": {"name": "slda", "per_class": True, "second_view": True},
    "slda, projected": {"name": "slda", "budget_mb": 0.0006, "budget_classes": 4},
    "fecam, projected": {"name": "fecam", "budget_mb": 0.002, "budget_classes": 4},
}  # fmt: skip
OPTIONS |= {name: {"name": name} for name in LEARNERS if name not in OPTIONS}  # a new learner: with its defaults


def priors() -> Priors:
    """Return priors with every part, sized for the learners above."""
    generator = np.random.default_rng(0)

    def unit(rows: NDArray) -> NDArray:
        return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)

    mixing = generator.normal(size=(DIM, DIM))
    return Priors(
        count=1000,
        within_covariance=(mixing @ mixing.T / DIM).astype(np.float32),
        keys=unit(np.abs(generator.normal(size=(48, DIM)))),
        counters=generator.integers(0, 200, 48).astype(np.float32),
        student={"switch": 100.0},
    )


def make(case: str, seed: int = 0, empty: bool = False) -> Learner:
    return build(OPTIONS[case], DIM, Priors() if empty else priors(), seed)


def task(rows: tuple[int, ...], count: int = 60, seed: int = 0) -> Task:
    """Draw well separated Gaussian classes with two views of each sample; each row always has the same mean."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.tensor(rows).repeat(-(-count // len(rows)))[:count]
    means = 4.0 * torch.randn(10, DIM, generator=torch.Generator().manual_seed(99))
    first = means[labels] + torch.randn(count, DIM, generator=generator)
    return Task(first, labels, first + torch.sin(5 * first))
