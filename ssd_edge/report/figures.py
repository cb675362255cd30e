"""Figures as SVG: drawn with matplotlib, then made small, accessible and independent of the theme of the page.

matplotlib draws axes, lines and cells. `Drawing.svg` then inserts names as plain text (so that neither the fonts nor
the markup of matplotlib apply to them), adds hover titles, replaces the sentinel colour `INK` by ``currentColor``, and
drops identifiers, style attributes and metadata. The same input gives the same bytes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import math
import os
import re
import sys
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from ssd_edge import files
from ssd_edge.errors import require
from ssd_edge.report.compare import DISPLAY, compared
from ssd_edge.report.wording import percent, points, step_name
from ssd_edge.system import cache_folder

INK = "#010203"
HEAT = "#2f7de1"
DARKEST = 0.8  # largest opacity of a cell: the text on it keeps 4.5 : 1 on a light and on a dark page
FONT_SIZE = 13
_SVG, _HREF = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}href"
_SETTINGS = {
    "font.size": FONT_SIZE, "text.color": INK, "axes.edgecolor": INK, "grid.color": INK, "grid.alpha": 0.16,
    "axes.xmargin": 0, "axes.ymargin": 0, "axes.spines.right": False, "axes.spines.top": False,
    "xtick.bottom": False, "xtick.color": INK, "xtick.labelsize": FONT_SIZE,
    "ytick.left": False, "ytick.color": INK, "ytick.labelsize": FONT_SIZE,
    "lines.scale_dashes": False, "path.simplify": False, "svg.fonttype": "none", "svg.hashsalt": "ssd-edge",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class LineStyle:
    """Colour, dash pattern and marker; lines differ in all three, so that none depends on its colour."""

    colour: str
    dash: tuple[float, ...] | None
    marker: str


# Each colour has at least 3.3 : 1 on a white and on a dark page.
STYLES = (
    LineStyle("#2f7de1", None, "o"),
    LineStyle("#d4622a", (7, 3), "s"),
    LineStyle("#2f9450", (2, 3), "^"),
    LineStyle("#a45bd0", (9, 3, 2, 3), "D"),
    LineStyle("#8a7a1f", (5, 2), "v"),
    LineStyle("#7a8798", (1.5, 2.5), "P"),
    LineStyle("#c2418f", (12, 3), "X"),
    LineStyle("#1a9a96", (8, 2, 2, 2, 2, 2), "<"),
    LineStyle("#c0504d", (4, 4), ">"),
    LineStyle("#7668e0", (14, 3, 2, 3, 2, 3), "*"),
    LineStyle("#5f9a1c", (1, 4), "p"),
    LineStyle("#b5793a", (10, 5), "d"),
    LineStyle("#8c8c8c", (3, 1), "h"),
    LineStyle("#3f86a8", (11, 2), "H"),
    LineStyle("#b0629a", (4, 2, 1, 2), "+"),
    LineStyle("#6f8f3a", (2, 1), "x"),
    LineStyle("#9a6fd0", (16, 4), "1"),
    LineStyle("#4d8f7a", (6, 3, 1, 3, 1, 3), "2"),
    LineStyle("#e0457b", (6, 1, 1, 1), "8"),
)


def learner_style(name: str) -> LineStyle:
    """Return the style of a learner, the same in all reports; learners without a display name share the last one."""
    return STYLES[list(DISPLAY).index(name) if name in DISPLAY else -1]


def text_width(text: str) -> float:
    """Return the approximate width of a text in pixels; East Asian characters are twice as wide."""
    return sum(13 if unicodedata.east_asian_width(letter) in "WF" else 7.2 for letter in text)


class Drawing:
    """A figure with one pair of axes, measured in pixels; made by `drawing` and used inside its block.

    Attributes:
        axes: matplotlib's axes.
    """

    def __init__(self, width: float, height: float, box: Sequence[float], name: str) -> None:
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure

        left, right, top, bottom = box
        figure = Figure(figsize=(width / 72, height / 72), dpi=72)  # one point of the SVG is one pixel
        figure.patch.set_visible(False)
        rectangle = (left / width, 1 - bottom / height, (right - left) / width, (bottom - top) / height)
        self.axes = figure.add_axes(rectangle)
        self.axes.patch.set_visible(False)
        self.axes.set_axisbelow(True)
        self._canvas = FigureCanvasSVG(figure)
        self._name, self._size, self._box = name, (width, height), box
        self._notes: dict[str, tuple[str, Sequence[str]]] = {}

    def group(self, kind: str, words: Sequence[str] = ()) -> str:
        """Return a matplotlib gid whose group gets the class `kind` and the texts or hover titles `words`."""
        identifier = f"note{len(self._notes)}"
        self._notes[identifier] = (kind, words)
        return identifier

    def title(self, text: str) -> None:
        """Write a heading above the axes."""
        self.axes.set_title("0", loc="left", fontsize=FONT_SIZE, gid=self.group("title", [text]))

    def across(self, text: str) -> None:
        """Write a label below the horizontal axis; matplotlib's own depends on its version."""
        left, right, _, bottom = self._box
        x, y = (left + right) / 2, self._size[1] - bottom - 36
        self.axes.text(x, y, "0", transform=None, gid=self.group("label", [text]), ha="center")

    def text(self, x: float, y: float, text: str, kind: str = "label", title: str = "", **options: Any) -> None:
        """Write a text whose middle line is at a point of the axes.

        Args:
            x: coordinate of the text.
            y: coordinate of the text.
            text: any characters; nothing in it is markup.
            kind: class of the element.
            title: hover title.
            options: of matplotlib's text.
        """
        self.axes.text(x, y, "0", gid=self.group(kind, [text, title] if title else [text]), **options)

    def line(
        self,
        points: Sequence[tuple[float, float]],
        style: LineStyle,
        width: float = 1.8,
        marked: Sequence[int] = (),
        titles: Sequence[str] = (),
        kind: str = "series",
        **options: Any,
    ) -> None:
        """Draw a line.

        Args:
            points: Coordinates ``(x, y)``.
            style: Colour, dash pattern and marker.
            width: Stroke width in pixels.
            marked: Indices of the points that get a marker.
            titles: Hover titles of the markers.
            kind: Class of the element.
            options: Options of matplotlib's line, also used for its markers.
        """
        options = {"color": style.colour, "clip_on": False, **options}
        self.axes.plot(*zip(*points, strict=True), ls=(0, style.dash), lw=width, gid=self.group(kind), **options)
        spots = zip(*(points[index] for index in marked), strict=True)
        self.axes.plot(*spots, ls="none", marker=style.marker, ms=7, mew=0, gid=self.group("marks", titles), **options)

    def cells(
        self,
        centres: Sequence[tuple[float, float]],
        colours: Sequence[Any],
        size: tuple[float, float],
        titles: Sequence[str] = (),
        kind: str = "cells",
    ) -> None:
        """Draw rectangles of `size` pixels around points of the axes."""
        from matplotlib.collections import PolyCollection
        from matplotlib.transforms import Affine2D

        x, y = size[0] / 2, size[1] / 2
        look: dict[str, Any] = {"linewidths": 0, "clip_on": False, "gid": self.group(kind, titles)}
        place: dict[str, Any] = {"transform": Affine2D(), "offset_transform": self.axes.transData, "offsets": centres}
        outline = [[(-x, -y), (x, -y), (x, y), (-x, y)]]
        self.axes.add_collection(PolyCollection(outline, facecolors=colours, **look, **place), autolim=False)

    def legend(self, names: Sequence[str], styles: Sequence[LineStyle]) -> None:
        """List lines to the right of the axes; matplotlib's own legend depends on the fonts of the machine."""
        from matplotlib.transforms import IdentityTransform

        _, x, top, _ = self._box
        y = self._size[1] - top
        for name, style in zip(names, styles, strict=True):
            key = [(x + 14, y), (x + 26, y), (x + 38, y)]
            self.line(key, style, marked=[1], kind="legend", transform=IdentityTransform())
            self.text(x + 46, y, name, "name", transform=IdentityTransform())
            y -= 20

    def svg(self, label: str, stretched: bool = False) -> str:
        """Return the figure as an element of an HTML page.

        Args:
            label: what screen readers read in place of the figure.
            stretched: take the width of the page instead of the figure's own.
        """
        buffer = io.BytesIO()
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        self._canvas.print_svg(buffer, metadata=metadata)  # type: ignore[no-untyped-call]  # untyped in matplotlib
        root = ElementTree.fromstring(buffer.getvalue())
        root.remove(root[0])  # a style sheet, which would apply to the whole page
        for group in root.iter(f"{_SVG}g"):
            if group.get("id") in self._notes:
                _annotate(group, *self._notes[str(group.get("id"))])
        shapes = (shape.get("id") for shape in root.iterfind(f".//{_SVG}defs/*"))
        names = {shape: f"{self._name}-{number}" for number, shape in enumerate(shapes)}
        for element in root.iter():
            element.attrib = _plain(element.attrib, names)
            element.tag, element.tail = element.tag.removeprefix(_SVG), None
            element.text = element.text if element.tag in ("text", "title") else None
        wide, tall = (f"{side:g}" for side in self._size)
        root.attrib = {
            "viewBox": f"0 0 {wide} {tall}",
            "width": "100%" if stretched else wide,
            "role": "img",
            "aria-label": label,
        }
        return ElementTree.tostring(root, encoding="unicode")


