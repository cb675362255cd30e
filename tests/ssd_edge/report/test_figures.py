"""The geometry of the figures; what they say is tested with the report."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from ssd_edge.report.figures import _spread, tag


def test_tag_escapes_attributes_and_leaves_out_none() -> None:
    written = tag("a", "<b></b>", class_='"x"&', stroke_width=1.26, title=None)
    assert written == '<a class="&quot;x&quot;&amp;" stroke-width="1.3"><b></b></a>'


def test_labels_that_collide_are_centred_and_others_stay() -> None:
    assert _spread([50, 50, 200], 10, 0, 300) == [45, 55, 200]
    assert _spread([0, 1], 10, 0, 300) == [0, 10]
    assert _spread([299, 300], 10, 0, 300) == [290, 300]


@given(st.lists(st.floats(0, 300), min_size=1, max_size=12))
def test_labels_never_overlap_nor_leave_the_figure(wanted: list[float]) -> None:
    placed = _spread(sorted(wanted), 17, 0, 300)
    assert all(later - earlier >= 17 - 1e-9 for earlier, later in itertools.pairwise(placed))
    assert placed[0] >= 0
    assert placed[-1] <= 300 + 1e-9
