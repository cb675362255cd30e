"""Tests of penalties: importances against per-sample autograd, the collapsed quadratic against the explicit sum."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ssd_edge.errors import InputError
from ssd_edge.learners.gradient.penalties import (
    DEFAULT_WEIGHT,
    DISPLAY,
    Linearise,
    Penalty,
    PenaltySettings,
    Slot,
    batch_fisher,
    exact_fisher,
    sensitivity,
)

pytestmark = pytest.mark.usefixtures("one_thread")

Parameters = dict[str, Tensor]
Network = Callable[[Parameters, Tensor], Tensor]  # takes one sample (D,) or many (B, D)
KINDS = list(DISPLAY)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mlp(parameters: Parameters, x: Tensor) -> Tensor:
    hidden = (x @ parameters["inner"].T + parameters["bias"]).relu()
    return hidden @ parameters["outer"].T


def top_k(parameters: Parameters, x: Tensor) -> Tensor:
    """Subtract the third largest score; the subtracted value has no gradient."""
    scores = (x @ parameters["keys"].T).relu()
    inhibition = scores.topk(3, dim=-1).values[..., -1:].detach()
    return (scores - inhibition).relu() @ parameters["values"]


def mlp_slots(parameters: Parameters) -> Linearise:
    def linearise(x: Tensor) -> tuple[Tensor, Callable[[Tensor], dict[str, Slot]]]:
        hidden = (x @ parameters["inner"].T + parameters["bias"]).relu()

        def pullback(cotangent: Tensor) -> dict[str, Slot]:
            delta = (cotangent @ parameters["outer"]) * (hidden > 0)
            return {"inner": Slot(delta, x), "bias": Slot(delta, None), "outer": Slot(cotangent, hidden)}

        return hidden @ parameters["outer"].T, pullback

    return linearise


def top_k_slots(parameters: Parameters) -> Linearise:
    def linearise(x: Tensor) -> tuple[Tensor, Callable[[Tensor], dict[str, Slot]]]:
        scores = (x @ parameters["keys"].T).relu()
        active = (scores - scores.sort(1, descending=True).values[:, 2:3]).relu()

        def pullback(cotangent: Tensor) -> dict[str, Slot]:
            delta = (cotangent @ parameters["values"].T) * (active > 0)
            return {"keys": Slot(delta, x), "values": Slot(cotangent, active, transposed=True)}

        return active @ parameters["values"], pullback

    return linearise


NETWORKS: dict[str, tuple[Network, Callable[[Parameters], Linearise], Parameters]] = {
    "mlp": (mlp, mlp_slots, {"inner": draw(7, 5), "bias": draw(7, seed=1), "outer": draw(4, 7, seed=2)}),
    "top-k": (top_k, top_k_slots, {"keys": draw(9, 5, seed=3), "values": draw(9, 4, seed=4)}),
}
INPUTS = draw(30, 5, seed=5)


def per_sample(loss: Callable[[Parameters, Tensor], Tensor], parameters: Parameters) -> Parameters:
    """Return per-sample gradients ``(30, …)`` by automatic differentiation."""
    return torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, INPUTS)


def no_network(inputs: Tensor) -> Any:
    raise AssertionError("this importance needs no data")


def close(mine: Parameters, wanted: Parameters) -> None:
    assert mine.keys() == wanted.keys()
    for name in wanted:
        assert float(wanted[name].abs().max()) > 0
        torch.testing.assert_close(mine[name], wanted[name], rtol=1e-6, atol=1e-14)


# ── importances ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("beta", [1.0, 0.08])
@pytest.mark.parametrize("network", NETWORKS)
def test_exact_fisher_equals_per_sample_gradients(network: str, beta: float) -> None:
    function, slots, parameters = NETWORKS[network]
    probability = (beta * function(parameters, INPUTS)).softmax(1)
    wanted = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    for label in range(4):
        each = per_sample(lambda p, x, y=label: (beta * function(p, x)).log_softmax(-1)[y], parameters)
        for name, gradient in each.items():
            wanted[name] += torch.einsum("n,n...->...", probability[:, label], gradient.square()) / 30
    for batch in (7, 512):
        close(exact_fisher(INPUTS, slots(parameters), beta, batch), wanted)


@pytest.mark.parametrize("network", NETWORKS)
def test_mas_equals_per_sample_gradients(network: str) -> None:
    function, slots, parameters = NETWORKS[network]
    each = per_sample(lambda p, x: function(p, x).square().sum(), parameters)
    wanted = {name: gradient.abs().mean(0) for name, gradient in each.items()}
    for batch in (7, 512):
        close(sensitivity(INPUTS, slots(parameters), batch), wanted)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize(("batch", "used"), [(4, 6), (8, 4)])
def test_batch_fisher_squares_summed_gradients_of_predictions(network: str, batch: int, used: int) -> None:
    """At most six batches are used (of 8 of size 4), and the divisor is always that of five."""
    function, slots, parameters = NETWORKS[network]
    order = torch.randperm(30, generator=torch.Generator().manual_seed(6))
    leaves = {name: parameter.clone().requires_grad_(True) for name, parameter in parameters.items()}
    wanted = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    for part in order.split(batch)[:used]:
        logits = function(leaves, INPUTS[part])
        loss = F.cross_entropy(0.08 * logits, logits.argmax(1), reduction="sum")
        for name, gradient in zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True):
            wanted[name] += gradient.square() / (5 * batch)
    mine = batch_fisher(INPUTS, slots(parameters), 0.08, batch, torch.Generator().manual_seed(6))
    close(mine, wanted)


# ── the quadratic ────────────────────────────────────────────────────────────────────────────────────


def stream(kind: str, **options: object) -> tuple[Penalty, list[Parameters], list[Parameters]]:
    """Run three tasks on a changing MLP; return the penalty, the anchors, and the importance of each task alone."""
    penalty = Penalty(PenaltySettings(penalty=kind, penalty_weight=1.7, **options), "cpu", torch.float64)
    anchors, alone = [], []
    parameters = {name: parameter.clone() for name, parameter in NETWORKS["mlp"][2].items()}
    for number in range(3):
        inputs = draw(20, 5, seed=20 + number)
        penalty.begin(parameters)
        start = {name: parameter.clone() for name, parameter in parameters.items()}
        for name, parameter in parameters.items():
            change = 0.3 * draw(*parameter.shape, seed=10 + number)
            penalty.track(name, -change - 0.02, change)
            parameters[name] = parameter + change
        penalty.consolidate(parameters, inputs, mlp_slots(parameters))
        anchors.append(parameters.copy())
        if kind in ("ewc", "online_ewc"):
            alone.append(exact_fisher(inputs, mlp_slots(parameters), 1.0, 512))
        elif kind == "mas":
            alone.append(sensitivity(inputs, mlp_slots(parameters), 512))
        elif kind == "si":
            moved = {name: parameter - start[name] for name, parameter in parameters.items()}
            alone.append({n: (d + 0.02) * d / (d.square() + 0.1) for n, d in moved.items()})
        else:
            alone.append({name: torch.ones_like(parameter) for name, parameter in parameters.items()})
    return penalty, anchors, alone


def explicit(kind: str, anchors: list[Parameters], alone: list[Parameters], at: Parameters, decay: float) -> Tensor:
    """Compute the sum over tasks as written in the papers."""
    if kind == "ewc":
        terms = list(zip(alone, anchors, strict=True))
    else:
        total = {name: torch.zeros_like(part) for name, part in alone[0].items()}
        for each in alone:
            share = {"online_ewc": decay, "l2": 0.0}.get(kind, 1.0)
            total = {name: share * total[name] + each[name] for name in total}
            if kind == "si":
                total = {name: part.clamp_min(0) for name, part in total.items()}
        terms = [(total, anchors[-1])]
    return 1.7 * sum((w[n] * (at[n] - anchor[n]).square()).sum() for w, anchor in terms for n in w)


@pytest.mark.parametrize("kind", KINDS)
def test_three_tasks_collapse_into_two_tensors(kind: str) -> None:
    options = {"penalty_decay": 0.6} if kind == "online_ewc" else {}
    penalty, anchors, alone = stream(kind, **options)
    at = {
        name: (anchor + 0.5 * draw(*anchor.shape, seed=40)).requires_grad_(True) for name, anchor in anchors[1].items()
    }
    wanted = explicit(kind, anchors, alone, at, 0.6)
    gradients = torch.autograd.grad(wanted, list(at.values()))
    torch.testing.assert_close(penalty.value(at), wanted.detach(), rtol=1e-9, atol=0)
    rows = torch.tensor([3, 0])
    for (name, parameter), gradient in zip(at.items(), gradients, strict=True):
        mine = penalty.gradient(name, parameter)
        assert not mine.requires_grad
        torch.testing.assert_close(mine, gradient, rtol=1e-9, atol=1e-12)
        assert torch.equal(penalty.gradient(name, parameter, rows), mine[rows])


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "ewc"])
def test_penalty_is_zero_at_the_last_anchor(kind: str) -> None:
    penalty, anchors, _ = stream(kind)
    assert float(penalty.value(anchors[-1])) == pytest.approx(0, abs=1e-9)
    for name, anchor in anchors[-1].items():
        assert float(penalty.gradient(name, anchor).abs().max()) < 1e-12


def test_fisher_and_beta_settings_affect_the_importance() -> None:
    parameters = NETWORKS["top-k"][2]
    for kind in ("ewc", "online_ewc"):
        penalty = Penalty(PenaltySettings(penalty=kind, fisher="batch", penalty_beta=0.3), "cpu", torch.float64)
        penalty.consolidate(parameters, INPUTS, top_k_slots(parameters), 8, torch.Generator().manual_seed(1))
        wanted = batch_fisher(INPUTS, top_k_slots(parameters), 0.3, 8, torch.Generator().manual_seed(1))
        close(penalty.importance, wanted)


# ── SI ───────────────────────────────────────────────────────────────────────────────────────────────


def test_si_path_equals_numpy() -> None:
    """Steps change whole parameters or some rows; negative sums are clamped at 0, and later tasks add to them."""
    penalty = Penalty(PenaltySettings(penalty="si", penalty_weight=1.0, si_damping=0.2), "cpu", torch.float64)
    theta, importance = np.zeros((3, 2)), np.zeros((3, 2))
    random = np.random.default_rng(0)
    for _ in range(2):
        parameter = torch.tensor(theta)
        penalty.begin({"w": parameter})
        path, start = np.zeros((3, 2)), theta.copy()
        for rows in (None, [0, 2], [1], None, [2, 0]):
            place = slice(None) if rows is None else rows
            shape = theta[place].shape
            gradient, change = random.normal(size=shape), random.normal(size=shape)
            path[place] -= gradient * change
            theta[place] += change
            chosen = None if rows is None else torch.tensor(rows)
            penalty.track("w", torch.tensor(gradient), torch.tensor(change), chosen)
        penalty.consolidate({"w": torch.tensor(theta)}, INPUTS, no_network)
        fresh = path / ((theta - start) ** 2 + 0.2)
        assert fresh.min() < 0 < fresh.max()
        importance = np.maximum(importance + fresh, 0)
        np.testing.assert_allclose(penalty.importance["w"].numpy(), importance, rtol=1e-12)
        np.testing.assert_allclose(penalty.anchored["w"].numpy(), importance * theta, rtol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_only_si_tracks(kind: str) -> None:
    penalty = Penalty(PenaltySettings(penalty=kind), "cpu")
    penalty.begin({"w": torch.zeros(2, 2)})
    penalty.track("w", torch.ones(2, 2), torch.ones(2, 2))
    assert penalty.tracks == (kind == "si") == bool(penalty.path)


# ── growth, settings, state ──────────────────────────────────────────────────────────────────────────


def test_new_rows_and_columns_have_no_importance() -> None:
    """A 2 x 3 parameter grows after one task; L2 applies only to its old part until the next anchor."""
    penalty = Penalty(PenaltySettings(penalty="l2", penalty_weight=0.5), "cpu", torch.float64)
    small, large = {"w": draw(2, 3)}, {"w": draw(4, 5, seed=1)}
    penalty.consolidate(small, INPUTS, no_network)
    difference = torch.zeros(4, 5, dtype=torch.float64)
    difference[:2, :3] = large["w"][:2, :3] - small["w"]
    wanted = (0.5 * difference.square().sum(), difference, penalty.tensors(large)["importance_w"])
    assert wanted[2].sum() == 6
    for step in ("before", "after"):  # the state may be read before the task begins
        torch.testing.assert_close(penalty.value(large), wanted[0], msg=step)
        torch.testing.assert_close(penalty.gradient("w", large["w"]), wanted[1], msg=step)
        torch.testing.assert_close(penalty.gradient("w", large["w"], torch.tensor([3, 1])), wanted[1][[3, 1]])
        penalty.begin(large)
        assert torch.equal(penalty.importance["w"], wanted[2])
    penalty.consolidate(large, INPUTS, no_network)
    assert penalty.importance["w"].sum() == 20


def test_ewc_sums_over_tasks_that_grow() -> None:
    """Outputs grow from two to four; the anchor of the first task covers only the first two."""
    penalty = Penalty(PenaltySettings(penalty="ewc", penalty_weight=1.0), "cpu", torch.float64)
    keys, values = draw(6, 5), draw(6, 4, seed=1)
    first, second = {"keys": keys, "values": values[:, :2]}, {"keys": keys + 0.1, "values": values + 0.1}
    at = {"keys": keys - 0.3, "values": values + 0.2}
    wanted = torch.zeros((), dtype=torch.float64)
    for task in (first, second):
        penalty.begin(task)
        penalty.consolidate(task, INPUTS, top_k_slots(task))
        for name, part in exact_fisher(INPUTS, top_k_slots(task), 1.0, 512).items():
            wanted += (part * (at[name][:, : part.shape[1]] - task[name]).square()).sum()
    torch.testing.assert_close(penalty.value(at), wanted, rtol=1e-10, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_restored_penalty_equals_the_saved_one(kind: str) -> None:
    penalty, anchors, _ = stream(kind)
    at = {name: anchor + 0.1 for name, anchor in anchors[-1].items()}
    again = Penalty(penalty.settings, "cpu", torch.float64)
    again.load({name: tensor.clone() for name, tensor in penalty.tensors(at).items()})
    assert again.active
    assert torch.equal(again.value(at), penalty.value(at))
    for name, parameter in at.items():
        assert torch.equal(again.gradient(name, parameter), penalty.gradient(name, parameter))
    described = penalty.schema({"inner": (7, "D"), "bias": (7,), "outer": ("C", 7)}, "float64")
    assert described.keys() == penalty.tensors(at).keys()
    assert (described["importance_outer"].shape, described["importance_outer"].dtype) == (("C", 7), "float64")
    assert (described["penalty_constant"].shape, described["penalty_constant"].dtype) == ((1,), "float64")
    assert all(len(spec.reason) > 5 for spec in described.values())


@pytest.mark.parametrize("kind", KINDS)
def test_before_the_first_anchor(kind: str) -> None:
    penalty, parameters = Penalty(PenaltySettings(penalty=kind), "cpu"), {"w": torch.ones(2, 3)}
    for _ in range(2):  # again for the restored state
        assert not penalty.active
        assert float(penalty.value(parameters)) == 0
        assert torch.equal(penalty.gradient("w", parameters["w"], torch.tensor([1])), torch.zeros(1, 3))
        tensors = penalty.tensors(parameters)
        assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
            "importance_w": (2, 3), "anchored_w": (2, 3), "penalty_constant": (1,),
        }  # fmt: skip
        assert not any(bool(tensor.any()) for tensor in tensors.values())
        penalty = Penalty(PenaltySettings(penalty=kind), "cpu")
        penalty.load(tensors)


def test_no_penalty_has_no_state() -> None:
    penalty, parameters = Penalty(PenaltySettings(), "cpu"), {"w": torch.ones(2, 3)}
    penalty.begin(parameters)
    penalty.consolidate(parameters, INPUTS, no_network)
    penalty.load({})
    assert (penalty.active, penalty.tracks) == (False, False)
    assert penalty.tensors(parameters) == penalty.schema({"w": (2, 3)}, "float32") == {}
    assert not penalty.gradient("w", parameters["w"]).any()


@pytest.mark.parametrize(("weight", "used"), [(-1.0, DEFAULT_WEIGHT["l2"]), (0.0, 0.0), (4.0, 4.0)])
def test_weights(weight: float, used: float) -> None:
    penalty = Penalty(PenaltySettings(penalty="l2", penalty_weight=weight), "cpu", torch.float64)
    anchor = draw(2, 3)
    penalty.consolidate({"w": anchor}, INPUTS, no_network)
    assert penalty.active == (used > 0)
    torch.testing.assert_close(penalty.gradient("w", anchor + 1), torch.full((2, 3), 2 * used, dtype=torch.float64))


def test_weight_between_minus_one_and_zero_raises() -> None:
    with pytest.raises(InputError, match=r"at least 0, or -1 for the method's default, but is -0.5"):
        Penalty(PenaltySettings(penalty="ewc", penalty_weight=-0.5), "cpu")


def test_every_penalty_has_a_weight_and_a_name() -> None:
    assert DEFAULT_WEIGHT.keys() == DISPLAY.keys()