@contextlib.contextmanager
def drawing(width: float, height: float, box: Sequence[float], name: str = "mark") -> Iterator[Drawing]:
    """Start a figure under settings that do not depend on the user's matplotlibrc.

    Args:
        width: width of the figure in pixels.
        height: height of the figure in pixels.
        box: left, right, top and bottom edge of the axes in pixels.
        name: prefix of identifiers; two figures of one page need different ones.

    Raises:
        EnvironmentUnfitError: matplotlib is not installed.
    """
    _keep_caches_together()
    with require("matplotlib.style", "train", "draw figures").context(["default", _SETTINGS]):
        yield Drawing(width, height, box, name)


def _keep_caches_together() -> None:
    """Let matplotlib list the fonts in our cache, unless it is loaded or the user has a folder for it already."""
    if "matplotlib" in sys.modules or "MPLCONFIGDIR" in os.environ:
        return
    bases = (("XDG_CONFIG_HOME", "~/.config"), ("XDG_CACHE_HOME", "~/.cache"))
    folders = [Path(os.environ.get(name) or default).expanduser() / "matplotlib" for name, default in bases]
    if not any(map(files.exists, folders)):
        os.environ["MPLCONFIGDIR"] = str(cache_folder() / "matplotlib")


def document(svg: str) -> str:
    """Return an SVG file: the element of `Drawing.svg` with its namespaces, a font and colours for both themes."""
    namespaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    colours = "<style>svg{color:#222}@media(prefers-color-scheme:dark){svg{color:#ddd}}</style>"
    start, _, rest = svg.partition(">")
    font = f'font-family="system-ui, sans-serif" font-size="{FONT_SIZE}"'
    return f"{start.replace('<svg', f'<svg {namespaces} {font}')}>{colours}{rest}\n"


