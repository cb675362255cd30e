"""Tests of the compiled epoch against PyTorch and dense autograd, in float64 within 1e-9.

Counters are compared exactly, which reveals any neuron that the lazy Top-K misses or wrongly adds in any step.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("numba")

from ssd_edge.errors import InputError
from ssd_edge.learners import LEARNERS, Learner, Task
from ssd_edge.learners.gradient import epoch
from ssd_edge.learners.priors import Priors
from ssd_edge.run import bench

pytestmark = pytest.mark.usefixtures("one_thread")

DIM = 12


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[epoch.CompiledEpochs]:
    """Record the object that runs each compiled epoch."""
    engines: list[epoch.CompiledEpochs] = []
    run = epoch.CompiledEpochs.run

    def noted(self: epoch.CompiledEpochs, order: torch.Tensor) -> dict[str, float]:
        engines.append(self)
        return run(self, order)

    monkeypatch.setattr(epoch.CompiledEpochs, "run", noted)
    return engines


def make(name: str, engine: str, dtype: torch.dtype = torch.float64, given: Priors | None = None, **options: Any):
    kind = type("Double", (LEARNERS[name],), {"dtype": dtype})
    settings = {"neurons": 120, "k": 3, "batch": 16, "epochs": 4, "lr": 0.5, "engine": engine, **options}
    if given is None:
        settings = {"inhibition": "subtract", **settings}
    return kind(DIM, LEARNERS[name].Settings(**settings), given or Priors(), seed=4)


def task(rows: tuple[int, int], seed: int, count: int = 90) -> Task:
    """Return two noisy classes with one sample that is zero after the ReLU and one duplicate."""
    generator = torch.Generator().manual_seed(seed)
    means, labels = torch.randn(2, DIM, generator=generator), torch.arange(count) % 2
    embeddings = means[labels] + 0.7 * torch.randn(count, DIM, generator=generator)
    embeddings[0], embeddings[2] = -1.0, embeddings[4]
    return Task(embeddings, torch.tensor(rows)[labels])


def both(name: str, ran: list, **options: Any) -> tuple[Learner, Learner]:
    """Train a compiled and a plain learner on the same two tasks, and compare their measurements."""
    fast, plain = make(name, "compiled", **options), make(name, "torch", **options)
    for learner in (fast, plain):
        learner.expect(5)
    for new in (task((1, 3), 1), task((2, 0), 2)):
        measured, expected = fast.learn(new), plain.learn(new)
        assert measured.keys() == expected.keys()
        for key, value in expected.items():
            assert measured[key] == pytest.approx(value, rel=1e-7, abs=1e-10), key
    assert ran
    return fast, plain


def assert_same(fast: Learner, plain: Learner, tolerance: float = 1e-9) -> None:
    mine, other = fast.state_dict(), plain.state_dict()
    for name, tensor in other.items():
        torch.testing.assert_close(mine[name], tensor, rtol=0, atol=0 if "counters" in name else tolerance, msg=name)


NETWORKS = [
    {},
    {"clip": 0.05},
    {"lr": 20.0, "clip": 20.0, "epochs": 6},  # keys move far: no proof for most samples
    {"lr": 0.01, "epochs": 8},
    {"k": 1},
    {"k": 14},  # the largest k that is sparse
    {"neurons": 40, "k": 4, "batch": 7},
    {"neurons": 700, "k": 10, "batch": 200},  # one step per epoch
    {"inhibition": "mask"},
    {"outputs": "arriving"},
]


@pytest.mark.parametrize("options", NETWORKS, ids=str)
def test_network_equals_plain_pytorch(options: dict[str, Any], ran: list) -> None:
    assert_same(*both("sdmlp", ran, **options))


DISTILLED = [
    {},
    {"top_n": "40", "temperature": 2.0, "hidden_weight": 0.6, "ce_weight": 0.3},
    {"top_n": "120", "temperature": 0.1, "hidden_weight": 1.0},
    {"hidden_weight": 0.0, "logit_scope": "old"},
    {"logit_scope": "seen", "selection": "random"},
    {"inhibition": "mask", "temperature": 0.2, "hidden_weight": 0.5},
    {"lr": 10.0, "clip": 10.0, "top_n": "30", "hidden_weight": 0.5, "temperature": 0.5},
]


@pytest.mark.parametrize("options", DISTILLED, ids=str)
def test_distillation_equals_plain_pytorch(options: dict[str, Any], ran: list) -> None:
    assert_same(*both("ssd", ran, **options))


PENALISED = [
    {"penalty": "ewc"},
    {"penalty": "ewc", "fisher": "batch", "penalty_beta": 0.08, "penalty_weight": 100.0},
    {"penalty": "ewc", "penalty_weight": 1e4, "clip": 0.05},  # clipped in every step
    {"penalty": "ewc", "penalty_weight": 1e3, "lr": 0.05, "epochs": 8},  # never clipped
    {"penalty": "ewc", "neurons": 400, "batch": 5},  # rows wait for many steps
    {"penalty": "online_ewc", "penalty_decay": 0.5},
    {"penalty": "si", "penalty_beta": 0.02, "penalty_weight": 50.0},
    {"penalty": "si", "inhibition": "mask", "batch": 40},
    {"penalty": "si", "penalty_weight": 0.0},  # tracks without a penalty
    {"penalty": "mas", "memory_rows": 40},
    {"penalty": "l2", "penalty_weight": 0.5},  # stronger than the data
    {"penalty": "l2", "outputs": "arriving", "k": 1},
]


@pytest.mark.parametrize("options", PENALISED, ids=str)
@pytest.mark.parametrize("name", ["sdmlp", "ssd"])
def test_penalties_equal_plain_pytorch(name: str, options: dict[str, Any], ran: list) -> None:
    fast, plain = both(name, ran, **options)
    assert_same(fast, plain)
    assert fast.penalty.active == (options.get("penalty_weight") != 0.0)
    for tensors in (fast.penalty.importance, fast.penalty.anchored):
        assert all(bool(tensor.isfinite().all()) for tensor in tensors.values())


@pytest.mark.parametrize("clip", [10.0, 0.02])
def test_penalty_revives_dead_keys(clip: float, ran: list) -> None:
    """A step from a zero key towards its anchor ends at unit length, however small the gradient is."""
    options = {"penalty": "l2", "penalty_weight": 1e-4, "neurons": 400, "batch": 5, "lr": 0.05, "clip": clip}
    fast, plain = make("sdmlp", "compiled", **options), make("sdmlp", "torch", **options)
    for learner in (fast, plain):
        learner.expect(5)
        learner.learn(task((1, 3), 1))
        learner.net.layers[0].keys[::3] = 0
        learner.learn(task((2, 0), 2))
        assert bool((learner.net.keys[::3].norm(dim=1) > 0.99).all())
    assert ran
    assert_same(fast, plain)


def priors(opened: int, neurons: int = 120, switch: float = 300.0) -> Priors:
    """Return keys of which three are dead, six are equal in pairs, and the first ones have open switches."""
    keys = torch.randn(neurons, DIM, generator=torch.Generator().manual_seed(9)).clamp_min(0)
    keys[[0, 1, 20]] = 0.0
    keys[30:33] = keys[33:36]
    counters = np.where(np.arange(neurons) < opened, np.arange(neurons) % 3 * 100.0, 1e6)
    return Priors(keys=F.normalize(keys).numpy(), counters=counters, student={"switch": switch})


@pytest.mark.parametrize("opened", [0, 1, 10])
@pytest.mark.parametrize(("name", "penalty"), [("sdmlp", "none"), ("ssd", "none"), ("sdmlp", "si"), ("ssd", "ewc")])
def test_dead_and_equal_keys_and_open_switches(name: str, penalty: str, opened: int, ran: list) -> None:
    given = priors(opened)
    fast, plain = both(name, ran, given=given, gaba="keep", epochs=6, penalty=penalty)
    assert_same(fast, plain)
    if opened:  # dead keys are excited, and one of ten open switches has closed
        assert float(fast.net.counters[0]) > 0
        assert bool((fast.net.counters[:opened] > 300).any()) == (opened == 10)


@pytest.mark.parametrize("closing", [0.6, 0.9, 0.99])
@pytest.mark.parametrize(("name", "penalty"), [("sdmlp", "none"), ("ssd", "none"), ("ssd", "ewc")])
def test_every_switch_a_little_open(name: str, penalty: str, closing: float, ran: list) -> None:
    """After pretraining most counters are a little below C; they reach it while the task is learned."""
    generator = torch.Generator().manual_seed(5)
    keys = F.normalize(torch.randn(500, DIM, generator=generator).clamp_min(0))
    counters = 1000 * (closing + (1 - closing) * torch.rand(500, generator=generator))
    given = Priors(keys=keys.numpy(), counters=counters.numpy(), student={"switch": 1000.0})
    fast, plain = both(name, ran, given=given, gaba="keep", neurons=500, k=5, epochs=12, penalty=penalty, lr=0.1)
    assert_same(fast, plain)
    engine = ran[-1]
    assert engine.full < engine.samples  # the caches prove something
    assert 0 < int((fast.net.counters < 1000).sum()) < 500


@pytest.mark.parametrize("seed", range(12))
def test_random_shapes(seed: int, ran: list) -> None:
    draw = np.random.default_rng(seed)
    neurons = int(draw.integers(24, 400))
    most = min(neurons // 8 - 1, 12)
    options = {
        "neurons": neurons,
        "k": int(draw.integers(1, most + 1)),
        "batch": int(draw.integers(1, 100)),
        "lr": float(10 ** draw.uniform(-2, 1)),
        "clip": float(10 ** draw.uniform(-2, 1)),
        "epochs": int(draw.integers(1, 6)),
        "inhibition": str(draw.choice(["subtract", "mask"])),
        "penalty": str(draw.choice(["none", "ewc", "si", "mas", "l2"])),
        "penalty_weight": float(10 ** draw.uniform(-3, 3)),
        "top_n": str(neurons // 3),
        "temperature": float(10 ** draw.uniform(-1, 1)),
    }
    assert_same(*both("ssd", ran, **options))


@pytest.mark.parametrize("changes", [{}, {"penalty": "ewc"}, {"penalty": "si"}, {"inhibition": "gaba"}], ids=str)
def test_dense_autograd(changes: dict[str, Any]) -> None:
    """Compare with independent code: every neuron, by autograd, in the same order of samples."""
    options = {"neurons": 200, "top_n": "50", "temperature": 0.5, "hidden_weight": 0.6, "epochs": 5, **changes}
    learner, twin = (make("ssd", engine, **options) for engine in ("compiled", "torch"))
    learner.expect(5)
    if "inhibition" in changes:
        learner.switch = learner.net.switch = 2000.0
        learner.net.layers[0].counters += torch.linspace(1900, 2000, 200)
    learner.learn(task((1, 3), 1))
    generator, new, net = learner.generator(), task((2, 0), 2), learner.net
    twin.load_state_dict(learner.state_dict())
    trainer = twin.trainer(new)
    keys, values = net.keys.clone(), net.values.clone()
    for _ in range(5):
        order = torch.randperm(len(new.labels), generator=generator)
        keys, values = bench.dense_epoch(twin, trainer, keys, values, order)
    twin.net.layers[0].keys, twin.net.values = keys, values
    twin.penalty.consolidate(twin.parameters(), trainer.inputs, twin.net.linearise)
    before = float((keys - net.keys).abs().max())
    learner.learn(new)
    assert before > 1e-3
    found, expected = learner.state_dict(), twin.state_dict()
    compared = [name for name in found if name.startswith(("keys", "values", "counters", "importance", "anchored"))]
    for name in compared:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-9)
    assert len(compared) == (7 if "penalty" in changes else 3)


def test_float32(ran: list) -> None:
    """In the default dtype states agree within rounding, and nearly all predictions are equal."""
    learners = []
    for engine in ("compiled", "torch"):
        learner = make("ssd", engine, torch.float32, neurons=600, k=6)
        learner.expect(4)
        for rows, seed in (((0, 1), 1), ((2, 3), 2)):
            learner.learn(task(rows, seed, 400))
        learners.append(learner)
    fast, plain = learners
    torch.testing.assert_close(fast.net.keys, plain.net.keys, rtol=0, atol=1e-4)
    torch.testing.assert_close(fast.net.values, plain.net.values, rtol=0, atol=1e-4)
    asked = torch.cat([task((0, 1), 1, 1000).embeddings, task((2, 3), 2, 1000).embeddings])
    assert float((fast.predict(asked) == plain.predict(asked)).double().mean()) >= 0.995
    assert ran[-1].net is fast.net


def test_a_steep_penalty_leaves_proofs_intact(ran: list) -> None:
    """A row catches up before the bound on its distance exceeds what the proofs allow."""
    learner = make("sdmlp", "compiled", neurons=600, k=5, lr=0.05, epochs=4, penalty="ewc", penalty_weight=1e4)
    learner.expect(4)
    for rows, seed in (((0, 1), 1), ((2, 3), 2)):
        learner.learn(task(rows, seed, 600))
    assert ran[-1].full < ran[-1].samples / 4


def test_few_neurons_are_evaluated_and_no_array_is_samples_by_neurons(ran: list) -> None:
    learner = make("sdmlp", "compiled", neurons=3000, k=5, lr=0.5, epochs=6)
    learner.learn(task((0, 1), 1, 400))
    engine = ran[-1]
    assert engine.fills == 1
    assert engine.full <= 0.02 * engine.samples
    assert 0 < engine.evaluated < 0.1 * engine.neurons
    caches, lanes = engine.search
    held = sum(array.nbytes for group in (caches, lanes, engine.teacher) for array in group) - lanes.blocks.nbytes
    assert held < 0.1 * engine.samples * engine.neurons * 8
    assert lanes.blocks.nbytes <= epoch.LANES_SHARE * learner.net.keys.numpy().nbytes + 64 * DIM * 8


def test_useless_caches_are_abandoned(ran: list, monkeypatch: pytest.MonkeyPatch) -> None:
    """Caches prove nothing if keys move far and there are almost no lanes for them."""
    monkeypatch.setattr(epoch, "LANES_LEAST", 2)
    monkeypatch.setattr(epoch, "LANES_SHARE", 0.0)
    options = {"neurons": 400, "k": 8, "lr": 20.0, "clip": 20.0, "epochs": 30}
    fast, plain = make("sdmlp", "compiled", **options), make("sdmlp", "torch", **options)
    for learner in (fast, plain):
        learner.learn(task((0, 1), 1, 200))
    assert_same(fast, plain)
    assert 1 < len(ran) < 20  # of 30 epochs; the others ran in PyTorch
    assert ran[-1].fills > 1


def test_resume_after_early_stop_gives_identical_weights() -> None:
    def learn(stop: float) -> tuple[Learner, dict[str, float]]:
        learner = make("ssd", "compiled", torch.float64, epochs=6)
        return learner, learner.learn(task((0, 1), 1), lambda share: share >= stop)

    whole, short = learn(1.0), learn(0.5)
    assert (whole[1]["epochs"], short[1]["epochs"]) == (6.0, 3.0)
    assert "cross_entropy_gradient_last" not in short[1]
    resumed = make("ssd", "compiled", torch.float64, epochs=6)
    resumed.load_state_dict(whole[0].state_dict())
    for learner in (whole[0], resumed):
        learner.learn(task((2, 3), 2))
    expected = whole[0].state_dict()
    differ = {
        name: float((tensor.double() - expected[name].double()).abs().max())
        for name, tensor in resumed.state_dict().items()
        if not torch.equal(tensor, expected[name])
    }
    assert not differ


def test_divergence_raises() -> None:
    with pytest.raises(InputError, match=r"SDMLP diverged in epoch \d.*; lower learner.lr"):
        make("sdmlp", "compiled", torch.float32, lr=1e38, clip=1e38).learn(task((0, 1), 1))


def test_machine_code_that_cannot_be_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    from ssd_edge.learners.gradient import kernels

    def full_disk(*arguments: Any) -> None:
        raise OSError("no space left on device")

    kept = kernels._kernel
    monkeypatch.setattr(kernels, "_kernel", full_disk)
    monkeypatch.setattr(kernels, "_compiled", lambda cache: kept if not cache else full_disk)
    learner = make("sdmlp", "compiled")
    assert math.isfinite(learner.learn(task((0, 1), 1))["cross_entropy"])
