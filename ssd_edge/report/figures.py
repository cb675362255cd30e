"""The figures of the report, as SVG for an HTML page; their colours are in its style sheet (`report`).

They are written by hand, not by a plotting library: text stays text (it can be selected, searched and read aloud),
every mark has a hover title, colours follow the reader's light or dark setting, and a page weighs tens of kilobytes,
not hundreds (five tasks 40 kB, ten 70).
"""

from __future__ import annotations

import dataclasses
import math
import unicodedata
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from ssd_edge.report.compare import Method, compared
from ssd_edge.report.wording import percent, points, step_name

FULL = 0.65  # share of colour in a cell from which its number needs the other ink; both then have 4.3 : 1


def tag(name: str, *content: str, **attributes: object) -> str:
    """One element. Attribute values are escaped here; `content` is markup, so text in it must be escaped already.

    ``class_`` is written ``class`` and ``text_anchor`` ``text-anchor``; an attribute that is None is left out.
    """
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{round(value, 1) if isinstance(value, float) else escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return f"<{name}{written}>{''.join(content)}</{name}>"


def _title(text: str) -> str:
    """What a mark says when the pointer rests on it."""
    return tag("title", escape(text))


def _shorten(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 1].rstrip(", ") + "…"


def _stride(pitch: float, needed: float) -> int:
    """Label every how many marks, when marks are `pitch` apart and labels need `needed`."""
    return next((step for step in (1, 2, 5, 10, 20, 50) if step * pitch >= needed), 100)


# Lines differ in colour, dash and marker, so that no reader depends on colour. The learner's comes first.
_DASHES = (None, "7 3", "2 3", "9 3 2 3", "5 2", "1.5 2.5", "12 3", "8 2 2 2 2 2", "4 4", "14 3 2 3 2 3", "1 4")
_MARKERS = (
    "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0 -8 0z",  # circle
    "M-3.2 -3.2h6.4v6.4h-6.4z",  # square
    "M0 -4.2L4 3.2H-4z",  # triangle
    "M0 -4.4L4.4 0L0 4.4L-4.4 0z",  # diamond
    "M0 4.2L4 -3.2H-4z",  # triangle that stands on its tip
    "M-1.4 -4.2h2.8v2.8h2.8v2.8h-2.8v2.8h-2.8v-2.8h-2.8v-2.8h2.8z",  # plus
    "M-4.4 -1.6h8.8v3.2h-8.8z",  # bar
    "M-1.6 -4.4h3.2v8.8h-3.2z",  # upright bar
    "M0 -4.6L1.4 -1.4L4.6 0L1.4 1.4L0 4.6L-1.4 1.4L-4.6 0L-1.4 -1.4z",  # star
    "M-4 -4H4L-4 4H4z",  # hourglass
    "M-4.2 0L3.2 -4V4z",  # triangle that points to the left
)


def _spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Positions at least `gap` apart, as near as can be to the ascending `wanted`: those that collide are centred."""
    blocks: list[tuple[float, int]] = []  # the sum of the members' first positions, and their number
    for index, value in enumerate(wanted):
        total, members = value - index * gap, 1
        while blocks and blocks[-1][0] / blocks[-1][1] >= total / members:
            total, members = total + blocks[-1][0], members + blocks.pop()[1]
        blocks.append((total, members))
    starts = [total / members for total, members in blocks for _ in range(members)]
    latest = high - gap * (len(wanted) - 1)
    return [min(max(start, low), latest) + index * gap for index, start in enumerate(starts)]


@dataclasses.dataclass(frozen=True)
class _Frame:
    """Where tasks (or experiences) and accuracies lie in a drawing."""

    step: str
    tasks: int
    low: float
    high: float
    wide: bool

    @property
    def box(self) -> tuple[int, int, int, int]:
        """The left, right, top and bottom of what the axes enclose; the names of the lines need room on its right."""
        return (48, 840, 14, 356) if self.wide else (44, 216, 14, 296)

    @property
    def pitch(self) -> float:
        left, right, _, _ = self.box
        return (right - left) / (self.tasks - 1)

    def x(self, task: float) -> float:
        return self.box[0] + self.pitch * task

    def y(self, accuracy: float) -> float:
        _, _, top, bottom = self.box
        return bottom - (bottom - top) * (accuracy - self.low) / (self.high - self.low)

    def axes(self) -> str:
        left, right, _, bottom = self.box
        parts = []
        for tick in range(round(10 * self.low), round(10 * self.high) + 1):
            y = self.y(tick / 10)
            parts.append(tag("path", d=f"M{left} {y:.1f}H{right}", class_="grid"))
            parts.append(tag("text", f"{10 * tick} %", x=left - 8, y=y + 4, text_anchor="end"))
        stride = _stride(self.pitch, 26)
        for task in range(stride - 1, self.tasks, stride):
            parts.append(tag("text", str(task + 1), x=self.x(task), y=bottom + 20, text_anchor="middle"))
        parts.append(tag("text", f"{self.step}s learned", x=(left + right) / 2, y=bottom + 40, text_anchor="middle"))
        return "".join(parts)


def _line(frame: _Frame, style: int, method: Method, curve: Sequence[tuple[int, float]], label_y: float) -> str:
    """One method: its line, a marker every so many tasks, and its name at `label_y`, joined to the line's end."""
    marks = [
        tag(
            "path",
            _title(f"{method.display}, {task + 1} of {frame.tasks} {frame.step}s learned: {percent(accuracy)}"),
            d=_MARKERS[style],
            transform=f"translate({frame.x(task):.1f} {frame.y(accuracy):.1f})",
            class_="mark",
        )
        for task, accuracy in curve
        if (frame.tasks - 1 - task) % _stride(frame.pitch, 20) == 0
    ]
    way = "L".join(f"{frame.x(task):.1f} {frame.y(accuracy):.1f}" for task, accuracy in curve)
    end, right = curve[-1][1], frame.box[1]
    label_x = right + (34 if frame.wide else 22)
    name = escape(_shorten(method.display, 15 if frame.wide else 11))
    return tag(
        "g",
        tag("path", d=f"M{way}", class_="line", stroke_dasharray=_DASHES[style]),
        tag("path", d=f"M{right + 6} {frame.y(end):.1f}L{label_x - 6} {label_y:.1f}", class_="leader"),
        *marks,
        tag("text", f"{name} {points(end)}", x=label_x, y=label_y + 4, class_="name"),
        class_=f"series s{style} {method.role}",
    )


def curves(metrics: Mapping[str, Any], wide: bool) -> str:
    """Accuracy by tasks learned, one line a method, each named at its end; joint training is its end alone.

    Args:
        metrics: of at least two tasks or experiences.
        wide: drawn for a wide screen or for a narrow one: shrinking the wide one would make its text too small.
    """
    methods, tasks = compared(metrics), len(metrics["accuracy_matrix"])
    series = []
    for method in methods:
        accuracies = method.values.get("accuracy_curve") or [method.values["average_accuracy"]]
        series.append(list(enumerate(accuracies, tasks - len(accuracies))))
    values = [accuracy for curve in series for _, accuracy in curve]
    high = max(math.ceil(10 * max(values)) / 10, 0.1)
    step = step_name(len(metrics["tasks"]), tasks)
    frame = _Frame(step, tasks, min(math.floor(10 * min(values)) / 10, high - 0.1), high, wide)

    ends = [frame.y(curve[-1][1]) for curve in series]
    downwards = sorted(range(len(ends)), key=ends.__getitem__)
    placed = _spread([ends[index] for index in downwards], 17, *frame.box[2:])
    label_y = dict(zip(downwards, placed, strict=True))
    lines = [
        _line(frame, index % len(_MARKERS), method, series[index], label_y[index])
        for index, method in enumerate(methods)
    ]
    view = "0 0 1000 400" if wide else "0 0 360 340"
    label = "Accuracy by tasks learned"
    return tag("svg", frame.axes(), *reversed(lines), viewBox=view, role="img", aria_label=label)  # the learner on top


def heat_map(metrics: Mapping[str, Any]) -> str:
    """The accuracy matrix. The empty upper half holds the class names, each beside the top of its column."""
    matrix, tasks = metrics["accuracy_matrix"], metrics["tasks"]
    count, introduced = len(matrix), metrics.get("introduced", range(len(tasks)))
    step = step_name(len(tasks), count)
    names = [", ".join(map(str, task["classes"])) for task in tasks]
    numbered = count <= 20  # beyond, a number would not fit into its cell
    if numbered:
        wide, tall = (56, 40) if count <= 6 else (52, 32) if count <= 12 else (36, 26)
    else:
        wide = tall = max(6, 620 // count)
    left, stride = 72, _stride(tall, 15)
    cells, labels, right = [], [], 0.0
    for row in range(count):
        middle = (row + 0.5) * tall + 4.5
        for column, accuracy in enumerate(matrix[row]):
            if accuracy is None or introduced[column] > row:
                continue
            on = f"{column + 1} ({_shorten(names[column], 40)})" if numbered else column + 1
            said = _title(f"after {step} {row + 1}, on task {on}: {percent(accuracy)}")
            x, shade = left + column * wide, _shade(accuracy)
            spot = {"x": x, "y": row * tall, "width": wide - 1, "height": tall - 1}
            cells.append(tag("rect", said, **spot, fill_opacity=f"{shade:.2f}"))
            if numbered:
                ink = "number full" if shade > FULL else "number"
                text = points(accuracy) if count <= 6 else f"{100 * accuracy:.0f}"
                cells.append(tag("text", text, x=x + wide / 2, y=middle, class_=ink))
        if (row + 1) % stride == 0:
            labels.append(tag("text", f"after {row + 1}", x=left - 8, y=middle, text_anchor="end"))
    named = _stride(tall * count / len(tasks), 15)
    for column in range(named - 1, len(tasks), named):
        task, start, name = tasks[column], left + (column + 1) * wide + 8, _shorten(names[column], 30)
        said = f"task {column + 1}: {names[column]}; {task.get('train')} training and {task.get('test')} test images"
        labels.append(tag("text", _title(said), escape(name), x=start, y=(introduced[column] + 0.5) * tall + 4.5))
        advance = sum(13 if unicodedata.east_asian_width(letter) in "WF" else 7.2 for letter in name)
        right = max(right, start + advance)
    for column in range(_stride(wide, 20) - 1, len(tasks), _stride(wide, 20)):
        x = left + (column + 0.5) * wide
        labels.append(tag("text", str(column + 1), x=x, y=count * tall + 17, text_anchor="middle"))
    labels.append(tag("text", "on task", x=left - 8, y=count * tall + 17, text_anchor="end"))
    width, height = math.ceil(max(right, left + len(tasks) * wide)), count * tall + 24
    shape = {"width": width, "height": height, "viewBox": f"0 0 {width} {height}"}
    return tag("svg", tag("g", *cells, class_="cells"), *labels, **shape, role="img", aria_label="Accuracy matrix")


def _shade(accuracy: float) -> float:
    """Share of colour of a cell: the square, because most accuracies lie in the upper half and must differ there."""
    return 0.04 + 0.96 * accuracy**2


def scale() -> str:
    """The heat map's colours, from 0 to 100 %."""
    steps = [
        tag("rect", x=72 + 16 * step, y=2, width=16, height=12, fill_opacity=f"{_shade(step / 10):.2f}")
        for step in range(11)
    ]
    ends = [tag("text", "0 %", x=64, y=12, text_anchor="end"), tag("text", "100 %", x=256, y=12)]
    colours = tag("g", *steps, class_="cells")
    return tag("svg", *ends, colours, width=310, height=18, class_="scale", aria_hidden="true")


def bar(share: float, said: str, limit: float | None = None) -> str:
    """A bar over the full width, 0 to 100 %, with a mark at `limit`; it has no viewBox, so it grows with the page."""
    mark = "" if limit is None else tag("line", x1=f"{100 * limit:.1f}%", x2=f"{100 * limit:.1f}%", y1=0, y2=26)
    track = tag("rect", y=6, width="100%", height=14, rx=3, class_="track")
    fill = tag("rect", y=6, width=f"{100 * share:.1f}%", height=14, rx=3, class_="fill")
    return tag("svg", _title(said), track, fill, mark, width="100%", height=26, role="img")
