"""Deleting rows from any learner, blanking classes of a trained network, and stopping training early."""

from __future__ import annotations

import functools
import typing
from typing import Any

import numpy as np
import pytest
import torch

from ssd_edge.errors import InputError
from ssd_edge.learners import LEARNERS, Learner, Task, build, pack, restore, without_rows
from ssd_edge.learners.base import BASE_SCHEMA, CLASS_AXES
from ssd_edge.learners.gradient.penalties import PenaltySettings
from ssd_edge.learners.priors import Priors

pytestmark = pytest.mark.usefixtures("one_thread")

DIM = 10
KEYS = {"neurons": 30, "k": 4, "epochs": 3, "batch": 16}
RELU = {"neurons": 16, "epochs": 3, "batch": 16}
MASKED = ("packnet", "piggyback", "supsup")
PENALTIES = ("ewc", "online_ewc", "si", "mas", "l2")
TRAINED: dict[str, dict[str, Any]] = {
    "sdmlp": {"name": "sdmlp", **KEYS, "switch": 40.0},
    "ssd": {"name": "ssd", **KEYS, "switch": 40.0},
    "finetune": {"name": "finetune", **RELU},
    "lwf": {"name": "lwf", **RELU},
}
TRAINED |= {
    f"{name}, {penalty}": {**TRAINED[name], "penalty": penalty, "penalty_weight": 0.1}
    for name in tuple(TRAINED)
    for penalty in PENALTIES
}
TRAINED |= {
    **{name: {"name": name, **RELU, "memory": 24} for name in ("icarl", "der", "pmr")},
    # with infer=entropy the other classes of a task become more certain when one of them is removed
    **{name: {"name": name, **RELU, "infer": "logit"} for name in MASKED},
    "two layers, ewc": {**TRAINED["ssd, ewc"], "layers": 2},
    "arriving, si": {**TRAINED["finetune"], "penalty": "si", "outputs": "arriving"},
    "arriving, ssd": {**TRAINED["ssd"], "outputs": "arriving"},
    "masked": {**TRAINED["sdmlp"], "inhibition": "mask"},
}  # fmt: skip
CLOSED: dict[str, dict[str, Any]] = {
    "ncm": {"name": "ncm"},
    "fecam": {"name": "fecam"},
    "flymodel": {"name": "flymodel", "neurons": 40, "inputs_per_neuron": 4, "active": 0.1},
    **{
        f"{name}{', by class' * per_class}": {"name": name, "per_class": per_class, **small}
        for name, small in (
            ("slda", {}),
            ("ridge", {}),
            ("ranpac", {"features": 30}),
            ("klda", {"features": 30}),
        )
        for per_class in (False, True)
    },
}
CASES = {**TRAINED, **CLOSED}
# By default each learner that has penalties is tested without one, and each penalty with one learner.
ONE_EACH = dict(zip(PENALTIES, ("ssd", "sdmlp", "finetune", "lwf", "ssd"), strict=True))
TRAINED_CASES = [
    pytest.param(
        case, marks=[] if ONE_EACH.get(given.get("penalty"), given["name"]) == given["name"] else pytest.mark.slow
    )
    for case, given in TRAINED.items()
]
TEST = torch.randn(200, DIM, generator=torch.Generator().manual_seed(7)) * 3


def task(rows: tuple[int, ...], count: int = 30, seed: int = 0) -> Task:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.tensor(rows).repeat(count)[:count]
    means = 3.0 * torch.randn(10, DIM, generator=torch.Generator().manual_seed(99))
    return Task(means[labels] + torch.randn(count, DIM, generator=generator), labels)


@functools.cache
def fitted_state(case: str, announced: int) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    learner = build(CASES[case], DIM, Priors())
    learner.expect(announced)
    learner.learn(task((0, 1, 4)))
    learner.learn(task((2, 4)))
    return pack(learner)


def fitted(case: str, announced: int = 7) -> Learner:
    """Return a learner of rows 0, 1, 2 and 4: row 3 is empty, and rows from 5 on exist only where announced."""
    return restore(*fitted_state(case, announced))


def test_every_learner_and_penalty_is_covered() -> None:
    """The cases cover all learners and penalties, and every class axis in a shape is listed in `CLASS_AXES`."""
    assert {options["name"] for options in CASES.values()} == LEARNERS.keys()
    known = typing.get_args(typing.get_type_hints(PenaltySettings)["penalty"])
    assert {"none", *PENALTIES} == set(known)
    for case in CASES:
        letters = {
            symbol for spec in fitted(case).schema().values() for symbol in spec.shape if isinstance(symbol, str)
        }
        assert letters <= {"D", "r", "T", *CLASS_AXES}


