"""Streams: task sizes, class orders, rows of labels, and the samples of each experience."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssd_edge.config import StreamConfig
from ssd_edge.errors import InputError
from ssd_edge.run.streams import (
    Stream,
    class_incremental,
    class_order,
    make_stream,
    task_sizes,
)

NAMES = tuple("abcdefg")
CIFAR_10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@pytest.mark.parametrize(
    ("classes", "tasks", "sizes"),
    [
        (2, 0, [2]),
        (3, 0, [3]),
        (5, 0, [3, 2]),
        (10, 0, [2] * 5),
        (20, 0, [2] * 10),
        (21, 0, [3] + [2] * 9),
        (100, 0, [10] * 10),
        (10, 3, [4, 3, 3]),
        (7, 7, [1] * 7),
        (10, 1, [10]),
    ],
)
def test_task_sizes(classes: int, tasks: int, sizes: list[int]) -> None:
    assert task_sizes(classes, tasks) == sizes


def test_more_tasks_than_classes_are_refused() -> None:
    with pytest.raises(InputError, match=r"stream.tasks is 4, but there are only 3 classes"):
        task_sizes(3, 4)


@settings(max_examples=100)
@given(st.integers(2, 300), st.integers(0, 40), st.integers(0, 2**31))
def test_every_class_is_in_one_task(classes: int, tasks: int, seed: int) -> None:
    names = tuple(str(number) for number in range(classes))
    stream = class_incremental(names, StreamConfig(tasks=min(tasks, classes)), seed)
    assert sorted(stream.order) == list(range(classes))
    sizes = [len(task) for task in stream.tasks]
    assert max(sizes) - min(sizes) <= 1
    labels = np.arange(classes)
    assert (np.array(stream.order)[stream.rows(labels)] == labels).all()
    assert sorted(np.concatenate(stream.groups(labels))) == list(range(classes))
    assert stream.introduced == tuple(range(len(sizes)))


def test_orders() -> None:
    assert class_order(NAMES, "sorted", seed=3) == list(range(7))
    assert class_order(NAMES, "seeded", seed=3) == class_order(NAMES, "seeded", seed=3)
    assert class_order(NAMES, "seeded", seed=3) != class_order(NAMES, "seeded", seed=4)
    assert class_order(NAMES, "6,5,4,3,2,1,0", seed=0) == [6, 5, 4, 3, 2, 1, 0]
    assert class_order(NAMES, "6 5, 4,3 2 1,0", seed=0) == [6, 5, 4, 3, 2, 1, 0]


@pytest.mark.parametrize("order", ["", "0,1", "0,0,1,2,3,4,5", "1,2,3,4,5,6,7", "-1,0,1,2,3,4,5"])
def test_an_order_names_every_class_once(order: str) -> None:
    with pytest.raises(InputError, match=r"must name each of the classes 0\.\.6 once, but is"):
        class_order(NAMES, order, seed=0)


@pytest.mark.parametrize("order", ["random", "0,1,x", "0;1"])
def test_a_malformed_order_is_refused(order: str) -> None:
    with pytest.raises(InputError, match=r"must be seeded, sorted, sdmlp-0 … sdmlp-97, or numbers such as 3,0,1, but"):
        class_order(NAMES, order, seed=0)


@pytest.mark.parametrize(("names", "listed"), [((), "0: none"), (("cat",), "1: cat")])
def test_a_stream_needs_two_classes(names: tuple[str, ...], listed: str) -> None:
    with pytest.raises(InputError, match=f"at least two classes, but there are {listed}"):
        class_incremental(names, StreamConfig(), seed=0)


def test_rows_and_groups() -> None:
    stream = class_incremental(NAMES[:4], StreamConfig(tasks=2, order="3,0,2,1"), seed=9)
    labels = np.array([0, 1, 2, 3, 3, 0])
    assert stream.tasks == ((3, 0), (2, 1))
    assert stream.order == [3, 0, 2, 1]
    rows = stream.rows(labels)
    assert rows.tolist() == [1, 3, 2, 0, 0, 1]
    assert rows.dtype == np.int64
    assert [group.tolist() for group in stream.groups(labels)] == [[0, 3, 4, 5], [1, 2]]
    assert [part.tolist() for part in stream.experiences(labels)] == [[0, 3, 4, 5], [1, 2]]


@pytest.mark.parametrize(
    ("name", "order"),
    [
        ("sdmlp-0", "0123456789"),
        ("sdmlp-3", "5412967038"),
        ("sdmlp-15", "2613709458"),
        ("sdmlp-27", "4291567083"),
        ("sdmlp-97", "7120684593"),
    ],
)
def test_published_orders(name: str, order: str) -> None:
    """The class orders of the five published runs of SDMLP on Split CIFAR-10."""
    assert class_order(CIFAR_10, name, seed=1) == [int(digit) for digit in order]
    assert sorted(CIFAR_10) == list(CIFAR_10)  # labels of CIFAR-10 are sorted by name, like ours
    for classes in (2, 37):
        drawn = class_order(tuple(map(str, range(classes))), name, seed=1)
        before = np.random.get_state()
        np.random.seed(int(name[6:]))  # as in the published code
        published = np.random.choice(np.arange(classes), classes, replace=False)
        np.random.set_state(before)
        assert drawn == (list(range(classes)) if name == "sdmlp-0" else published.tolist())


@pytest.mark.parametrize("order", ["sdmlp-4", "sdmlp-", "sdmlp-03"])
def test_an_unpublished_order_is_refused(order: str) -> None:
    with pytest.raises(InputError, match=f"is '{order}', but the orders of SDMLP are sdmlp-0, sdmlp-3, sdmlp-15, "):
        class_order(NAMES, order, seed=0)


CONFIGS = st.builds(
    StreamConfig,
    tasks=st.integers(1, 4),
    order=st.sampled_from(["seeded", "sorted", "sdmlp-15"]),
) | st.one_of(
    st.builds(
        StreamConfig,
        kind=st.just("repetition"),
        tasks=st.integers(1, 4),
        experiences=st.sampled_from([0, 4, 7, 11]),
        repetition=st.sampled_from([0.0, 0.2, 0.5, 1.0]),
    ),
    st.builds(
        StreamConfig,
        kind=st.just("blurry"),
        tasks=st.integers(1, 4),
        disjoint=st.sampled_from([0.0, 0.3, 1.0]),
        leakage=st.sampled_from([0.0, 0.1, 0.77, 1.0]),
    ),
)


@settings(max_examples=60)
@given(CONFIGS, st.integers(4, 6), st.integers(0, 2**31), st.randoms(use_true_random=False))
def test_every_sample_occurs_exactly_once(config: StreamConfig, classes: int, seed: int, random: object) -> None:
    labels = np.repeat(np.arange(classes), [random.randint(11, 20) for _ in range(classes)])
    random.shuffle(labels)
    names = NAMES[:classes]
    stream = make_stream(names, config, seed)
    parts = stream.experiences(labels)
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(labels)))
    for part in parts:
        assert len(part)
        assert (np.diff(part) > 0).all()
    # classes, rows and groups do not depend on the kind
    plain = class_incremental(names, StreamConfig(tasks=config.tasks, order=config.order), seed)
    assert (stream.tasks, stream.order) == (plain.tasks, plain.order)
    assert (stream.rows(labels) == plain.rows(labels)).all()
    again = make_stream(names, config, seed)
    assert again == stream
    assert all((first == second).all() for first, second in zip(parts, again.experiences(labels), strict=True))
    assert list(stream.introduced) == sorted(set(stream.introduced))
    for group, first in zip(stream.tasks, stream.introduced, strict=True):
        for label in group:
            counts = [int((labels[part] == label).sum()) for part in parts]
            if config.kind == "blurry":
                assert counts[first] >= max(1, (1 - config.leakage) * sum(counts) - 0.5)
                others = [count for number, count in enumerate(counts) if number != first]
                assert not any(others) or max(others) - min(others) <= 1
            else:
                assert counts.index(max(counts)) == first  # the first occurrence has the most samples
                assert max(counts) - min(filter(None, counts)) <= 1
            if config.kind == "class_incremental":
                assert counts[first] == sum(counts)


def shares(stream: Stream, classes: int, samples: int) -> np.ndarray:
    """Return the number of samples ``(classes, experiences)``."""
    labels = np.tile(np.arange(classes), samples)
    counts = [np.bincount(stream.rows(labels[part]), minlength=classes) for part in stream.experiences(labels)]
    return np.array(counts).T


def test_repetition_always_and_never() -> None:
    always = make_stream(NAMES[:4], StreamConfig(kind="repetition", tasks=2, repetition=1), seed=3)
    assert always.introduced == (0, 2)
    assert shares(always, 4, 8).tolist() == [[2, 2, 2, 2], [2, 2, 2, 2], [0, 0, 4, 4], [0, 0, 4, 4]]
    never = make_stream(NAMES[:4], StreamConfig(kind="repetition", tasks=2, repetition=0), seed=3)
    table = shares(never, 4, 8)
    assert (table[:, [1, 3]] > 0).sum(0).tolist() == [1, 1]  # an empty experience gets one earlier class
    assert not table[2:, 1].any()
    assert table.sum(1).tolist() == [8, 8, 8, 8]
    three = make_stream(NAMES[:6], StreamConfig(kind="repetition", tasks=3, experiences=7), seed=3)
    assert three.introduced == (0, 2, 4)


def test_a_class_recurs_with_the_configured_probability() -> None:
    names = tuple(map(str, range(100)))
    config = StreamConfig(kind="repetition", tasks=2, experiences=20, repetition=0.3)
    table = shares(make_stream(names, config, seed=0), 100, 40) > 0
    assert table[:50, 0].all()
    assert table[50:, 10].all()
    assert not table[50:, :10].any()
    later = np.concatenate([table[:50, 1:].ravel(), table[50:, 11:].ravel()])
    assert later.mean() == pytest.approx(0.3, abs=0.04)  # 1,400 draws: 3 standard errors
    other = shares(make_stream(names, config, seed=1), 100, 40) > 0
    assert (other[:50] != table[:50]).any()


def test_blurry_against_values_computed_by_hand() -> None:
    config = StreamConfig(kind="blurry", tasks=4, disjoint=0.5, leakage=0.3)
    table = shares(make_stream(NAMES[:4], config, seed=0), 4, 20)
    assert sorted(map(sorted, table.tolist())) == [[0, 0, 0, 20]] * 2 + [[2, 2, 2, 14]] * 2
    assert table.argmax(1).tolist() == [0, 1, 2, 3]
    odd = shares(make_stream(NAMES[:4], config, seed=0), 4, 14)  # 4 samples for three other tasks
    assert sorted(map(sorted, odd.tolist())) == [[0, 0, 0, 14]] * 2 + [[1, 1, 2, 10]] * 2


def test_a_blurry_class_keeps_a_sample_and_leaks_to_all_tasks_evenly() -> None:
    everything = StreamConfig(kind="blurry", tasks=2, disjoint=0, leakage=1)
    assert shares(make_stream(NAMES[:4], everything, seed=0), 4, 6).tolist() == [[1, 5]] * 2 + [[5, 1]] * 2
    one_each = StreamConfig(kind="blurry", tasks=4, disjoint=0, leakage=0.1)  # leaks one sample per class
    table = shares(make_stream(tuple(map(str, range(40))), one_each, seed=0), 40, 10)
    assert table.max(1).tolist() == [9] * 40
    assert ((table == 1).sum(0) >= 4).all()  # 10 on average


def test_the_leaked_samples_depend_on_the_seed() -> None:
    labels = np.tile(np.arange(4), 30)
    config = StreamConfig(kind="blurry", tasks=2, disjoint=0, order="sorted")
    first, second = (make_stream(NAMES[:4], config, seed).experiences(labels)[0].tolist() for seed in (0, 1))
    assert len(first) == len(second)
    assert first != second


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"repetition": 0.2}, r"stream.repetition is 0.2, but it belongs to stream.kind=repetition and the kind is"),
        ({"experiences": 9}, r"stream.experiences is 9, but it belongs to stream.kind=repetition"),
        ({"disjoint": 0.0}, r"stream.disjoint is 0.0, but it belongs to stream.kind=blurry"),
        (
            {"kind": "repetition", "leakage": 0.3},
            r"stream.leakage is 0.3, .* the kind is repetition; set stream.kind=blurry",
        ),
        ({"kind": "blurry", "experiences": 3}, r"stream.experiences is 3, .* and the kind is blurry"),
        ({"kind": "repetition", "experiences": 2}, r"stream.experiences is 2, but there are 3 tasks of new classes"),
        ({"kind": "blurry", "tasks": 8}, r"stream.tasks is 8, but there are only 7 classes"),
    ],
)
def test_settings_of_another_kind_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_stream(NAMES, StreamConfig(**options), seed=0)


def test_too_few_images_for_the_experiences() -> None:
    stream = make_stream(NAMES[:2], StreamConfig(kind="repetition", experiences=4, repetition=1), seed=0)
    assert [len(part) for part in stream.experiences(np.repeat([0, 1], 4))] == [2, 2, 2, 2]
    with pytest.raises(InputError, match=r"experience 4 of 4 has no training image: its classes have fewer images"):
        stream.experiences(np.repeat([0, 1], 3))