def _annotate(group: ElementTree.Element, kind: str, words: Sequence[str]) -> None:
    """Give a group its class, and its text or the hover titles of its marks."""
    group.set("class", kind)
    marks = group.findall(f"{_SVG}text")
    if marks:
        marks[0].text, *words = words
        if kind != "title":
            marks[0].set("dy", ".35em")  # centred by the browser: matplotlib's measures depend on its version
    elif words:
        marks = list(group.iter(f"{_SVG}use")) or group.findall(f"{_SVG}path")
    if words:
        for mark, title in zip(marks, words, strict=True):
            ElementTree.SubElement(mark, f"{_SVG}title").text = title


def _plain(attributes: Mapping[str, str], names: Mapping[str | None, str]) -> dict[str, str]:
    """Return short attributes in place of matplotlib's style and identifiers; `names` are the new identifiers."""
    plain = {key: value for key, value in attributes.items() if key in ("class", "d", "x", "y", "dy")}
    if attributes.get("id") in names:
        plain["id"] = names[attributes["id"]]
    if _HREF in attributes:
        plain["xlink:href"] = "#" + names[attributes[_HREF][1:]]
    transform = attributes.get("transform", "rotate(-0 ")
    if not transform.startswith("rotate(-0 "):
        plain["transform"] = transform
    for declaration in filter(None, attributes.get("style", "").split(";")):
        key, value = (part.strip() for part in declaration.split(":", 1))
        if key == "font":  # matplotlib before 3.11
            plain |= {
                "font-weight" if word.isdigit() else "font-size": word
                for word in re.findall(r"\b\d[\d.]*(?:px)?", value)
            }
        elif key != "font-family":
            plain[key] = value.replace(INK, "currentColor")
    if plain.get("font-size") == f"{FONT_SIZE}px":
        del plain["font-size"]
    return {key: _compact(plain[key]) for key in sorted(plain)}