# ── deleted rows ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("announced", [0, 7])
def test_deleting_rows_leaves_the_other_classes_unchanged(case: str, announced: int) -> None:
    """Row 3 never had samples and row 1 is removed; rows 0, 2, 4 become 0, 1, 2."""
    learner = fitted(case, announced)
    learner.remove(1, approximately=True)
    before = pack(learner)[0]
    fewer = without_rows(learner, [3, 1])
    assert all(np.array_equal(array, before[name]) for name, array in pack(learner)[0].items())
    assert fewer.seen.tolist() == [1, 1, 1]
    places = torch.tensor([0, -1, 1, -1, 2])
    assert torch.equal(fewer.predict(TEST), places[learner.predict(TEST)])
    scores, kept = fewer.scores(TEST), [row for row in range(learner.scores(TEST).shape[1]) if row not in (1, 3)]
    assert scores.shape[1] == len(kept)
    torch.testing.assert_close(scores, learner.scores(TEST)[:, kept], rtol=1e-5, atol=1e-5)
    # every tensor is bit-identical to the one before, with these rows deleted along its class axes
    specs, after = {**BASE_SCHEMA, **learner.schema()}, pack(fewer)[0]
    for name, spec in specs.items():
        wanted = before[name]
        for axis, symbol in enumerate(spec.shape):
            if symbol in CLASS_AXES:
                wanted = np.delete(wanted, [row for row in (1, 3) if row < wanted.shape[axis]], axis)
        if name not in ("announced", "exemplar_rows", "penalty_constant"):
            assert after[name].tobytes() == wanted.tobytes(), name
    if "announced" in after:
        assert int(after["announced"][0]) == (announced - 2 if announced and before["announced"][0] else 0)
    if "exemplar_rows" in after:
        assert set(after["exemplar_rows"].tolist()) <= {-1, 0, 1, 2}


@pytest.mark.parametrize("case", CASES)
def test_a_learner_with_deleted_rows_learns_on_and_restores_exactly(case: str) -> None:
    learner = fitted(case)
    learner.remove(0, approximately=True)
    fewer = without_rows(learner, [0, 3])  # rows 1, 2, 4 become 0, 1, 2
    again = restore(*pack(fewer))
    for one in (fewer, again):
        measured = one.learn(task((2, 5)))
        assert all(np.isfinite(value) for value in measured.values())
    assert pack(fewer)[0].keys() == pack(again)[0].keys()
    assert all(array.tobytes() == pack(again)[0][name].tobytes() for name, array in pack(fewer)[0].items())
    assert fewer.seen.tolist() == [1, 1, 1, 0, 0, 1]
    outputs = fewer.scores(TEST).shape[1]
    assert outputs == 6  # two of the seven announced rows were deleted: the outputs grow to 6, not to 7
    assert set(fewer.predict(TEST).tolist()) <= {0, 1, 2, 5}


@pytest.mark.parametrize("case", CASES)
def test_only_rows_without_a_learned_class_can_be_deleted(case: str) -> None:
    learner = fitted(case)
    classes = learner.scores(TEST).shape[1]
    with pytest.raises(InputError, match=r"rows \[2, 4\] cannot be deleted: they have learned classes; remove or join"):
        without_rows(learner, [3, 2, 4])
    for row in (-1, classes):
        with pytest.raises(InputError, match=rf"rows \[{row}\] cannot be deleted: the rows are 0 to {classes - 1}$"):
            without_rows(learner, [row])
    same = without_rows(learner, [])
    assert all(array.tobytes() == pack(same)[0][name].tobytes() for name, array in pack(learner)[0].items())


@pytest.mark.parametrize("case", ["finetune, l2", "sdmlp, mas", "ssd, online_ewc", "lwf, si"])
def test_a_single_anchor_penalty_drops_the_terms_of_deleted_rows(case: str) -> None:
    """The penalty is zero at the anchor and the sum of the remaining rows' quadratics away from it."""
    learner, blanked = fitted(case), fitted(case)
    blanked.remove(4, approximately=True)
    for one in (learner, without_rows(learner, [3, 5, 6]), blanked, without_rows(blanked, [4])):
        parameters = one.parameters() if callable(one.parameters) else one.parameters
        at_anchor = float(one.penalty.value(parameters))
        moved = {name: parameter + 0.25 for name, parameter in parameters.items()}
        quadratics = sum(float((one.penalty.importance[name].double() * 0.0625).sum()) for name in moved)
        wanted = one.penalty.weight * quadratics
        assert at_anchor == pytest.approx(0, abs=1e-5 * wanted)
        assert float(one.penalty.value(moved)) == pytest.approx(wanted, rel=1e-4)


