"""Removing and joining classes, merging and subtracting learners: equal to learning the resulting samples."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ssd_edge.errors import InputError
from ssd_edge.learners import Learner, Task, build, pack, restore
from ssd_edge.learners.closed_form.linear import NEVER, LinearLearner
from ssd_edge.learners.priors import Priors

pytestmark = pytest.mark.usefixtures("one_thread")

DIM = 12
BY_CLASS: dict[str, dict[str, Any]] = {
    "ncm": {"name": "ncm"},
    "slda": {"name": "slda", "per_class": True},
    "ridge": {"name": "ridge", "per_class": True},
    "ranpac": {"name": "ranpac", "features": 40, "per_class": True},
    "klda": {"name": "klda", "features": 40, "per_class": True},
    "fecam": {"name": "fecam"},
    "flymodel": {"name": "flymodel", "neurons": 60, "inputs_per_neuron": 4, "active": 0.1, "lr": 0.03},
}
POOLED = {f"{name}, pooled": {**BY_CLASS[name], "per_class": False} for name in ("slda", "ridge", "ranpac")}
ALL = {**BY_CLASS, **POOLED}
GRADIENTS = ("sdmlp", "ssd", "finetune")


def priors(scale: float = 1.0) -> Priors:
    mixing = np.random.default_rng(0).normal(size=(DIM, DIM))
    return Priors(count=1000, within_covariance=(scale * mixing @ mixing.T / DIM).astype(np.float32))


def make(case: str, seed: int = 0, **settings: Any) -> Learner:
    return build({**ALL[case], **settings}, DIM, priors(), seed)


def draw(counts: dict[int, int], seed: int = 0) -> Task:
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(10, DIM, generator=torch.Generator().manual_seed(99))
    labels = torch.tensor([row for row, count in counts.items() for _ in range(count)])
    return Task(means[labels] + torch.randn(len(labels), DIM, generator=generator), labels)


STREAM = [draw({0: 30, 1: 25}), draw({2: 40, 3: 20}, seed=1), draw({1: 15, 3: 30}, seed=2)]
TEST = draw(dict.fromkeys(range(4), 40), seed=9).embeddings


def taught(case: str, tasks: list[Task], **settings: Any) -> Learner:
    learner = make(case, **settings)
    for task in tasks:
        learner.learn(task)
    return learner


def without(task: Task, *rows: int) -> Task:
    kept = ~torch.isin(task.labels, torch.tensor(rows))
    return Task(task.embeddings[kept], task.labels[kept])


def renamed(task: Task, rows: Tensor) -> Task:
    return Task(task.embeddings, rows[task.labels])


def assert_same(learner: Learner, other: Learner, rows: list[int]) -> None:
    """Equal scores of these rows and equal predictions."""
    mine, theirs = learner.scores(TEST)[:, rows], other.scores(TEST)[:, rows]
    rounding = 1e-5 if learner.name == "slda" else 1e-6  # it keeps its statistics in float32
    torch.testing.assert_close(mine, theirs, rtol=0, atol=rounding * float(theirs.abs().max()))
    assert torch.equal(learner.predict(TEST), other.predict(TEST))


# ── removing ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("case", BY_CLASS)
@pytest.mark.parametrize("row", [1, 3])
def test_a_class_that_is_taken_out_was_never_taught(case: str, row: int) -> None:
    """Also the last row, and a class that came in two tasks."""
    learner, rest = taught(case, STREAM), [other for other in range(4) if other != row]
    learner.scores(TEST)
    assert learner.remove(row, approximately=row == 1)
    never = taught(case, [without(task, row) for task in STREAM])
    assert_same(learner, never, rest)
    assert learner.seen.tolist() == [int(other != row) for other in range(4)]
    assert set(learner.predict(TEST).tolist()) <= set(rest)
    assert learner.memory_bytes() == taught(case, STREAM).memory_bytes()


@pytest.mark.parametrize("case", BY_CLASS)
def test_a_class_that_is_taken_out_can_be_taught_again(case: str) -> None:
    learner = taught(case, STREAM)
    learner.remove(1)
    learner = restore(*pack(learner))
    for task in STREAM:
        if 1 in task.labels:
            learner.learn(without(task, 0, 2, 3))
    assert_same(learner, taught(case, STREAM), [0, 1, 2, 3])
    assert learner.seen.tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("case", BY_CLASS)
def test_one_class_or_none_is_left(case: str) -> None:
    learner = taught(case, STREAM)
    for row in (3, 0, 2):
        learner.remove(row)
    assert set(learner.predict(TEST).tolist()) == {1}
    assert bool(torch.isfinite(learner.scores(TEST)).all())
    learner.remove(1)
    assert bool(torch.isfinite(learner.scores(TEST)).all())
    with pytest.raises(InputError, match=r"^no class has been learned yet; learn one first"):
        learner.predict(TEST)
    if isinstance(learner, LinearLearner):
        assert float(learner.values.abs().max()) == 0.0
        assert (learner.bias == NEVER).all()
    for task in STREAM:
        learner.learn(task)
    assert_same(learner, taught(case, STREAM), [0, 1, 2, 3])


@pytest.mark.parametrize("case", BY_CLASS)
def test_only_learned_classes_can_be_removed(case: str) -> None:
    learner = taught(case, [draw({0: 9, 2: 9})])
    for row in (1, 3, -1):
        with pytest.raises(InputError, match=f"row {row} has not been learned.*; learned rows: 0, 2"):
            learner.remove(row)
    learner.remove(2)
    with pytest.raises(InputError, match="row 2 has not been learned"):
        learner.remove(2)
    learner.remove(0)
    with pytest.raises(InputError, match="learned rows: none"):
        learner.remove(0)


@pytest.mark.parametrize("case", POOLED)
def test_pooled_second_moment_allows_no_exact_removal(case: str) -> None:
    learner = taught(case, STREAM)
    before = pack(learner)[0]
    with pytest.raises(InputError, match=r"one second moment for all classes.*learner.per_class=true"):
        learner.remove(1)
    assert all(np.array_equal(array, before[name]) for name, array in pack(learner)[0].items())


@pytest.mark.parametrize("case", POOLED)
def test_approximate_removal_from_a_pooled_second_moment(case: str) -> None:
    """Means and counts are exact; the covariance keeps the share of the class, which changes few predictions."""
    learner, pooled = taught(case, STREAM), taught(case, STREAM).statistics
    assert learner.remove(1, approximately=True) is False
    assert learner.seen.tolist() == [1, 0, 1, 1]
    never = taught(case, [without(task, 1) for task in STREAM])
    assert torch.equal(learner.statistics.counts, never.statistics.counts)
    torch.testing.assert_close(learner.statistics.means, never.statistics.means, rtol=1e-12, atol=1e-12)
    kept, before = (s.within_covariance() for s in (learner.statistics, pooled))
    rounding = 1e-6 if pooled.single else 1e-9
    torch.testing.assert_close(kept, before, rtol=rounding, atol=rounding * float(before.abs().max()))
    answers = learner.predict(TEST)
    assert 1 not in answers
    assert float((answers == never.predict(TEST)).double().mean()) > 0.9
    again = restore(*pack(learner))
    assert again.scores(TEST).numpy().tobytes() == learner.scores(TEST).numpy().tobytes()
    for row in (0, 2):
        assert learner.remove(row, approximately=True) is False
    assert learner.remove(3, approximately=True) is True
    assert not learner.statistics.moments.any()
    assert not learner.values.any()
    assert (learner.bias == NEVER).all()
    for task in STREAM:
        learner.learn(task)
    assert_same(learner, taught(case, STREAM), [0, 1, 2, 3])


@pytest.mark.parametrize("name", POOLED)
def test_second_moments_by_class_predict_the_same(name: str) -> None:
    pooled = taught(name, STREAM)
    assert_same(taught(name, STREAM, per_class=True), pooled, [0, 1, 2, 3])
    size = pooled.feature_count()
    more = taught(name, STREAM, per_class=True).memory_bytes() - pooled.memory_bytes()
    assert more == 3 * (4 if pooled.statistics.single else 8) * size * (size + 1) // 2


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradient_learners_refuse_removal_and_merging(name: str) -> None:
    learner = build({"name": name, "neurons": 40, "epochs": 1}, DIM, Priors())
    learner.learn(draw({0: 9, 1: 9}))
    shown = re.escape(learner.display)
    with pytest.raises(InputError, match=f"{shown} cannot remove a class exactly: its shared weights keep"):
        learner.remove(0)
    with pytest.raises(InputError, match=f"{shown} cannot join two classes: .* learn its images again as the other"):
        learner.join(0, 1)
    assert learner.seen.tolist() == [1, 1]
    for edit in (learner.merge, learner.subtract):
        with pytest.raises(InputError, match=f"{shown} cannot be merged"):
            edit(learner)


# ── joining ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("case", ALL)
@pytest.mark.parametrize(("row", "into"), [(1, 0), (0, 3)])
def test_two_that_are_joined_were_taught_as_one(case: str, row: int, into: int) -> None:
    """In two tasks, in the same one and in others; and both go on together."""
    learner, rows = taught(case, STREAM), torch.arange(6)
    rows[row] = into
    learner.scores(TEST)
    learner.join(row, into)
    rest = [other for other in range(4) if other != row]
    assert_same(learner, taught(case, [renamed(task, rows) for task in STREAM]), rest)
    assert learner.seen.tolist() == [int(other != row) for other in range(4)]
    again = restore(*pack(learner))
    assert again.scores(TEST).numpy().tobytes() == learner.scores(TEST).numpy().tobytes()
    last = draw({into: 10, 5: 20}, seed=5)
    again.learn(last)
    assert_same(again, taught(case, [*(renamed(task, rows) for task in STREAM), last]), [*rest, 5])


def test_weights_that_were_clipped_are_joined_as_if_they_had_not_been() -> None:
    """min(1, min(1, a) + min(1, b)) is min(1, a + b) where neither is negative."""
    learner, rows = taught("flymodel", STREAM, lr=0.2), torch.tensor([0, 0, 2, 3])
    assert ((learner.weights == 1).sum(1) > 3).all()
    learner.join(1, 0)
    never = taught("flymodel", [renamed(task, rows) for task in STREAM], lr=0.2)
    torch.testing.assert_close(learner.weights, never.weights, rtol=0, atol=1e-6)


def test_only_two_classes_that_were_taught_can_be_joined() -> None:
    learner = taught("ncm", [draw({0: 9, 2: 9})])
    for row, into in ((1, 0), (0, 1), (3, 0), (0, -1)):
        with pytest.raises(InputError, match=r"has not been learned and cannot be joined; learned rows: 0, 2"):
            learner.join(row, into)
    with pytest.raises(InputError, match="row 2 cannot be joined with itself"):
        learner.join(2, 2)
    assert learner.seen.tolist() == [1, 0, 1]


@pytest.mark.parametrize("case", ["ncm", "slda", "flymodel", "fecam"])
@settings(max_examples=8)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 3), st.integers(0, 3)), max_size=5))
def test_any_removals_and_joins(case: str, edits: list[tuple[bool, int, int]]) -> None:
    """Each sample counts for the row that its class has become in the end, or for none."""
    learner, now = taught(case, STREAM), torch.arange(4)
    for remove, row, into in edits:
        left = [one for one in (row, into) if one in now]
        if remove and row in left:
            assert learner.remove(row)
            now[now == row] = -1
        elif row != into and len(left) == 2:
            learner.join(row, into)
            now[now == row] = into
    tasks = [
        renamed(without(task, *(now == -1).nonzero().flatten().tolist()), now)
        for task in STREAM
        if (now[task.labels] >= 0).any()
    ]
    rest = sorted({row for row in now.tolist() if row >= 0})
    assert learner.seen.nonzero().flatten().tolist() == rest
    if rest:
        assert_same(learner, taught(case, tasks), rest)


# ── merging ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("case", ALL)
def test_two_that_are_merged_know_what_both_have_seen(case: str) -> None:
    """A class that only one knows, classes that both know, in both directions."""
    one, two = taught(case, STREAM[:1]), taught(case, STREAM[1:])
    before = pack(two)[0]
    merged = restore(*pack(one))
    merged.scores(TEST)
    merged.merge(two)
    assert_same(merged, taught(case, STREAM), [0, 1, 2, 3])
    assert merged.seen.tolist() == [1, 1, 1, 1]
    assert merged.tasks_learned == 3
    assert all(np.array_equal(array, before[name]) for name, array in pack(two)[0].items())
    two.merge(one)
    assert_same(two, merged, [0, 1, 2, 3])


@pytest.mark.parametrize("case", ALL)
def test_merging_maps_rows_and_the_result_goes_on_learning(case: str) -> None:
    """The other's class 1 is class 3 here, its class 2 is class 0, and its row 0 was never taught."""
    rows = torch.tensor([1, 3, 0])
    other = draw({1: 30, 2: 20}, seed=4)
    learner = taught(case, [draw({0: 25, 2: 20})])
    learner.merge(taught(case, [other]), rows)
    assert learner.seen.tolist() == [1, 0, 1, 1]
    again = restore(*pack(learner))
    assert again.scores(TEST).numpy().tobytes() == learner.scores(TEST).numpy().tobytes()
    last = draw({1: 10, 5: 20}, seed=5)
    again.learn(last)
    assert_same(again, taught(case, [draw({0: 25, 2: 20}), renamed(other, rows), last]), [0, 1, 2, 3, 5])


