import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from device_runtime.service.consensus import Consensus, StableAnswer
from ssd_edge.errors import InputError

LABELS = st.sampled_from(["cup", "nut", "screw", "unknown"])


@st.composite
def shapes(draw):
    """Draw valid values of window, share and minimum."""
    window = draw(st.integers(1, 9))
    share = draw(st.floats(0.5, 1.0, exclude_min=True))
    return window, share, draw(st.integers(1, window))


@given(shapes(), st.lists(LABELS, max_size=40))
def test_answer_has_its_share_of_the_window(shape, frames):
    window, share, minimum = shape
    consensus = Consensus(*shape)
    for number, label in enumerate(frames):
        answer = consensus.add(label, 0.5)
        recent = frames[max(0, number + 1 - window) : number + 1]
        enough = [name for name in set(recent) if recent.count(name) / len(recent) >= share]
        assert answer == (enough[0] if enough and len(recent) >= minimum else None)
        assert consensus.score == (0.5 if answer else 0.0)


@given(shapes(), LABELS, st.integers(1, 20))
def test_constant_stream_is_answered_after_minimum_frames(shape, label, length):
    consensus = Consensus(*shape)
    answers = [consensus.add(label) for _ in range(length)]
    early = min(shape[2] - 1, length)
    assert answers == [None] * early + [label] * (length - early)


@given(shapes().filter(lambda shape: shape[2] >= 2), st.integers(1, 20), st.integers(0, 19))
def test_single_odd_frame_is_never_the_answer(shape, length, place):
    consensus = Consensus(*shape)
    frames = ["cup"] * length
    frames.insert(min(place, length), "nut")
    assert {consensus.add(frame) for frame in frames} <= {"cup", None}


@given(st.integers(3, 20), st.integers(0, 19))
def test_single_odd_frame_does_not_interrupt_the_answer_by_default(length, place):
    consensus = Consensus()
    frames = ["cup"] * length
    frames.insert(min(place, length), "unknown")
    assert [consensus.add(frame) for frame in frames] == [None, None] + ["cup"] * (length - 1)


def test_unknown_can_win():
    consensus = Consensus()
    assert [consensus.add(label) for label in ["cup", "unknown", "unknown", "cup", "unknown"]][2:] == [
        "unknown",
        None,
        "unknown",
    ]


def test_new_object_is_answered_with_its_share_of_the_window():
    consensus = Consensus()
    for _ in range(9):
        consensus.add("cup")
    assert [consensus.add("nut") for _ in range(3)] == ["cup", "cup", "nut"]


def test_score_is_the_mean_of_agreeing_frames():
    consensus = Consensus()
    for label, score in [("cup", 0.4), ("nut", 0.0), ("cup", 0.8)]:
        consensus.add(label, score)
    assert consensus.score == pytest.approx(0.6)


@pytest.mark.parametrize("late", [12.1, 9.0], ids=["a pause", "a clock set back"])
def test_gap_drops_earlier_frames(late):
    consensus = Consensus(gap=2.0)
    assert [consensus.add("cup", 1.0, at) for at in (6.0, 8.0, 10.0)][-1] == "cup"
    assert consensus.add("cup", 1.0, late) is None
    assert consensus.add("cup", 1.0, late) is None
    assert consensus.add("cup", 1.0, late + 2.0) == "cup"


def test_frames_without_a_time_have_no_gap():
    consensus = Consensus(gap=1.0)
    consensus.add("cup", 1.0, 1.0)
    consensus.add("cup")
    assert consensus.add("cup", 1.0, 2.0) == "cup"


def test_reset():
    consensus = Consensus()
    for _ in range(5):
        consensus.add("cup")
    consensus.reset()
    assert (consensus.add("nut"), consensus.score) == (None, 0.0)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"window": 0}, "minimum"),
        ({"minimum": 0}, "minimum"),
        ({"minimum": 6}, "6 of 5"),
        ({"share": 0.5}, "0.5"),
        ({"share": 1.01}, "1.01"),
        ({"share": math.nan}, "nan"),
        ({"gap": 0.0}, "gap"),
        ({"gap": math.nan}, "gap"),
    ],
)
def test_values_out_of_range_are_refused(options, word):
    with pytest.raises(InputError, match=word):
        Consensus(**options)


@pytest.mark.parametrize(
    "frame", [("",), (None,), ("cup", math.nan), ("cup", math.inf), ("cup", 1.0, math.nan)], ids=str
)
def test_invalid_frame_is_refused_and_not_counted(frame):
    consensus = Consensus()
    consensus.add("cup")
    consensus.add("cup")
    with pytest.raises(InputError):
        consensus.add(*frame)
    assert consensus.add("cup") == "cup"


def test_a_stable_answer_changes_once_and_generations_do_not_vote_together() -> None:
    stable = StableAnswer()
    frames = [("cup", 1)] * 4 + [("cup", 2)] * 3 + [("nut", 2)] * 3
    seen = [stable.add(label, None, generation, float(at)) for at, (label, generation) in enumerate(frames)]
    assert seen == [
        (None, False), (None, False), ("cup", True), ("cup", False), (None, False), (None, False), ("cup", False),
        ("cup", False), ("cup", False), ("nut", True),
    ]  # fmt: skip
    assert stable.last == "nut"
