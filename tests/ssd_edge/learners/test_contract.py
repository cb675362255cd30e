"""The contract of all learners: bit-identical resume, a state of fixed size, and clear errors."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from helpers.small_learners import DIM, OPTIONS, make, priors, task

from ssd_edge.errors import BundleRefusedError, InputError
from ssd_edge.learners import LEARNERS, Learner, Task, build, pack, restore
from ssd_edge.learners.base import BASE_SCHEMA
from ssd_edge.learners.priors import Priors

pytestmark = pytest.mark.usefixtures("one_thread")

RANDOM = (
    *("ssd", "sdmlp", "finetune", "lwf", "icarl", "der", "pmr", "packnet", "piggyback", "supsup"),
    *("ranpac", "klda", "flymodel"),
)


def differing(one: Learner, other: Learner) -> list[str]:
    """Return the names of state tensors that are not bit-identical."""
    mine, theirs = pack(one)[0], pack(other)[0]
    assert mine.keys() == theirs.keys()
    return [name for name in mine if mine[name].tobytes() != theirs[name].tobytes()]


def through_a_file(learner: Learner) -> Learner:
    """Pack and restore a learner, through JSON."""
    arrays, metadata = pack(learner)
    return restore(arrays, json.loads(json.dumps(metadata)))


def test_every_learner_is_tested() -> None:
    assert LEARNERS.keys() <= OPTIONS.keys()


# ── the state ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("case", OPTIONS)
def test_pack_and_restore_are_bit_identical(case: str) -> None:
    learner = make(case)
    learner.expect(6)
    test = task((0, 1, 2, 3), seed=7).embeddings
    for rows in ((0, 1), (2, 3)):
        learner.learn(task(rows))
        again = through_a_file(learner)
        assert differing(learner, again) == []
        assert learner.scores(test).numpy().tobytes() == again.scores(test).numpy().tobytes()
        assert torch.equal(learner.predict(test), again.predict(test))


@pytest.mark.parametrize("case", OPTIONS)
@pytest.mark.parametrize("tasks", [0, pytest.param(1, marks=pytest.mark.slow), 2])
def test_resume_gives_identical_states(case: str, tasks: int) -> None:
    stream = [task((0, 1), 70), task((2, 3), 90), task((1, 5), 50)]
    learner = make(case)
    learner.expect(6)
    for number in range(tasks):
        learner.learn(stream[number])
    arrays, metadata = pack(learner)
    for rest in stream[tasks:]:
        learner.learn(rest)
    again = restore(arrays, metadata)
    for rest in stream[tasks:]:
        again.learn(rest)
    assert differing(learner, again) == []


@pytest.mark.parametrize("case", OPTIONS)
def test_nothing_grows_with_the_number_of_samples(case: str) -> None:
    few, many = make(case), make(case)
    for learner, count in ((few, 60), (many, 300)):
        learner.learn(task((0, 1), count))
        learner.learn(task((2, 3), count))
    shapes = [{name: (array.shape, array.dtype) for name, array in pack(each)[0].items()} for each in (few, many)]
    assert shapes[0] == shapes[1]
    assert few.memory_bytes() == many.memory_bytes()
    shipped = few.constants()
    assert few.memory_bytes() == sum(array.nbytes for name, array in pack(few)[0].items() if name not in shipped)


@pytest.mark.parametrize("case", OPTIONS)
def test_the_schema_lists_every_tensor_with_its_reason(case: str) -> None:
    learner = make(case)
    learner.learn(task((0, 1)))
    arrays, metadata = pack(learner)
    specs = {**BASE_SCHEMA, **learner.schema()}
    assert specs.keys() == arrays.keys() == metadata["reasons"].keys()
    assert all(len(reason) > 5 for reason in metadata["reasons"].values())
    for name, spec in specs.items():
        assert arrays[name].dtype == spec.dtype
        assert len(spec.shape) == arrays[name].ndim


@pytest.mark.parametrize("case", OPTIONS)
def test_priors_are_not_written_to(case: str) -> None:
    """Several learners of a run start from the same package."""
    given, untouched = priors(), priors()
    learner = build(OPTIONS[case], DIM, given)
    learner.learn(task((0, 1)))
    for name in ("within_covariance", "keys", "counters"):
        assert np.array_equal(getattr(given, name), getattr(untouched, name)), name


@pytest.mark.parametrize("case", OPTIONS)
def test_a_state_with_a_damaged_tensor_is_refused_by_its_name(case: str) -> None:
    learner = make(case)
    learner.learn(task((0, 1)))
    arrays, metadata = pack(learner)
    for name, array in arrays.items():
        other = np.float32 if array.dtype == np.float64 else np.float64
        without = {key: value for key, value in arrays.items() if key != name}
        for state in (without, {**arrays, name: array.astype(other)}, {**arrays, name: array[None]}):
            with pytest.raises(BundleRefusedError, match=f"'{name}'"):
                restore(state, metadata)


@pytest.mark.parametrize("case", OPTIONS)
def test_a_state_of_classes_that_disagree_is_refused(case: str) -> None:
    """One class more in one tensor than in the others."""
    learner = make(case)
    learner.learn(task((0, 1)))
    arrays, metadata = pack(learner)
    specs = learner.schema()
    wide = [name for name, spec in specs.items() if "C" in spec.shape]
    assert wide
    if len(wide) < 2:  # only one tensor has classes: nothing to disagree with
        return
    axis = specs[wide[-1]].shape.index("C")
    array = arrays[wide[-1]]
    state = {**arrays, wide[-1]: np.concatenate([array, array.take([0], axis)], axis)}
    with pytest.raises(BundleRefusedError, match=wide[-1]):
        restore(state, metadata)


@pytest.mark.parametrize("case", OPTIONS)
def test_an_unknown_tensor_is_refused(case: str) -> None:
    arrays, metadata = pack(make(case))
    with pytest.raises(BundleRefusedError, match=r"unknown \['replay'\]"):
        restore({**arrays, "replay": np.zeros((60, DIM), np.float32)}, metadata)


@pytest.mark.parametrize(
    "change",
    [
        {"learner": "transformer"},
        {"learner": None},
        {"settings": {"neurons": "many"}},
        {"settings": {"no_such_setting": 1}},
        {"settings": None},
        {"dim": "wide"},
        {"dim": -1},
        {"seed": None},
    ],
    ids=str,
)
def test_invalid_metadata_is_refused(change: dict[str, Any]) -> None:
    arrays, metadata = pack(make("slda"))
    with pytest.raises(BundleRefusedError, match=r"^the metadata of the learner's state is invalid"):
        restore(arrays, {**metadata, **change})


@pytest.mark.parametrize("key", ["learner", "settings", "dim", "seed"])
def test_metadata_without_a_key_is_refused(key: str) -> None:
    arrays, metadata = pack(make("slda"))
    del metadata[key]
    with pytest.raises(BundleRefusedError, match=key):
        restore(arrays, metadata)


def test_top_n_table_with_an_unknown_neuron_is_refused() -> None:
    arrays, metadata = pack(make("ssd"))
    arrays["top_n_indices"][0] = 48
    with pytest.raises(BundleRefusedError, match="'top_n_indices' of 'ssd' must be from 0 to 47"):
        restore(arrays, metadata)


# ── learning and predicting ──────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("case", OPTIONS)
def test_classes_arrive_unannounced_with_gaps_and_again(case: str) -> None:
    learner = make(case, empty=True)
    for rows, seen in (
        ((0, 1), [1, 1]),
        ((2, 3), [1, 1, 1, 1]),
        ((6,), [1, 1, 1, 1, 0, 0, 1]),
        ((0, 6), [1, 1, 1, 1, 0, 0, 1]),  # more samples of known classes
        ((4,), [1, 1, 1, 1, 1, 0, 1]),
    ):
        told: list[float] = []
        measured = learner.learn(task(rows), told.append)
        assert learner.seen.tolist() == seen
        assert told == sorted(told)
        assert told[-1] == 1.0
        assert all(np.isfinite(value) for value in measured.values())
        predicted = learner.predict(task((0, 1, 2, 3, 4, 5, 6), 70).embeddings)
        assert set(predicted.tolist()) <= {row for row, taught in enumerate(seen) if taught}
    assert learner.tasks_learned == 5
    assert learner.scores(task((0,)).embeddings).shape == (60, 7)


@pytest.mark.parametrize("case", OPTIONS)
def test_classes_of_one_task_are_distinguished(case: str) -> None:
    learner = build({**OPTIONS[case], **({"epochs": 30} if "epochs" in OPTIONS[case] else {})}, DIM, priors())
    learner.learn(task((0, 1, 2), 150))
    test = task((0, 1, 2), 240, seed=1)
    assert float((learner.predict(test.embeddings) == test.labels).double().mean()) > 0.9


@pytest.mark.parametrize("case", OPTIONS)
def test_seeds(case: str) -> None:
    learners = [make(case, seed, empty=True) for seed in (1, 1, 2)]
    for learner in learners:
        learner.learn(task((0, 1)))
        learner.learn(task((2, 3)))
    assert differing(learners[0], learners[1]) == []
    drawn = OPTIONS[case]["name"] in RANDOM or case.endswith("projected")
    assert bool(differing(learners[0], learners[2])) == drawn


def test_every_task_and_purpose_draws_its_own_numbers() -> None:
    learner, drawn = make("sdmlp"), []
    for _ in range(3):
        drawn += [learner.generator(purpose).initial_seed() for purpose in range(5)]
        learner.learn(task((0, 1)))
    assert len(set(drawn)) == 15


@pytest.mark.parametrize("case", OPTIONS)
def test_predict_changes_nothing_for_any_batch_size(case: str) -> None:
    learner = make(case)
    learner.learn(task((0, 1)))
    before = {name: array.copy() for name, array in pack(learner)[0].items()}
    test = task((0, 1), 5000, seed=2).embeddings
    predicted = learner.predict(test)
    assert predicted.dtype == torch.int64
    assert predicted.shape == (5000,)
    assert torch.equal(learner.predict(test[:1]), predicted[:1])
    assert learner.predict(test[:0]).shape == (0,)
    assert all(np.array_equal(array, before[name]) for name, array in pack(learner)[0].items())


@pytest.mark.parametrize("case", OPTIONS)
def test_predict_without_classes_is_refused(case: str) -> None:
    with pytest.raises(InputError, match=r"^no class has been learned yet; learn one first"):
        make(case).predict(torch.zeros(3, DIM))


@pytest.mark.parametrize("case", OPTIONS)
def test_wrong_dimension_is_refused(case: str) -> None:
    learner = make(case)
    with pytest.raises(InputError, match=r"expects embeddings of shape \(N, 12\), but got \(4, 13\)"):
        learner.learn(Task(torch.zeros(4, 13), torch.zeros(4, dtype=torch.int64)))
    learner.learn(task((0, 1)))
    for shape in ((4, 13), (12,), (1, 4, 12)):
        with pytest.raises(InputError, match=r"expects embeddings of shape \(N, 12\)"):
            learner.predict(torch.zeros(shape))


ROWS = torch.tensor([0, 1, 1])


@pytest.mark.parametrize(
    ("embeddings", "labels", "told"),
    [
        (torch.zeros(3, DIM), ROWS[:2], r"but got \(3, 12\) and \(2,\)"),
        (torch.zeros(DIM), ROWS, r"but got \(12,\) and \(3,\)"),
        (torch.zeros(3, DIM), ROWS[:, None], r"and \(3, 1\)"),
        (torch.zeros(0, DIM), ROWS[:0], "must contain at least one sample"),
        (torch.zeros(3, DIM), ROWS - 2, "rows of at least 0, but the smallest is -2"),
        (torch.full((3, DIM), torch.nan), ROWS, "NaN or infinity"),
        (torch.full((3, DIM), torch.inf), ROWS, "NaN or infinity"),
        (torch.zeros(3, DIM, dtype=torch.float64), ROWS, "but got torch.float64 and torch.int64"),
        (torch.zeros(3, DIM), ROWS.float(), "but got torch.float32 and torch.float32"),
    ],
)
def test_invalid_task_is_refused(embeddings: torch.Tensor, labels: torch.Tensor, told: str) -> None:
    with pytest.raises(InputError, match=told):
        Task(embeddings, labels)


@pytest.mark.parametrize("options", [{"name": "sdd"}, {"name": None}, {}], ids=str)
def test_unknown_learner(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"unknown learner.name .*Known: slda, ssd"):
        build(options, DIM, Priors())


def test_unknown_setting() -> None:
    with pytest.raises(InputError, match=r"unknown key 'learner.budget'. Did you mean 'budget_mb'"):
        build({"name": "slda", "budget": 5}, DIM, Priors())


@pytest.mark.parametrize("name", ["ncm", "slda", "ridge", "ranpac", "fecam", "flymodel"])
@pytest.mark.parametrize("key", ["penalty", "penalty_weight", "fisher"])
def test_penalty_requires_a_gradient_learner(name: str, key: str) -> None:
    value = {"penalty": "ewc", "penalty_weight": 1.0, "fisher": "exact"}[key]
    with pytest.raises(InputError, match=rf"learner.{key} requires .*'{name}' is not; .*sdmlp, finetune, lwf$"):
        build({"name": name, key: value}, DIM, Priors())


@pytest.mark.parametrize("name", LEARNERS)
def test_removal_is_as_exact_as_declared(name: str) -> None:
    learner, declared = make(name), LEARNERS[name].removal
    learner.learn(task((0, 1, 2)))
    assert hasattr(learner.settings, "per_class") == (declared == "with per_class")
    if declared == "exact":
        assert learner.remove(1)
    else:
        with pytest.raises(InputError, match=r"[Rr]emove it approximately"):
            learner.remove(1)
        assert not learner.remove(1, approximately=True)
    if declared == "with per_class":
        separate = build({**OPTIONS[name], "per_class": True}, DIM, priors())
        separate.learn(task((0, 1, 2)))
        assert separate.remove(1)


def test_replay_is_declared_by_the_learner_that_stores_samples() -> None:
    stores = [name for name, kind in LEARNERS.items() if kind.replay]
    assert stores == ["icarl", "der", "pmr"]
    for learner in map(make, (*stores, "der++")):
        assert "replay" in learner.display
        assert any(spec.reason.startswith("REPLAY") for spec in learner.schema().values())