@pytest.mark.parametrize("case", ALL)
def test_merging_with_one_that_knows_nothing(case: str) -> None:
    learner, empty = taught(case, STREAM), make(case)
    learner.merge(make(case))
    assert_same(learner, taught(case, STREAM), [0, 1, 2, 3])
    empty.merge(make(case))
    assert empty.scores(TEST).shape == (160, 0)
    empty.merge(learner)
    assert_same(empty, learner, [0, 1, 2, 3])


@pytest.mark.parametrize("case", BY_CLASS)
def test_class_of_another_learner_can_be_removed_after_merging(case: str) -> None:
    learner = taught(case, STREAM[:1])
    learner.merge(taught(case, STREAM[1:]))
    learner.remove(2)
    assert_same(learner, taught(case, [without(task, 2) for task in STREAM]), [0, 1, 3])


@pytest.mark.parametrize(
    ("case", "settings", "told"),
    [
        ("slda", {"per_class": False}, r"differ in learner.per_class \(True and False\)"),
        ("ridge", {"strength": 3.0}, r"learner.strength \(0.0 and 3.0\)"),
        ("ranpac", {"features": 41}, r"learner.features \(40 and 41\)"),
        ("slda", {"prior_weight": 5.0}, r"learner.prior_weight \(-1.0 and 5.0\)"),
        ("fecam", {"tukey": 0.5}, r"learner.tukey \(1.0 and 0.5\)"),
        ("flymodel", {"lr": 0.1}, r"learner.lr \(0.03 and 0.1\)"),
    ],
)
def test_learners_with_different_settings_are_not_merged(case: str, settings: dict[str, Any], told: str) -> None:
    learner = taught(case, STREAM)
    before = pack(learner)[0]
    with pytest.raises(InputError, match=told):
        learner.merge(taught(case, STREAM, **settings))
    assert all(np.array_equal(array, before[name]) for name, array in pack(learner)[0].items())


