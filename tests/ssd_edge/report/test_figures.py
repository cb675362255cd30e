"""SVG figures: placement of labels, escaping, and independence of the user's settings; test_html checks the content."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssd_edge.errors import EnvironmentUnfitError
from ssd_edge.report.compare import DISPLAY
from ssd_edge.report.figures import INK, STYLES, _shorten, _spread, document, drawing, learner_style, text_width

NAMES = ["$x_1$", "犬 🐕", "<b> & \"c\" 'd'", r"\frac{1}{2}", "]]> --"]


def figure() -> str:
    with drawing(300, 200, (40, 200, 10, 160)) as drawn:
        drawn.title("a <title>")
        drawn.line([(0, 0.5), (1, 0.25), (2, 1)], STYLES[1], marked=[0, 2], titles=['first "one"', "last & least"])
        drawn.cells([(0, 0.5), (1, 0.75)], [("#2f7de1", 0.5), ("#2f7de1", 1)], (10, 10), ["a", "b"])
        drawn.cells([(0, 0.5)] * 30, ["#2f7de1"] * 29 + ["#ffffff"], (10, 10), ["c"] * 30)
        for name in NAMES:
            drawn.text(1, 0.5, name, title=name)
        drawn.legend(NAMES, STYLES[:5])
        return drawn.svg("what it shows <&>", stretched=True)


def test_text_stays_text_and_every_mark_has_a_title() -> None:
    root = ElementTree.fromstring(document(figure()))
    texts = [text for element in root.iter() if element.tag.endswith("}text") for text in [element.text]]
    for name in [*NAMES, "a <title>"]:
        assert name in texts
    titles = [element.text for element in root.iter() if element.tag.endswith("title")]
    assert titles.count("c") == 30
    for title in ['first "one"', "last & least", "a", "b", *NAMES]:
        assert titles.count(title) == 1


def test_svg_element_is_accessible_and_scalable() -> None:
    source = figure()
    root = ElementTree.fromstring(document(source))
    assert (root.get("role"), root.get("aria-label")) == ("img", "what it shows <&>")
    assert (root.get("viewBox"), root.get("width"), root.get("height")) == ("0 0 300 200", "100%", None)
    assert "style=" not in source
    assert "xmlns" not in source
    assert INK not in source
    assert "currentColor" in source
    references = {value for element in root.iter() for key, value in element.items() if key.endswith("href")}
    identifiers = [element.get("id") for element in root.iter() if element.get("id")]
    assert references == {f"#{identifier}" for identifier in identifiers}
    assert len(set(identifiers)) == len(identifiers)


def test_same_input_gives_same_bytes_with_any_matplotlibrc(tmp_path: Path) -> None:
    (tmp_path / "matplotlibrc").write_text(
        "lines.linewidth: 9\naxes.facecolor: red\nsvg.fonttype: path\nfont.size: 30\n"
    )
    folder = Path(__file__).parent
    code = f"import sys; sys.path.insert(0, {str(folder)!r}); import test_figures; print(test_figures.figure()); "
    code += "print('matplotlib.pyplot' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert done.stdout == figure() + "\nFalse\n"


def test_settings_are_restored() -> None:
    import matplotlib

    keys = set(matplotlib.rcParams) - {"backend"}  # reading it would select a backend
    before = {key: matplotlib.rcParams[key] for key in keys}
    figure()
    assert {key: matplotlib.rcParams[key] for key in keys} == before


def test_missing_matplotlib_is_reported_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.style", None)
    with pytest.raises(EnvironmentUnfitError, match=r"is needed to draw figures .*pip install 'ssd-edge\[train\]'"):
        figure()


def test_a_learner_has_one_style() -> None:
    assert len({learner_style(name) for name in DISPLAY}) == len(DISPLAY)
    assert learner_style("mine") == learner_style("another") not in {learner_style(name) for name in DISPLAY}


def test_colours_are_readable_on_light_and_dark_pages() -> None:
    def luminance(colour: str) -> float:
        parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        red, green, blue = (part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    for style in STYLES:
        for page in ("#ffffff", "#161b22"):
            dark, light = sorted((luminance(style.colour), luminance(page)))
            assert (light + 0.05) / (dark + 0.05) >= 3.3


def test_long_names_are_cut_to_their_width() -> None:
    assert _shorten("short", 100) == "short"
    for name in ("x" * 64, "犬" * 64, "a, b, " * 12):
        cut = _shorten(name, 200)
        assert cut.endswith("…")
        assert 150 < text_width(cut) <= 200


def test_colliding_labels_are_spread_around_their_centre_and_others_stay() -> None:
    assert _spread([50, 50, 200], 10, 0, 300) == [45, 55, 200]
    assert _spread([0, 1], 10, 0, 300) == [0, 10]
    assert _spread([299, 300], 10, 0, 300) == [290, 300]


@given(st.lists(st.floats(0, 300), min_size=1, max_size=12))
def test_labels_never_overlap_or_leave_the_figure(wanted: list[float]) -> None:
    placed = _spread(sorted(wanted), 17, 0, 300)
    assert all(later - earlier >= 17 - 1e-9 for earlier, later in itertools.pairwise(placed))
    assert placed[0] >= 0
    assert placed[-1] <= 300 + 1e-9
