"""Figures of the results page: one SVG file each, drawn from stored results."""

from __future__ import annotations

import colorsys
import dataclasses
import math
import statistics
from collections.abc import Callable, Sequence
from typing import Literal

from ssd_edge.report.figures import HEAT, INK, STYLES, LineStyle, document, drawing, text_width
from ssd_edge.report.wording import points
from ssd_edge.reproduction.cells import TracePoint
from ssd_edge.reproduction.rows import Row, mean
from ssd_edge.reproduction.specs import Experiment

BOX = (60, 590, 34, 250)  # left, right, top and bottom of the axes
HEIGHT = 300
RANKS = 10  # neurons drawn at each point


@dataclasses.dataclass(frozen=True)
class Series:
    """One line of a plot; its style defaults to that of its position."""

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
        title: Heading, which names the vertical axis.
        series: At least one line with at least one point in total.
        across: Label of the horizontal axis.
        edges: Ends of tasks, drawn as vertical lines.
        limits: Limits of the vertical axis; by default those of the points.
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
        inner = [edge for edge in edges if left < edge < right]
        figure.axes.vlines(inner, low, high, colors=INK, alpha=0.4, lw=1, gid=figure.group("edge"))
        for line, style in zip(series, styles, strict=True):
            figure.line(line.points, style, marked=range(0, len(line.points), math.ceil(len(line.points) / 12)))
        figure.legend([line.name for line in series], styles)
        return document(figure.svg(title))


def _position(trace: Sequence[TracePoint], point: TracePoint) -> float:
    """Return the number of epochs since the start of the first task."""
    return point["task"] * max(other["epoch"] for other in trace) + point["epoch"]


def _edges(trace: Sequence[TracePoint]) -> list[float]:
    """Return the end of every task but the last."""
    epochs, tasks = max(point["epoch"] for point in trace), max(point["task"] for point in trace)
    return [float(epochs * (task + 1)) for task in range(tasks)]


def _traces(rows: Sequence[Row]) -> list[tuple[str, list[TracePoint]]]:
    """Return the name and the first stored trace of each row that has one."""
    traces = []
    for row in rows:
        stored = [result["trace"] for _, result in sorted(row.results.items()) if result.get("trace")]
        traces += [(row.system.name, trace) for trace in stored[:1]]
    return traces


SIMILARITIES: dict[Literal["subnetwork_cosine", "jaccard", "teacher_divergence"], str] = {
    "subnetwork_cosine": "cosine of the Top-n keys, teacher and student",
    "jaccard": "Jaccard of the k most frequent neurons, one point and the next",
    "teacher_divergence": "KL(teacher ‖ student) on the task's data",
}


def similarity(rows: Sequence[Row]) -> dict[str, str]:
    """Draw figure 5: cosine, Jaccard index and divergence by epoch."""
    drawn, traces = {}, _traces(rows)
    for name, title in SIMILARITIES.items():
        series = []
        for system, trace in traces:
            followed = [(_position(trace, point), value) for point in trace if (value := point[name]) is not None]
            series += [Series(system, followed)] if followed else []
        if series:
            drawn[name.split("_")[-1]] = lines(title, series, "epoch", _edges(traces[0][1]))
    return drawn


def training(rows: Sequence[Row]) -> dict[str, str]:
    """Draw figure 6: accuracy on the data being learned; the axis counts tasks, so schedules may differ in length."""
    series = []
    for system, trace in _traces(rows):
        epochs = max(point["epoch"] for point in trace)
        curve = [(point["task"] + point["epoch"] / epochs, point["train_accuracy"]) for point in trace]
        series.append(Series(system, curve))
    return {"": lines("accuracy on the task's training data", series, "task")} if series else {}


def tasks(rows: Sequence[Row]) -> dict[str, str]:
    """Draw figure 7: test accuracy of each task and of all tasks; classes not learned yet count as 0."""
    drawn = {}
    for _, trace in _traces(rows)[:1]:
        overall = [(_position(trace, point), statistics.fmean(point["test_accuracy"])) for point in trace]
        series = [Series("all tasks", overall)]
        for task in range(len(trace[0]["test_accuracy"])):
            curve = [
                (_position(trace, point), point["test_accuracy"][task]) for point in trace if point["task"] >= task
            ]
            series.append(Series(f"task {task}", curve))
        drawn[""] = lines("test accuracy, argmax over all outputs", series, "epoch", _edges(trace), (0.0, 1.0))
    return drawn


def neurons(rows: Sequence[Row]) -> dict[str, str]:
    """Draw figure 2: the most frequent neurons by epoch."""
    title = "most frequent neurons; each colour is a neuron"
    drawn = {}
    for _, trace in _traces(rows)[:1]:
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
            across = f"epochs, {max(point['task'] for point in trace) + 1} tasks one after the other"
            figure.axes.set(xlim=(0, len(trace)), ylim=(ranks + 0.5, 0.5), xticks=[])
            figure.across(across)
            figure.axes.set_yticks([1, ranks], ["rank 1", str(ranks)])
            size = (BOX[1] - BOX[0]) / len(trace) + 0.3, (BOX[3] - BOX[2]) / ranks - 1
            figure.cells(centres, colours, size, titles)
            drawn[""] = document(figure.svg(title))
    return drawn


def values(rows: Sequence[Row]) -> dict[str, str]:
    """Draw figure 3: accuracy by the number in the names of the systems, ours and the paper's."""
    own, reported = [], []
    for row in rows:
        x = float(row.system.name.split("=")[1])
        accuracy, published = mean(row.values("accuracy")), row.system.reported.get(row.stream)
        own += [] if accuracy is None else [(x, accuracy)]
        reported += [] if published is None else [(x, published)]
    series = [line for line in (Series("ours", own), Series("paper", reported)) if line.points]
    return {"": lines("final accuracy", series, rows[0].system.name.split("=")[0].strip())} if own else {}


def surface(rows: Sequence[Row]) -> dict[str, str]:
    """Draw figure 4: accuracy by the two numbers in the names of the systems, as a heat map."""
    accuracies: dict[tuple[str, str], float] = {}
    for row in rows:
        first, second = (part.split("=")[1].strip() for part in row.system.name.split(","))
        accuracy = mean(row.values("accuracy"))
        if accuracy is not None:
            accuracies[first, second] = accuracy
    if not accuracies:
        return {}
    down, across = (sorted({key[axis] for key in accuracies}, key=float) for axis in (0, 1))
    low, high = min(accuracies.values()), max(accuracies.values())
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
        spots = {key: (across.index(key[1]), down.index(key[0])) for key in sorted(accuracies)}
        shares = [(accuracies[key] - low) / (high - low) if high > low else 0.5 for key in spots]
        figure.cells(list(spots.values()), [(HEAT, 0.08 + 0.6 * share) for share in shares], (wide - 2, tall - 2))
        for key, (x, y) in spots.items():
            figure.text(x, y, points(accuracies[key]), "number", ha="center")
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
    """Draw the figures of an experiment from its stored results: file name → SVG."""
    if not experiment.figure:
        return {}
    drawn = DRAWN[experiment.figure](rows)
    return {"-".join(filter(None, (experiment.id.lower(), stream, part))) + ".svg": svg for part, svg in drawn.items()}