@pytest.mark.parametrize(
    ("case", "told"),
    [
        ("ranpac", r"differ in the seed of the random features \(0 and 1\)"),
        ("flymodel", r"differ in the seed of the neurons' inputs \(0 and 1\)"),
    ],
)
def test_learners_with_different_seeds_are_not_merged(case: str, told: str) -> None:
    with pytest.raises(InputError, match=told):
        make(case).merge(make(case, seed=1))


@pytest.mark.parametrize("case", ["ncm", "slda", "ridge", "fecam"])
def test_the_seed_of_learners_that_draw_nothing_may_differ(case: str) -> None:
    one, two = taught(case, STREAM[:2]), make(case, seed=1)
    two.learn(STREAM[2])
    one.merge(two)
    assert_same(one, taught(case, STREAM), [0, 1, 2, 3])


def test_learners_with_different_priors_kinds_or_sizes_are_not_merged() -> None:
    slda = make("slda")
    for known, told in ((priors(2.0), "the prior covariance cannot"), (Priors(), "the presence of a prior covariance")):
        with pytest.raises(InputError, match=told):
            slda.merge(build(BY_CLASS["slda"], DIM, known))
    with pytest.raises(InputError, match="only learners of the same kind can be merged, but these are SLDA and ridge"):
        slda.merge(make("ridge"))
    with pytest.raises(InputError, match="only learners of the same kind"):
        make("ridge").merge(make("ranpac"))
    with pytest.raises(InputError, match=r"differ in the embedding dimension \(12 and 13\)"):
        make("ncm").merge(build({"name": "ncm"}, 13, Priors()))