def _compact(value: str) -> str:
    """Return an attribute with two decimals and without unnecessary spaces."""
    value = re.sub(r"-?\d+\.\d+", lambda match: f"{round(float(match[0]), 2) + 0.0:g}", " ".join(value.split()))
    return re.sub(r" ?\b([MLCQz])(?: |$)", r"\1", value)


def _spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Return positions at least `gap` apart, as close as possible to the ascending `wanted`, within the limits."""
    blocks: list[tuple[float, int]] = []  # the sum of the members' first positions, and their number
    for index, value in enumerate(wanted):
        total, members = value - index * gap, 1
        while blocks and blocks[-1][0] / blocks[-1][1] >= total / members:
            total, members = total + blocks[-1][0], members + blocks.pop()[1]
        blocks.append((total, members))
    starts = [total / members for total, members in blocks for _ in range(members)]
    latest = high - gap * (len(wanted) - 1)
    return [min(max(start, low), latest) + index * gap for index, start in enumerate(starts)]


def _shorten(text: str, limit: float) -> str:
    """Cut a text to so many pixels."""
    while text_width(text) > limit:
        text = text.rstrip("…")[:-1].rstrip(", ") + "…"
    return text


def curves(metrics: Mapping[str, Any], wide: bool) -> str:
    """Draw accuracy by tasks learned: one line per method, named at its end; joint training is a point at the end.

    Args:
        metrics: of at least two tasks or experiences.
        wide: draw for a wide screen; a narrow one needs its own figure, or the text would be too small.
    """
    methods, tasks = compared(metrics), len(metrics["accuracy_matrix"])
    accuracies = [method.values.get("accuracy_curve") or [method.values["average_accuracy"]] for method in methods]
    series = [list(enumerate(values, tasks - len(values) + 1)) for values in accuracies]
    high = max(math.ceil(10 * max(map(max, accuracies))) / 10, 0.1)
    low = min(math.floor(10 * min(map(min, accuracies))) / 10, high - 0.1)
    step = step_name(len(metrics["tasks"]), tasks)

    width, height, box, gap = (1000, 400, (52, 820, 14, 352), 34) if wide else (360, 340, (48, 212, 14, 292), 22)
    left, right, top, bottom = box
    across, up = (tasks - 1) / (right - left), (high - low) / (bottom - top)  # task and accuracy per pixel
    rising = sorted(range(len(series)), key=lambda index: series[index][-1][1])
    spread = _spread([series[index][-1][1] for index in rising], 17 * up, low, high)
    heights = dict(zip(rising, spread, strict=True))
    with drawing(width, height, box, "wide" if wide else "narrow") as figure:
        from matplotlib.ticker import MaxNLocator, MultipleLocator, PercentFormatter

        figure.axes.set(xlim=(1, tasks), ylim=(low, high))
        figure.across(f"{step}s learned")
        figure.axes.xaxis.set_major_locator(MaxNLocator((right - left) // 26, integer=True, min_n_ticks=1))
        figure.axes.yaxis.set_major_locator(MultipleLocator(0.1))
        figure.axes.yaxis.set_major_formatter(PercentFormatter(1, 0, " %"))
        figure.axes.grid(axis="y", clip_on=False)
        for index in reversed(range(len(methods))):  # the learner on top
            method, curve, own = methods[index], series[index], methods[index].role == "learner"
            style = learner_style(method.name)
            marked = list(range(len(curve) - 1, -1, -math.ceil(20 * across)))
            titles = [
                f"{method.display}, {curve[at][0]} of {tasks} {step}s learned: {percent(curve[at][1])}" for at in marked
            ]
            figure.line(curve, style, 3.5 if own else 1.8, marked, titles)
            end, x = curve[-1][1], tasks + gap * across
            figure.axes.plot(
                [tasks + 7 * across, x - 5 * across], [end, heights[index]],
                color=style.colour, alpha=0.6, lw=1, clip_on=False,
            )  # fmt: skip
            name = f"{_shorten(method.display, width - right - gap - 40)} {points(end)}"
            weight = "bold" if own else "normal"
            figure.text(x, heights[index], name, f"name {method.role}", weight=weight)
        return figure.svg("Accuracy by tasks learned", stretched=True)


def _shade(accuracy: float) -> tuple[str, float]:
    """Return colour and opacity of a cell: quadratic, because most accuracies lie in the upper half."""
    return HEAT, round(0.04 + (DARKEST - 0.04) * accuracy**2, 2)


def heat_map(metrics: Mapping[str, Any]) -> str:
    """Draw the accuracy matrix; its empty upper half holds the class names, each next to the top of its column."""
    matrix, tasks = metrics["accuracy_matrix"], metrics["tasks"]
    count, introduced = len(matrix), metrics.get("introduced", range(len(tasks)))
    step = step_name(len(tasks), count)
    names = [", ".join(map(str, task["classes"])) for task in tasks]
    numbered = count <= 20  # with more rows a number would not fit into its cell
    square = max(6, 620 // count)
    wide, tall = (56, 40) if count <= 6 else (52, 32) if count <= 12 else (36, 26) if numbered else (square, square)
    left, shown = 76, [_shorten(name, 220) for name in names]
    right, bottom = left + len(tasks) * wide, count * tall
    ends = [left + (column + 1) * wide + 8 + text_width(name) for column, name in enumerate(shown)]
    size = (math.ceil(max(right, *ends)), bottom + (46 if numbered else 72))

    learned = [
        (r, c) for r in range(count) for c in range(len(tasks)) if introduced[c] <= r and matrix[r][c] is not None
    ]
    with drawing(*size, (left, right, 0, bottom), "cell") as figure:
        from matplotlib.ticker import FuncFormatter, MaxNLocator

        axes = figure.axes
        axes.set(xlim=(0.5, len(tasks) + 0.5), ylim=(count + 0.5, 0.5))
        figure.across("on task")
        axes.spines[:].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(max(1, min(len(tasks), (right - left) // 24)), integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(max(1, min(count, bottom // 18)), integer=True))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda row, _: f"after {row:.0f}"))
        titles = []
        for row, column in learned:
            on = f"{column + 1} ({shown[column]})" if numbered else column + 1
            titles.append(f"after {step} {row + 1}, on task {on}: {percent(matrix[row][column])}")
        shades = [_shade(matrix[row][column]) for row, column in learned]
        figure.cells([(column + 1, row + 1) for row, column in learned], shades, (wide - 1, tall - 1), titles)
        for row, column in learned if numbered else ():
            text = points(matrix[row][column]) if count <= 6 else f"{100 * matrix[row][column]:.0f}"
            figure.text(column + 1, row + 1, text, "number", ha="center")
        for column in range(0, len(tasks), math.ceil(15 * len(tasks) / bottom)):
            task = tasks[column]
            title = (
                f"task {column + 1}: {names[column]}; {task.get('train')} training and {task.get('test')} test images"
            )
            figure.text(column + 1.5 + 8 / wide, introduced[column] + 1, shown[column], title=title)
        if not numbered:
            y = count + 0.5 + 60 / tall
            centres = [(0.5 + (12 + 16 * tenth) / wide, y) for tenth in range(11)]
            figure.cells(centres, [_shade(tenth / 10) for tenth in range(11)], (16, 12), kind="scale")
            figure.text(centres[0][0] - 14 / wide, y, "0 %", ha="right")
            figure.text(centres[-1][0] + 14 / wide, y, "100 %")
        return figure.svg("Accuracy matrix")
