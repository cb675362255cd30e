"""Figures of the results page: positions of their marks, read back from the SVG."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree

import pytest

from ssd_edge.reproduction import drawings
from ssd_edge.reproduction.drawings import BOX, Series, lines
from ssd_edge.reproduction.rows import Row
from ssd_edge.reproduction.specs import System

SVG = "{http://www.w3.org/2000/svg}"
LEFT, RIGHT, TOP, BOTTOM = BOX


def row(name: str, accuracy: float, trace: list[dict] | None = None, reported: float | None = None) -> Row:
    result = {"accuracy": accuracy, "metrics": {}, "trace": trace or []}
    return Row(System(name, {"name": "ssd"}, reported={"cifar10": reported}), "cifar10", "full", {0: result}, {})


def point(task: int, epoch: int, top: list[int]) -> dict:
    return {"task": task, "epoch": epoch, "train_accuracy": 0.1 * epoch, "test_accuracy": [0.8, 0.4], "top": top}


def groups(svg: str, kind: str) -> list[ElementTree.Element]:
    return [group for group in ElementTree.fromstring(svg).iter(f"{SVG}g") if group.get("class") == kind]


def paths(svg: str, kind: str = "series") -> list[list[tuple[float, float]]]:
    """Return the points of each line."""
    drawn = [path.get("d") for group in groups(svg, kind) for path in group.findall(f"{SVG}path")]
    return [[(float(x), float(y)) for x, y in re.findall(r"(-?[\d.]+) (-?[\d.]+)", way)] for way in drawn]


def cells(svg: str) -> list[ElementTree.Element]:
    """Return every cell of a grid, drawn either as its own path or as a reference to a shared one."""
    (group,) = groups(svg, "cells")
    return list(group.iter(f"{SVG}use")) or group.findall(f"{SVG}path")


def texts(svg: str) -> list[str | None]:
    return [text.text for text in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def test_lines_span_the_plot() -> None:
    svg = lines("title & more", [Series("a <b>", [(0, 1.0), (10, 3.0)]), Series("c", [(5, 2.0)])], "epoch", edges=[5])
    first, second = paths(svg)
    assert first == [(LEFT, BOTTOM), (RIGHT, TOP)]
    assert second == [((LEFT + RIGHT) / 2, (TOP + BOTTOM) / 2)]
    assert {"title & more", "a <b>", "c", "epoch", "10", "3.0"} <= set(texts(svg))
    ((edge, _),) = paths(svg, "edge")
    assert edge[0] == (LEFT + RIGHT) / 2


def test_lines_of_one_value_do_not_divide_by_zero() -> None:
    assert paths(lines("t", [Series("a", [(1, 0.5), (2, 0.5)])], "x"))[0] == [(LEFT, BOTTOM), (RIGHT, BOTTOM)]


@pytest.mark.parametrize(
    ("low", "high", "wanted"),
    [
        (0, 1, ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]),
        (0.1, 0.16, ["0.10", "0.11", "0.12", "0.13", "0.14", "0.15", "0.16"]),
        (3, 3, ["3.0", "3.2", "3.4", "3.6", "3.8", "4.0"]),
    ],
)
def test_ticks_are_round_and_inside(low: float, high: float, wanted: list[str]) -> None:
    svg = ElementTree.fromstring(lines("t", [Series("a", [(0, low), (1, high)])], "x"))
    labels = [text for text in svg.iter(f"{SVG}text") if text.get("text-anchor") == "end"]
    assert [text.text for text in labels] == wanted


def test_each_task_has_a_line_from_where_it_is_learned() -> None:
    trace = [point(task, epoch, [1, 2]) for task in (0, 1) for epoch in (1, 2)]
    drawn = paths(drawings.tasks([row("SSD", 0.6, trace)])[""])
    assert [len(way) for way in drawn] == [4, 4, 2]  # all tasks, task 0, task 1
    assert drawn[0][0][1] == pytest.approx(
        BOTTOM - 0.6 * (BOTTOM - TOP), abs=0.1
    )  # the mean of 0.8 and 0.4 on an axis from 0 to 1


def test_runs_of_different_length_share_the_task_axis() -> None:
    long = [point(task, epoch, [1]) for task in (0, 1) for epoch in (1, 2, 3, 4)]
    short = [point(task, epoch, [1]) for task in (0, 1) for epoch in (1, 2)]
    first, second = paths(drawings.training([row("long", 0.6, long), row("short", 0.6, short)])[""])
    assert first[-1][0] == second[-1][0] == RIGHT


def test_a_neuron_keeps_its_colour() -> None:
    trace = [point(0, 1, [7, 8]), point(0, 2, [8, 7])]
    drawn = cells(drawings.neurons([row("SSD", 0.6, trace)])[""])
    colours: dict[str, set[str | None]] = {}
    for cell in drawn:
        colours.setdefault(str(cell[0].text).split()[-1], set()).add(cell.get("fill"))
    assert {name: len(labels) for name, labels in colours.items()} == {"7": 1, "8": 1}
    assert colours["7"] != colours["8"]


def test_values_are_placed_at_the_number_in_the_name() -> None:
    svg = drawings.values([row("n = 10", 0.5), row("n = 30", 0.7, reported=0.8)])[""]
    own, paper = paths(svg)
    assert own[0][0] == LEFT
    assert own[1][0] == RIGHT == paper[0][0]
    assert paper[0][1] == TOP
    assert drawings.values([Row(System("n = 1", {"name": "slda"}), "cifar10", "full", {}, {})]) == {}


def test_a_surface_has_one_shade_per_pair() -> None:
    rows = [row(f"α = {a}, T = {t}", a * t / 10) for a in (0.3, 0.5) for t in (1, 10)]
    svg = drawings.surface(rows)[""]
    assert {"α = 0.3", "α = 0.5", "T = 1", "T = 10", "3.0", "50.0"} <= set(texts(svg))
    shades = [float(cell.get("fill-opacity", "nan")) for cell in cells(svg)]
    assert len(shades) == 4
    assert max(shades) == pytest.approx(0.68)
    assert min(shades) == pytest.approx(0.08)
