"""Figures of the results page: one SVG file each, drawn from stored results."""

from __future__ import annotations

import colorsys
import dataclasses
import math
import statistics
from collections.abc import Callable, Mapping, Sequence

from ssd_edge.report.figures import HEAT, INK, STYLES, LineStyle, document, drawing, text_width
from ssd_edge.report.wording import points
from ssd_edge.reproduction.rows import Result, Row, mean
from ssd_edge.reproduction.specs import Experiment

BOX = (60, 590, 34, 250)  # left, right, top and bottom of the axes
HEIGHT = 300
RANKS = 10  # neurons drawn at each point


@dataclasses.dataclass(frozen=True)
class Series:
    """One line of a plot; without a style it gets that of its position."""

    name: str
    points: Sequence[tuple[float, float]]
    style: LineStyle | None = None


def lines(
    title: str,
    series: Sequence[Series],
    across: str,
    edges: Sequence[float] = (),
    limits: tuple[float, float] | None = None,
) -> str:
    """Draw lines over a common axis.

    Args:
        title: heading, which names the vertical axis.
        series: at least one line, with at least one point in all.
        across: label of the horizontal axis.
        edges: where tasks end.
        limits: limits of the vertical axis; None: those of the points.
    """
    styles = [line.style or STYLES[number % len(STYLES)] for number, line in enumerate(series)]
    every = [point for line in series for point in line.points]
    left, right = min(x for x, _ in every), max(x for x, _ in every)
    low, high = limits or (min(y for _, y in every), max(y for _, y in every))
    width = math.ceil(BOX[1] + 50 + max(text_width(line.name) for line in series))
    with drawing(width, HEIGHT, BOX) as figure:
        from matplotlib.ticker import MaxNLocator

        high, right = (high if high > low else low + 1), (right if right > left else left + 1)
        figure.title(title)
        figure.across(across)
        figure.axes.set(xlim=(left, right), ylim=(low, high))
        for axis in (figure.axes.xaxis, figure.axes.yaxis):
            axis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
        figure.axes.grid(axis="y", clip_on=False)
        figure.axes.vlines(
            [edge for edge in edges if left < edge < right],
            low,
            high,
            colors=INK,
            alpha=0.4,
            lw=1,
            gid=figure.group("edge"),
        )
        for line, style in zip(series, styles, strict=True):
            figure.line(line.points, style, marked=range(0, len(line.points), math.ceil(len(line.points) / 12)))
        figure.legend([line.name for line in series], styles)
        return document(figure.svg(title))


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
    """Figure 2: the most frequent neurons by epoch; each colour is a neuron."""
    title = "most frequent neurons; each colour is a neuron"
    made = {}
    for _, one in _traced(rows)[:1]:
        trace = one["trace"]
        ranks = min(RANKS, len(trace[0]["top"]))
        centres, colours, titles = [], [], []
        for column, point in enumerate(trace):
            for rank, neuron in enumerate(point["top"][:ranks], 1):
                centres.append((column + 0.5, rank))
                hue, light = neuron * 137 % 360 / 360, 0.4 + neuron % 3 * 0.12  # neighbours in number differ in colour
                colours.append(colorsys.hls_to_rgb(hue, light, 0.55))
                titles.append(f"task {point['task']}, epoch {point['epoch']}, rank {rank}: neuron {neuron}")
        with drawing(BOX[1] + 20, HEIGHT, BOX) as figure:
            figure.title(title)
            tasks = max(point["task"] for point in trace) + 1
            across = f"epochs, {tasks} tasks one after the other"
            figure.axes.set(xlim=(0, len(trace)), ylim=(ranks + 0.5, 0.5), xticks=[])
            figure.across(across)
            figure.axes.set_yticks([1, ranks], ["rank 1", str(ranks)])
            size = (BOX[1] - BOX[0]) / len(trace) + 0.3, (BOX[3] - BOX[2]) / ranks - 1
            figure.cells(centres, colours, size, titles)
            made[""] = document(figure.svg(title))
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
    labels = [[f"{name} = {value}" for value in known] for name, known in zip(names, (down, across), strict=True)]
    wide, tall, left, top = 90, 44, 24 + math.ceil(max(map(text_width, labels[0]))), 60
    box = (left, left + wide * len(across), top, top + tall * len(down))
    with drawing(max(box[1] + 10, 320), box[3] + 10, box) as figure:
        figure.title("final accuracy in percent")
        figure.axes.set(xlim=(-0.5, len(across) - 0.5), ylim=(len(down) - 0.5, -0.5))
        figure.axes.spines[:].set_visible(False)
        figure.axes.tick_params(labeltop=True, labelbottom=False)
        figure.axes.set_xticks(range(len(across)), labels[1])
        figure.axes.set_yticks(range(len(down)), labels[0])
        spots = {key: (across.index(key[1]), down.index(key[0])) for key in sorted(found)}
        shares = [(found[key] - low) / (high - low) if high > low else 0.5 for key in spots]
        figure.cells(list(spots.values()), [(HEAT, 0.08 + 0.6 * share) for share in shares], (wide - 2, tall - 2))
        for key, (x, y) in spots.items():
            figure.text(x, y, points(found[key]), "number", ha="center")
        return {"": document(figure.svg("final accuracy in percent"))}


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