@pytest.mark.parametrize("rows", [[0, 1, 2], [0, 1, 2, -1], [0.0, 1.0, 2.0, 3.0]], ids=str)
def test_rows_that_do_not_fit_the_other_learner(rows: list[Any]) -> None:
    with pytest.raises(
        InputError, match="each of the 4 rows of the learner to be merged to a row of at least 0, but is"
    ):
        make("ncm").merge(taught("ncm", STREAM), torch.tensor(rows))


# ── subtracting ──────────────────────────────────────────────────────────────────────────────────────


SUBTRACT = [case for case in ALL if case != "flymodel"]


def assert_near(learner: Learner, other: Learner, rows: list[int]) -> None:
    """As `assert_same`, with the rounding that the difference of two large sums leaves."""
    mine, theirs = learner.scores(TEST)[:, rows], other.scores(TEST)[:, rows]
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-4 * float(theirs.abs().max()))
    assert torch.equal(learner.predict(TEST), other.predict(TEST))


@pytest.mark.parametrize("case", SUBTRACT)
def test_what_two_have_in_common_counts_once_when_they_are_merged(case: str) -> None:
    """One goes on with known classes and its own new class 4, the other with a new one that it calls 4, too."""
    base = STREAM[:2]
    one, two = draw({0: 12, 4: 18}, seed=5), draw({1: 9, 2: 11, 4: 14}, seed=6)
    places = torch.tensor([0, 1, 2, 3, 5])
    learner, other, common = taught(case, [*base, one]), taught(case, [*base, two]), taught(case, base)
    before = pack(common)[0]
    learner.merge(other, places)
    learner.subtract(common)
    wanted = taught(case, [*base, one, renamed(two, places)])
    assert_near(learner, wanted, list(range(6)))
    assert learner.seen.tolist() == [1] * 6
    assert learner.tasks_learned == wanted.tasks_learned == 4
    assert all(np.array_equal(array, before[name]) for name, array in pack(common)[0].items())
    again = restore(*pack(learner))
    assert again.scores(TEST).numpy().tobytes() == learner.scores(TEST).numpy().tobytes()


