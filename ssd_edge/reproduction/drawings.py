"""Figures of the results page: one SVG file each, of stored results alone, readable on light and dark pages."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence
from html import escape

from ssd_edge.report.figures import tag
from ssd_edge.report.wording import points
from ssd_edge.reproduction.rows import Result, Row, mean
from ssd_edge.reproduction.specs import Experiment

WIDTH, HEIGHT = 760, 300
LEFT, RIGHT, TOP, BOTTOM = 56, 590, 34, 250  # of the plot; names of lines stand to its right
COLOURS = ("#2a6fb0", "#c4622d", "#3f8f4f", "#8a4fa3", "#a8862b", "#5b6b7a")
DASHES = (None, "6 3", "2 3", "8 3 2 3", "4 2", "1 3")
RANKS = 10  # neurons drawn at each point
STYLE = (
    "text{font:13px sans-serif;fill:#222}.axis{stroke:#999;fill:none}.grid{stroke:#ddd}.edge{stroke:#bbb}"
    "rect.page{fill:#fff}"
)


@dataclasses.dataclass(frozen=True)
class Series:
    """One line of a plot."""

    name: str
    points: Sequence[tuple[float, float]]


def _svg(title: str, *parts: str, width: int = WIDTH, height: int = HEIGHT) -> str:
    page = tag("rect", x=0, y=0, width=width, height=height, class_="page")
    heading = tag("text", escape(title), x=LEFT, y=20)
    view = {"xmlns": "http://www.w3.org/2000/svg", "viewBox": f"0 0 {width} {height}", "width": width}
    return tag("svg", tag("style", STYLE), page, heading, *parts, **view, role="img", aria_label=title) + "\n"


def _ticks(low: float, high: float) -> list[float]:
    """About five round numbers from `low` to `high`."""
    span = (high - low) or 1.0
    step = next(size * 10**power for power in range(-4, 7) for size in (1, 2, 5) if span / (size * 10**power) <= 6)
    first = int(low / step) * step
    found = [first + step * number for number in range(9)]
    return [round(value, 6) for value in found if low - 1e-9 <= value <= high + 1e-9]


def lines(
    title: str,
    series: Sequence[Series],
    across: str,
    edges: Sequence[float] = (),
    limits: tuple[float, float] | None = None,
) -> str:
    """Lines over a common axis.

    Args:
        title: above the plot; says what the vertical axis is.
        series: at least one, with at least one point in all.
        across: what the horizontal axis is.
        edges: where tasks end.
        limits: of the vertical axis; None: those of the points.
    """
    every = [point for one in series for point in one.points]
    xs = [x for x, _ in every]
    low, high = limits or (min(y for _, y in every), max(y for _, y in every))
    left, right = min(xs), max(xs)
    high, right = (high if high > low else low + 1), (right if right > left else left + 1)

    def at_x(x: float) -> float:
        return LEFT + (RIGHT - LEFT) * (x - left) / (right - left)

    def at_y(y: float) -> float:
        return BOTTOM - (BOTTOM - TOP) * (y - low) / (high - low)

    parts = [tag("path", d=f"M{LEFT} {TOP}V{BOTTOM}H{RIGHT}", class_="axis")]
    for tick in _ticks(low, high):
        parts.append(tag("path", d=f"M{LEFT} {at_y(tick):.1f}H{RIGHT}", class_="grid"))
        parts.append(tag("text", f"{tick:g}", x=LEFT - 6, y=at_y(tick) + 4, text_anchor="end"))
    for tick in _ticks(left, right):
        parts.append(tag("text", f"{tick:g}", x=at_x(tick), y=BOTTOM + 18, text_anchor="middle"))
    parts += [tag("path", d=f"M{at_x(edge):.1f} {TOP}V{BOTTOM}", class_="edge") for edge in edges]
    parts.append(tag("text", escape(across), x=(LEFT + RIGHT) / 2, y=BOTTOM + 38, text_anchor="middle"))
    for number, one in enumerate(series):
        colour = COLOURS[number % len(COLOURS)]
        way = "L".join(f"{at_x(x):.1f} {at_y(y):.1f}" for x, y in one.points)
        look = {"stroke": colour, "stroke_width": 1.6, "stroke_dasharray": DASHES[number % len(DASHES)]}
        parts.append(tag("path", d=f"M{way}", fill="none", **look))
        y = TOP + 10 + 20 * number
        parts.append(tag("path", d=f"M{RIGHT + 12} {y - 4}h22", fill="none", **look))
        parts.append(tag("text", escape(one.name), x=RIGHT + 40, y=y))
    return _svg(title, *parts)


def _position(trace: Sequence[Mapping[str, object]], point: Mapping[str, object]) -> float:
    """Epochs since the first task."""
    return point["task"] * max(one["epoch"] for one in trace) + point["epoch"]


def _edges(trace: Sequence[Mapping[str, object]]) -> list[float]:
    """Where each task but the last one ends."""
    epochs, tasks = max(one["epoch"] for one in trace), max(one["task"] for one in trace)
    return [float(epochs * (task + 1)) for task in range(tasks)]


def _followed(trace: Sequence[Mapping[str, object]], name: str) -> list[tuple[float, float]]:
    return [(_position(trace, one), one[name]) for one in trace if one[name] is not None]


def _traced(rows: Sequence[Row]) -> list[tuple[str, Result]]:
    """The first stored result of each row that has a trace."""
    found = []
    for row in rows:
        results = [one for _, one in sorted(row.results.items()) if one.get("trace")]
        if results:
            found.append((row.system.name, results[0]))
    return found


def similarity(rows: Sequence[Row]) -> dict[str, str]:
    """Figure 5: cosine, Jaccard and divergence by epoch."""
    said = {
        "subnetwork_cosine": "cosine of the Top-n keys, teacher and student",
        "jaccard": "Jaccard of the k most frequent neurons, one point and the next",
        "teacher_divergence": "KL(teacher ‖ student) on the task's data",
    }
    made = {}
    for name, title in said.items():
        traced = _traced(rows)
        series = [Series(system, _followed(one["trace"], name)) for system, one in traced]
        series = [one for one in series if one.points]
        if series:
            made[name.split("_")[-1]] = lines(title, series, "epoch", _edges(traced[0][1]["trace"]))
    return made


def training(rows: Sequence[Row]) -> dict[str, str]:
    """Figure 6: accuracy on the data being learned. Systems of different length share an axis of tasks."""
    series = []
    for system, one in _traced(rows):
        trace = one["trace"]
        longest = max(point["epoch"] for point in trace)
        way = [(point["task"] + point["epoch"] / longest, point["train_accuracy"]) for point in trace]
        series.append(Series(system, way))
    return {"": lines("accuracy on the task's training data", series, "task")} if series else {}


def tasks(rows: Sequence[Row]) -> dict[str, str]:
    """Figure 7: test accuracy of each task, and over all of them (unseen ones count as 0)."""
    made = {}
    for _, one in _traced(rows)[:1]:
        trace = one["trace"]
        count = len(trace[0]["test_accuracy"])
        every = [(_position(trace, point), statistics.fmean(point["test_accuracy"])) for point in trace]
        series = [Series("all tasks", every)]
        for task in range(count):
            way = [(_position(trace, p), p["test_accuracy"][task]) for p in trace if p["task"] >= task]
            series.append(Series(f"task {task}", way))
        made[""] = lines("test accuracy, argmax over all outputs", series, "epoch", _edges(trace), (0.0, 1.0))
    return made


def neurons(rows: Sequence[Row]) -> dict[str, str]:
    """Figure 2: the most frequent neurons by epoch; a colour is a neuron."""
    made = {}
    for _, one in _traced(rows)[:1]:
        trace = one["trace"]
        ranks = min(RANKS, len(trace[0]["top"]))
        width = (RIGHT - LEFT) / len(trace)
        tall = (BOTTOM - TOP) / ranks
        parts = []
        for column, point in enumerate(trace):
            for rank, neuron in enumerate(point["top"][:ranks]):
                said = tag("title", f"task {point['task']}, epoch {point['epoch']}, rank {rank + 1}: neuron {neuron}")
                hue = neuron * 137 % 360  # neighbours in number differ in colour
                spot = {"x": LEFT + column * width, "y": TOP + rank * tall, "width": width + 0.3, "height": tall - 1}
                parts.append(tag("rect", said, **spot, fill=f"hsl({hue},55%,{40 + neuron % 3 * 12}%)"))
        parts.append(tag("text", "rank 1", x=LEFT - 6, y=TOP + 12, text_anchor="end"))
        parts.append(tag("text", str(ranks), x=LEFT - 6, y=BOTTOM - 4, text_anchor="end"))
        said = f"epochs, {max(point['task'] for point in trace) + 1} tasks one after the other"
        parts.append(tag("text", said, x=(LEFT + RIGHT) / 2, y=BOTTOM + 38, text_anchor="middle"))
        made[""] = _svg("most frequent neurons; each colour is a neuron", *parts)
    return made


def values(rows: Sequence[Row]) -> dict[str, str]:
    """Figure 3: accuracy by a number in the systems' names, ours and the paper's."""
    own, reported = [], []
    for row in rows:
        x = float(row.system.name.split("=")[1])
        found = mean(row.values("accuracy"))
        own += [] if found is None else [(x, found)]
        printed = row.system.reported.get(row.stream)
        reported += [] if printed is None else [(x, printed)]
    series = [one for one in (Series("ours", own), Series("paper", reported)) if one.points]
    return {"": lines("final accuracy", series, rows[0].system.name.split("=")[0].strip())} if own else {}


def surface(rows: Sequence[Row]) -> dict[str, str]:
    """Figure 4: accuracy over two numbers in the systems' names, as a table of shades."""
    found: dict[tuple[str, str], float] = {}
    for row in rows:
        first, second = (part.split("=")[1].strip() for part in row.system.name.split(","))
        accuracy = mean(row.values("accuracy"))
        if accuracy is not None:
            found[first, second] = accuracy
    if not found:
        return {}
    down, across = (sorted({key[axis] for key in found}, key=float) for axis in (0, 1))
    low, high = min(found.values()), max(found.values())
    names = [part.split("=")[0].strip() for part in rows[0].system.name.split(",")]
    wide, tall, parts = 90, 44, []
    for (first, second), accuracy in sorted(found.items()):
        x, y = LEFT + 40 + across.index(second) * wide, TOP + 26 + down.index(first) * tall
        shade = 0.08 + 0.6 * ((accuracy - low) / (high - low) if high > low else 0.5)
        spot = {"x": x, "y": y, "width": wide - 2, "height": tall - 2}
        parts.append(tag("rect", **spot, fill=COLOURS[0], fill_opacity=f"{shade:.2f}"))
        parts.append(tag("text", points(accuracy), x=x + wide / 2, y=y + tall / 2 + 4, text_anchor="middle"))
    for number, value in enumerate(across):
        x = LEFT + 40 + (number + 0.5) * wide
        parts.append(tag("text", f"{names[1]} = {value}", x=x, y=TOP + 18, text_anchor="middle"))
    for number, value in enumerate(down):
        y = TOP + 26 + (number + 0.5) * tall + 4
        parts.append(tag("text", f"{names[0]} = {value}", x=LEFT + 32, y=y, text_anchor="end"))
    return {"": _svg("final accuracy in percent", *parts, height=TOP + 40 + tall * len(down))}


DRAWN: dict[str, Callable[[Sequence[Row]], dict[str, str]]] = {
    "neurons": neurons,
    "similarity": similarity,
    "training": training,
    "tasks": tasks,
    "values": values,
    "surface": surface,
}


def figures(experiment: Experiment, stream: str, rows: Sequence[Row]) -> dict[str, str]:
    """Files of an experiment's figure: name → SVG; nothing where nothing is stored."""
    if not experiment.figure:
        return {}
    made = DRAWN[experiment.figure](rows)
    return {"-".join(filter(None, (experiment.id.lower(), stream, part))) + ".svg": text for part, text in made.items()}
