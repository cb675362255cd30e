"""Tests of `icarl`: herding against a plain loop, size of the memory, nearest means, effect of replay."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.replayed import DIM, accuracy, task

from ssd_edge.errors import BundleRefusedError, InputError
from ssd_edge.learners.base import BASE_SCHEMA
from ssd_edge.learners.gradient.finetune import FineTune
from ssd_edge.learners.gradient.finetune import Settings as FineTuneSettings
from ssd_edge.learners.gradient.icarl import ICaRL, herd
from ssd_edge.learners.gradient.replay import Settings
from ssd_edge.learners.priors import Priors

pytestmark = pytest.mark.usefixtures("one_thread")


def make(**options: object) -> ICaRL:
    return ICaRL(DIM, Settings(**{"neurons": 50, "epochs": 20, "memory": 30, **options}), Priors())


def kept(learner: ICaRL) -> dict[int, torch.Tensor]:
    """Return the exemplars by class, in their order."""
    rows = learner.exemplar_rows
    return {row: learner.exemplars[rows == row] for row in rows.unique().tolist() if row >= 0}


# ── herding ──────────────────────────────────────────────────────────────────────────────────────────


def test_herding_equals_a_plain_loop() -> None:
    features = np.random.default_rng(0).normal(size=(25, 4)) + 1
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    mean, chosen = features.mean(0), []
    for _ in range(25):
        rest = [index for index in range(25) if index not in chosen]
        distances = [np.linalg.norm(mean - features[[*chosen, index]].mean(0)) for index in rest]
        chosen.append(rest[int(np.argmin(distances))])
    for count in (1, 7, 25, 40):
        assert herd(torch.tensor(features), count).tolist() == chosen[:count]


def test_herding_of_features_that_are_not_normalised() -> None:
    """Lengths matter, and equal samples may both be chosen, but no sample twice."""
    features = torch.tensor([[4.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
    assert herd(features, 4).tolist() == [1, 2, 0, 3]  # mean 1.5; then running means 1, 1, 2, 1.5
    assert herd(torch.zeros(3, 2), 3).sort().values.tolist() == [0, 1, 2]


# ── the memory ───────────────────────────────────────────────────────────────────────────────────────


def test_classes_share_the_memory_and_never_exceed_it() -> None:
    learner, before = make(epochs=2), {}
    for rows, share in (((0, 1), 15), ((2,), 10), ((3, 4), 6), ((5, 6), 4)):
        new = task(rows)
        learner.learn(new)
        now = kept(learner)
        assert {len(part) for part in now.values()} == {share}
        assert sorted(now) == list(range(rows[-1] + 1))
        for row, part in before.items():  # the last exemplars of each class are dropped
            assert torch.equal(now[row], part[:share])
        for row in rows:
            members = new.embeddings[new.labels == row]
            hidden = (members @ learner.hidden_weight.T + learner.hidden_bias).clamp_min(0)
            order = herd(hidden / hidden.norm(dim=1, keepdim=True), share)
            assert torch.equal(now[row], members[order])
        assert learner.exemplars.shape == (30, DIM)
        assert not learner.exemplars[learner.exemplar_rows < 0].any()
        before = now


def test_class_with_fewer_samples_than_its_share() -> None:
    learner = make(epochs=1)
    learner.learn(task((0, 1), 6))
    assert {row: len(part) for row, part in kept(learner).items()} == {0: 3, 1: 3}
    learner.learn(task((2,)))
    assert {row: len(part) for row, part in kept(learner).items()} == {0: 3, 1: 3, 2: 10}


def test_repeated_class_chooses_from_new_and_kept_samples() -> None:
    learner = make(epochs=2)
    learner.learn(task((0, 1)))
    first = kept(learner)
    again = task((1, 2), seed=3)
    learner.learn(again)
    now, pool = kept(learner), torch.cat([again.embeddings[again.labels == 1], first[1]])
    order = herd(learner._features(pool), 10)
    assert torch.equal(now[1], pool[order])
    assert torch.equal(now[0], first[0][:10])
    assert len(pool) == 115


def test_too_small_memory_raises_before_learning() -> None:
    learner = make(memory=3, epochs=1)
    learner.learn(task((0, 1, 2)))
    state = learner.state_dict()
    with pytest.raises(InputError, match=r"learner.memory is 3, but 4 classes need an exemplar each"):
        learner.learn(task((2, 3)))
    assert all(torch.equal(tensor, state[name]) for name, tensor in learner.state_dict().items())


# ── learning ─────────────────────────────────────────────────────────────────────────────────────────


def test_loss_equals_the_formula() -> None:
    """Targets are labels for classes of the task and unknown classes, and previous outputs for all others."""
    learner = make(epochs=1, batch=500)  # one step, so the measured loss is the one before it
    learner.expect(5)
    learner.learn(task((0, 1, 2)))
    before, new = learner.state_dict(), task((2, 3), 40)
    inputs = torch.cat([new.embeddings, *kept(learner).values()])
    labels = torch.cat([new.labels, torch.arange(3).repeat_interleave(10)])
    hidden = (inputs @ before["hidden_weight"].T + before["hidden_bias"]).clamp_min(0)
    p = (hidden @ before["output_weight"].T + before["output_bias"]).double().sigmoid().numpy()
    wanted = np.eye(5)[labels]
    wanted[:, :2] = p[:, :2]  # class 2 is taught again, so it uses labels
    each = -(wanted * np.log(p) + (1 - wanted) * np.log(1 - p)).mean(0)
    measured = learner.learn(new)
    assert measured["cross_entropy"] == pytest.approx(each[2:].sum(), rel=1e-5)
    assert measured["distillation"] == pytest.approx(each[:2].sum(), rel=1e-5)


def test_replay_retains_the_first_task() -> None:
    options = {"neurons": 50, "epochs": 20}
    forgetful = FineTune(DIM, FineTuneSettings(**options), Priors())
    replaying = make()
    for learner in (forgetful, replaying):
        learner.expect(4)
        for rows in ((0, 1), (2, 3)):
            learner.learn(task(rows))
    assert accuracy(forgetful, task((0, 1), seed=1)) < 0.3
    assert accuracy(replaying, task((0, 1), seed=1)) > 0.9
    assert accuracy(replaying, task((2, 3), seed=1)) > 0.9


def test_prediction_is_the_nearest_mean_exemplar() -> None:
    learner = make(epochs=5, layers=2)
    learner.expect(6)
    for rows in ((0, 1), (2, 4)):
        learner.learn(task(rows))
    state, test = learner.state_dict(), task((0, 1, 2, 4), seed=2).embeddings.double()

    def features(x: torch.Tensor) -> torch.Tensor:
        for end in ("", "_1"):
            x = (x @ state[f"hidden_weight{end}"].double().T + state[f"hidden_bias{end}"].double()).clamp_min(0)
        return x / x.norm(dim=1, keepdim=True)

    means = torch.stack([features(part.double()).mean(0) for part in kept(learner).values()])
    distances = torch.cdist(features(test), means / means.norm(dim=1, keepdim=True))
    rows = torch.tensor([0, 1, 2, 4])
    assert torch.equal(learner.predict(test.float()), rows[distances.argmin(1)])
    scores = learner.scores(test.float())
    torch.testing.assert_close(scores[:, rows].double(), 1 - distances.square() / 2, rtol=0, atol=1e-5)
    assert (scores[:, [3, 5]] < -1e20).all()


def test_scores_before_the_first_task() -> None:
    learner = make()
    learner.expect(4)
    assert (learner.scores(torch.ones(2, DIM)) < -1e20).all()
    assert learner.scores(torch.ones(0, DIM)).shape == (0, 4)


# ── the state ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("tasks", [0, 1, 2])
def test_resume_gives_identical_weights(tasks: int) -> None:
    stream = [task((0, 1), 70), task((2, 3), 90), task((1, 5), 50)]
    learner = make(epochs=2)
    learner.expect(6)
    for each in stream[:tasks]:
        learner.learn(each)
    again = make(epochs=2)
    again.load_state_dict(learner.state_dict())
    test = task((0, 1, 5), seed=7).embeddings
    assert torch.equal(again.scores(test), learner.scores(test))
    for each in stream[tasks:]:
        learner.learn(each)
        again.learn(each)
    mine, theirs = learner.state_dict(), again.state_dict()
    assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []
    assert torch.equal(again.scores(test), learner.scores(test))


def test_state_declares_replay_and_does_not_grow() -> None:
    sizes = []
    for count in (60, 600):
        learner = make(epochs=1)
        for rows in ((0, 1), (2, 3)):
            learner.learn(task(rows, count))
        sizes.append({name: (tensor.shape, tensor.dtype) for name, tensor in learner.state_dict().items()})
    assert sizes[0] == sizes[1]
    specs = {**BASE_SCHEMA, **learner.schema()}
    assert specs.keys() == sizes[0].keys()
    replayed = {name for name, spec in specs.items() if spec.reason.startswith("REPLAY: ")}
    assert replayed == {"exemplars", "exemplar_rows"}
    assert ICaRL.replay


@pytest.mark.parametrize(
    ("row", "message"), [(2, r"of the rows \[0, 1, 2\], but those learned are \[0, 1\]"), (-2, "'exemplar_rows'")]
)
def test_exemplars_of_unknown_classes_raise(row: int, message: str) -> None:
    learner = make(epochs=1)
    learner.learn(task((0, 1), 10))
    state = learner.state_dict()
    state["exemplar_rows"][-1 if row < 0 else 0] = row
    with pytest.raises(BundleRefusedError, match=message):
        make().load_state_dict(state)


def test_penalty_raises() -> None:
    with pytest.raises(InputError, match=r"learner.penalty is ewc, but this learner protects .* by replay"):
        make(penalty="ewc")