@pytest.mark.parametrize("case", SUBTRACT)
def test_subtracting_undoes_merging(case: str) -> None:
    """The other's class 1 is class 3 here, its class 2 is class 5, and its row 0, untaught, is none."""
    rows = torch.tensor([99, 3, 5])
    learner, other = taught(case, STREAM), taught(case, [draw({1: 30, 2: 20}, seed=4)])
    learner.merge(other, rows.where(rows != 99, torch.tensor(0)))
    learner.subtract(other, rows)
    assert learner.seen.tolist() == [1, 1, 1, 1, 0, 0]
    assert learner.tasks_learned == 3
    assert_near(learner, taught(case, STREAM), [0, 1, 2, 3])
    learner.subtract(taught(case, STREAM))
    assert not learner.seen.any()
    assert not any(pack(learner)[0][name].any() for name in ("counts", "sums"))
    if isinstance(learner, LinearLearner):
        assert not learner.statistics.moments.any()


@pytest.mark.parametrize("case", ["ncm", "fecam", "ridge", "ridge, pooled"])
def test_nothing_is_left_of_a_row_whose_sums_were_rounded_otherwise(case: str) -> None:
    big, small = draw({1: 20}), draw({1: 20}, seed=1)
    big = Task(1e12 * big.embeddings, big.labels)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    both = Task(torch.cat([big.embeddings, small.embeddings])[order], torch.cat([big.labels, small.labels]))
    learner, other = taught(case, [big, small]), taught(case, [both])
    state = pack(other)[0]
    assert not np.array_equal(pack(learner)[0]["sums"], state["sums"])
    learner.subtract(other)
    assert not any(pack(learner)[0][name].any() for name in state.keys() & {"counts", "sums", "second", "seen"})


@pytest.mark.parametrize("case", SUBTRACT)
def test_subtracting_samples_that_were_never_added_is_refused(case: str) -> None:
    learner = taught(case, STREAM)
    before = pack(learner)[0]
    for task, told in ((draw({2: 41}), "row 2 has 40 samples, the other 41"), (draw({6: 3}), "row 6 has 0 .* other 3")):
        with pytest.raises(InputError, match=f"^only statistics that were added can be subtracted: {told}"):
            learner.subtract(taught(case, [task]))
    with pytest.raises(InputError, match="row 1 has 40 samples, the other 60"):  # of two classes together
        learner.subtract(taught(case, [draw({0: 30, 1: 30})]), torch.tensor([1, 1]))
    assert all(np.array_equal(array, before[name]) for name, array in pack(learner)[0].items())


def test_subtracting_asks_for_what_merging_asks_for() -> None:
    with pytest.raises(InputError, match=r"differ in learner.strength \(0.0 and 3.0\) cannot be subtracted"):
        taught("ridge", STREAM).subtract(taught("ridge", STREAM, strength=3.0))
    with pytest.raises(InputError, match="only learners of the same kind can be subtracted"):
        taught("ridge", STREAM).subtract(taught("slda", STREAM))
    with pytest.raises(
        InputError, match=r"each of the 4 rows of the learner to be subtracted to a row of at least 0, but is"
    ):
        taught("ncm", STREAM).subtract(taught("ncm", STREAM), torch.tensor([0, 1]))
    with pytest.raises(InputError, match="FlyModel learners cannot be subtracted: their weights are clipped at 1"):
        taught("flymodel", STREAM).subtract(taught("flymodel", STREAM[:1]))