# ── blanking ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("case", TRAINED_CASES)
def test_blanking_a_trained_class_leaves_the_others_unchanged(case: str) -> None:
    learner = fitted(case)
    scores = learner.scores(TEST)
    with pytest.raises(
        InputError, match=r"cannot remove a class exactly: its shared weights .* Remove it approximately"
    ):
        learner.remove(4)
    assert learner.remove(4, approximately=True) is False
    assert learner.seen.tolist() == [1, 1, 1, 0, 0]
    others = [0, 1, 2, 3, 5, 6][: scores.shape[1] - 1]
    torch.testing.assert_close(learner.scores(TEST)[:, others], scores[:, others], rtol=1e-6, atol=1e-6)
    for name, spec in learner.schema().items():  # its outputs are zero everywhere, also in a teacher
        for axis, symbol in enumerate(spec.shape):
            tensor = learner.state_dict()[name]
            if symbol in CLASS_AXES and tensor.shape[axis] > 4:
                assert not tensor.select(axis, 4).any(), name
    again = restore(*pack(learner))
    assert again.scores(TEST).numpy().tobytes() == learner.scores(TEST).numpy().tobytes()


@pytest.mark.parametrize("case", TRAINED_CASES)
def test_a_blanked_class_is_not_restored_by_learning_others(case: str) -> None:
    """No penalty, teacher or stored sample restores it while others are learned, but it can be learned again."""
    learner = build({**CASES[case], "epochs": 25}, DIM, Priors())
    samples = task((4,), 60, seed=3).embeddings
    learner.learn(task((0, 1, 4), 90))
    # a redrawn or distilled output rises a little above zero; a learned class has a share of about 0.9
    learner.remove(4, approximately=True)
    learner.learn(task((0, 2), 60))
    assert 4 not in learner.predict(samples)
    outputs = learner.scores(samples)
    if CASES[case]["name"] not in ("icarl", "pmr"):
        assert float(outputs.softmax(1)[:, 4].mean()) < 0.5
    learner.learn(task((1, 4), 60))
    found = learner.scores(samples)
    if CASES[case]["name"] in MASKED:  # the network of (0, 2) may be as certain of samples that it has never seen
        found[:, [0, 2]] = -torch.inf
    assert float((found.argmax(1) == 4).double().mean()) > 0.6


def test_removing_a_class_removes_its_exemplars() -> None:
    learner = fitted("icarl")
    kept = learner.exemplars[(learner.exemplar_rows >= 0) & (learner.exemplar_rows != 4)]
    learner.remove(4, approximately=True)
    assert learner.exemplar_rows.tolist() == sorted(learner.exemplar_rows.tolist(), key=lambda row: row % 99)
    assert 4 not in learner.exemplar_rows
    assert torch.equal(learner.exemplars[: len(kept)], kept)
    assert not learner.exemplars[len(kept) :].any()
    assert learner.mean_rows.tolist() == [0, 1, 2]
    learner = without_rows(fitted("icarl"), [3, 5])
    assert learner.exemplar_rows.unique().tolist() == learner.mean_rows.tolist() == [0, 1, 2, 3]
    learner.remove(1, approximately=True)
    assert without_rows(learner, [1]).exemplar_rows.unique().tolist() == [-1, 0, 1, 2]


# ── stopping early ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("case", TRAINED_CASES)
@pytest.mark.parametrize("epochs", [1, 2])
def test_stopping_early_equals_training_for_fewer_epochs(case: str, epochs: int) -> None:
    """Bit-identical, including what runs at the end of a task; the state can be restored and trained further."""
    stopped, short = (build({**CASES[case], "epochs": count}, DIM, Priors()) for count in (9, epochs))
    shares: list[float] = []

    def enough(share: float) -> bool:
        shares.append(share)
        return len(shares) == epochs

    for rows in ((0, 1), (1, 3)):
        shares.clear()
        measured = stopped.learn(task(rows), enough)
        assert short.learn(task(rows))["epochs"] == measured["epochs"] == float(epochs)
        assert shares == [(done + 1) / 9 for done in range(epochs)]
        actual, expected = pack(stopped)[0], pack(short)[0]
        assert all(array.tobytes() == expected[name].tobytes() for name, array in actual.items())
    assert set(stopped.predict(TEST).tolist()) <= {0, 1, 3}
    again = restore(*pack(stopped))
    assert again.learn(task((2, 4)))["epochs"] == 9.0
    assert again.seen.tolist() == [1, 1, 1, 1, 1]


def test_a_one_cycle_schedule_can_be_stopped_early() -> None:
    options = {**CASES["finetune"], "optimiser": "adamw", "one_cycle": True, "min_steps": 12}
    learner = build(options, DIM, Priors())
    assert learner.learn(task((0, 1)), lambda share: share >= 0.3)["epochs"] == 2.0  # of the six that `min_steps` sets
    assert set(learner.predict(TEST).tolist()) <= {0, 1}
    assert restore(*pack(learner)).learn(task((0, 1)))["epochs"] == 6.0


@pytest.mark.parametrize("case", CLOSED)
def test_single_pass_learners_ignore_early_stopping(case: str) -> None:
    stopped, unstopped = (build(CASES[case], DIM, Priors()) for _ in range(2))
    assert "epochs" not in stopped.learn(task((0, 1)), lambda share: True)
    unstopped.learn(task((0, 1)))
    assert torch.equal(stopped.scores(TEST), unstopped.scores(TEST))
