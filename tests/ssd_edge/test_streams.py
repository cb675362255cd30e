"""Streams: sizes of tasks, orders of classes, rows of labels."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssd_edge.config import StreamConfig
from ssd_edge.errors import InputError
from ssd_edge.streams import Stream, class_incremental, class_order, task_sizes

NAMES = tuple("abcdefg")


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


def test_more_tasks_than_classes() -> None:
    with pytest.raises(InputError, match=r"stream.tasks is 4, but there are only 3 classes"):
        task_sizes(3, 4)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(2, 300), st.integers(0, 40), st.integers(0, 2**31))
def test_every_class_is_in_one_task(classes: int, tasks: int, seed: int) -> None:
    names = tuple(str(number) for number in range(classes))
    stream = class_incremental(names, StreamConfig(tasks=min(tasks, classes)), seed)
    assert sorted(stream.order) == list(range(classes))
    sizes = [len(task) for task in stream.tasks]
    assert max(sizes) - min(sizes) <= 1
    labels = np.arange(classes)
    assert (np.array(stream.order)[stream.rows(labels)] == labels).all()
    members = np.concatenate([stream.members(labels, task) for task in range(len(sizes))])
    assert sorted(members) == list(range(classes))


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
def test_an_order_of_no_form(order: str) -> None:
    with pytest.raises(InputError, match=r"must be seeded, sorted, or .*numbers such as 3,0,1, but is"):
        class_order(NAMES, order, seed=0)


@pytest.mark.parametrize(("names", "told"), [((), "0: none"), (("cat",), "1: cat")])
def test_a_stream_needs_two_classes(names: tuple[str, ...], told: str) -> None:
    with pytest.raises(InputError, match=f"at least two classes, but there are {told}"):
        class_incremental(names, StreamConfig(), seed=0)


def test_rows_and_members() -> None:
    stream = Stream(((3, 0), (2, 1)))
    labels = np.array([0, 1, 2, 3, 3, 0])
    assert stream.order == [3, 0, 2, 1]
    rows = stream.rows(labels)
    assert rows.tolist() == [1, 3, 2, 0, 0, 1]
    assert rows.dtype == np.int64
    assert stream.members(labels, 0).tolist() == [0, 3, 4, 5]
    assert stream.members(labels, 1).tolist() == [1, 2]


def test_the_order_of_a_configuration_is_cut_into_tasks() -> None:
    stream = class_incremental(NAMES[:4], StreamConfig(tasks=2, order="3,0,2,1"), seed=9)
    assert stream.tasks == ((3, 0), (2, 1))
