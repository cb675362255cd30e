"""Tests of selective distillation for any module: against PyTorch's functions, and the examples of docs/plug-in.md."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssd_edge.errors import InputError
from ssd_edge.learners.gradient.selective import SelectiveDistillation, TopK, activation_frequencies
from ssd_edge.learners.gradient.topk import inhibit

pytestmark = pytest.mark.usefixtures("one_thread")

PAGE = Path(__file__).resolve().parents[4] / "docs" / "plug-in.md"


class Net(nn.Module):
    """Two Top-K layers: channels of a convolution, and features."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.maps = nn.Sequential(nn.Conv1d(3, 12, 1), TopK(12, 3, dim=1))
        self.top = nn.Sequential(nn.Linear(12, 10), TopK(10, 4))
        self.head = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.top(self.maps(x).mean(2)))


def data(seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(16, 3, 5, generator=generator), torch.randint(0, 4, (16,), generator=generator)


def moved(net: nn.Module) -> None:
    """Change all parameters, so that student and teacher differ."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("k", [1, 4, 10])
def test_topk_equals_the_inhibition_of_sdmlp(k: int) -> None:
    x = torch.randn(20, 10, generator=torch.Generator().manual_seed(0))
    wanted = inhibit(x, k).to_dense()
    torch.testing.assert_close(TopK(10, k)(x), wanted)
    assert torch.equal(TopK(10, k, dim=1)(x.T[None])[0].T, TopK(10, k)(x))
    assert int((wanted > 0).sum(1).max()) <= k


def test_gradient_passes_active_neurons_alone() -> None:
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    activations = TopK(8, 3)(x)
    activations.sum().backward()
    assert torch.equal(x.grad, (activations > 0).float())


@pytest.mark.parametrize(
    "options", [{}, {"hidden": "mse", "hidden_weight": 0.6, "temperature": 2.0, "top_n": 5}], ids=str
)
def test_loss_equals_autograd(options: dict[str, Any]) -> None:
    net, (inputs, labels) = Net(), data()
    distil = SelectiveDistillation(net, **options)
    torch.testing.assert_close(distil.loss(inputs, labels), F.cross_entropy(net(inputs), labels))  # the first task
    distil.end_task([inputs[:9], inputs[9:]])
    old, (inputs, labels) = distil.teacher, data(2)
    moved(net)
    weight, temperature = options.get("hidden_weight", 0.1), options.get("temperature", 8.0)

    def kl(student: Tensor, teacher: Tensor) -> Tensor:
        q, p = (F.log_softmax(part / temperature, 1) for part in (student, teacher))
        return temperature**2 * F.kl_div(q, p, log_target=True, reduction="batchmean")

    def activations(of: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
        maps = of.maps(inputs)
        top = of.top(maps.mean(2))
        return maps.movedim(1, -1).reshape(-1, 12), top, of.head(top)

    terms = []
    for name, mine, theirs in zip(("maps.1", "top.1"), activations(net)[:2], activations(old)[:2], strict=True):
        index = distil.tables[name].indices
        assert len(index) == options.get("top_n", {"maps.1": 3, "top.1": 4}[name])
        pair = mine[:, index], theirs[:, index].detach()
        terms.append((pair[0] - pair[1]).square().sum(1).mean() if options else kl(*pair))
    logits = kl(activations(net)[2], activations(old)[2].detach())
    wanted = 0.7 * F.cross_entropy(net(inputs), labels) + 0.3 * (weight * sum(terms) / 2 + (1 - weight) * logits)
    loss, parameters = distil.loss(inputs, labels), list(net.parameters())
    torch.testing.assert_close(loss, wanted)
    assert all(parameter.grad is None for parameter in old.parameters())
    for mine, theirs in zip(*(torch.autograd.grad(each, parameters) for each in (loss, wanted)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def test_tables_are_the_most_frequent_neurons() -> None:
    net, (inputs, _) = Net(), data()
    frequencies = activation_frequencies(net, [inputs[:5], inputs[5:]])
    torch.testing.assert_close(frequencies["maps.1"], (net.maps(inputs) > 0).double().mean((0, 2)).float())
    distil = SelectiveDistillation(net, top_n="1.5k")
    distil.end_task([inputs])
    found = distil.tables["top.1"]
    assert torch.equal(found.frequencies, frequencies["top.1"].sort(descending=True).values[:6])


def test_outputs_may_be_added() -> None:
    net, (inputs, labels) = Net(), data()
    distil = SelectiveDistillation(net)
    distil.end_task([inputs])
    net.head = nn.Linear(10, 6)
    distil.loss(inputs, labels + 2).backward()
    assert float(net.head.weight.grad[4:].abs().sum()) > 0


def test_what_cannot_be_distilled_raises() -> None:
    with pytest.raises(InputError, match="no TopK layer"):
        SelectiveDistillation(nn.Linear(3, 3))
    with pytest.raises(InputError, match="no inputs to count"):
        SelectiveDistillation(Net()).end_task([])
    with pytest.raises(InputError, match="top_n gives 99 neurons"):
        SelectiveDistillation(Net(), top_n=99)
    with pytest.raises(InputError, match="between 1 and the number of neurons, but is 5 of 4"):
        TopK(4, 5)


def test_examples_of_the_page() -> None:
    """Both modules forget the first task without distillation and keep it with it."""
    namespace: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL):
        exec(block, namespace)
    for kind in ("cnn", "ffn"):
        (lost, learned), (kept, learned_too) = namespace[f"{kind}_without"], namespace[f"{kind}_with"]
        assert lost < 0.1
        assert learned > 0.95
        assert min(kept, learned_too) > 0.8
