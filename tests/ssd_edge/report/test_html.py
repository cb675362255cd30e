"""The HTML report: well-formed, self-contained, complete, and safe with any name."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import Any

import pytest

from ssd_edge.report.html import render, tag
from ssd_edge.run.metrics import summary

CHEAP = {"seconds": 1.5, "state_bytes": 4100}
RUN: dict[str, Any] = {
    "argv": ["ssd-edge", "train", "data.path=my photos"],
    "config": {"data": {"path": "my photos", "classes": []}, "learner": {"name": "ridge"}},
    "versions": {"torch": "2.9.1"},
    "threads": 2,
    "git_sha": None,
    "seed": 7,
    "machine": "Linux x86_64, 2 cores",
    "started": "2026-11-21T05:20:11Z",
    "finished": "2026-11-21T05:23:41Z",
    "backbone": {"identity": "sha256:4ac1", "provenance": {"data": "Tiny-ImageNet-32"}},
}


def scores(tasks: int, first: float, keep: float) -> dict[str, Any]:
    """Return metrics of a matrix with diagonal `first` whose accuracies are scaled by `keep` after each task."""
    matrix = [[first * keep ** (t - i) if i <= t else 0.0 for i in range(tasks)] for t in range(tasks)]
    values = summary(matrix).to_dict()
    values["accuracy_matrix"] = [
        [value if i <= t else None for i, value in enumerate(row)] for t, row in enumerate(values["accuracy_matrix"])
    ]
    return values


def example_metrics(tasks: int, others: bool = True, names: list[str] | None = None) -> dict[str, Any]:
    names = names or [f"class {row}" for row in range(2 * tasks)]
    panel = {"slda": {**scores(tasks, 0.9, 0.99), **CHEAP}, "joint": {"accuracy_matrix": None, "seconds": None}}
    return {
        "learner": "ridge",
        "display": "SSD",
        "data": "digits",
        "classes": names,
        "tasks": [{"classes": names[2 * t : 2 * t + 2], "train": 300, "test": 60} for t in range(tasks)],
        **scores(tasks, 0.85, 0.97),
        "class_accuracy": {name: (row + 1) / len(names) for row, name in enumerate(names)},
        "baselines": {"finetune": {**scores(tasks, 0.9, 0.3), **CHEAP, "display": "fine-tuning"}} if others else {},
        "panel": {"slda": panel["slda"]["average_accuracy"], "joint": 0.931} if others else {},
        "panel_details": panel if others else {},
        "seconds": 84.3,
        "state_bytes": 4_112_000,
        "train_images": 1437,
        "test_images": 360,
        "split": "a seeded 20 % of each class held out",
    }


class Page(HTMLParser):
    """Parser that collects the elements and text of a page and checks that elements are closed in order."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(source)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag != "meta":  # the only void element used
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def count(self, tag: str, wanted: str) -> int:
        """Return the number of elements with this name and class."""
        return sum(name == tag and wanted in (values.get("class") or "").split() for name, values in self.elements)


def test_tag_escapes_attributes_and_leaves_out_none() -> None:
    written = tag("a", "<b></b>", class_='"x"&', stroke_width=1.26, title=None)
    assert written == '<a class="&quot;x&quot;&amp;" stroke-width="1.3"><b></b></a>'


@pytest.mark.parametrize("tasks", [1, 2, 5, 10, 50])
@pytest.mark.parametrize("others", [True, False])
def test_well_formed_and_self_contained(tasks: int, others: bool) -> None:
    source = render(example_metrics(tasks, others), RUN)
    page = Page(source)
    assert "//" not in source
    assert not {tag for tag, _ in page.elements} & {"script", "link", "img", "iframe", "object"}
    assert not {key for _, values in page.elements for key in values} & {"href", "src", "style", "onclick"}
    assert "url(" not in source
    assert not re.search(r"\b(nan|None|inf)\b", source)
    drawings = 2 if tasks > 1 else 0  # a wide and a narrow version
    assert page.count("g", "series") == drawings * (4 if others else 1)
    for method, accuracy in (
        ("SSD", example_metrics(tasks)["average_accuracy"]),
        ("SLDA", None),
        ("fine-tuning", None),
    ):
        wanted = rf"{method}, {tasks} of {tasks} tasks learned: ([\d.]+) %"
        found = [match[1] for text in page.text if (match := re.fullmatch(wanted, text))]
        assert len(found) == (drawings if others or method == "SSD" else 0)
        assert accuracy is None or set(found) <= {f"{100 * accuracy:.1f}"}


def test_the_numbers_are_shown() -> None:
    metrics = example_metrics(5)
    source = render(metrics, RUN)
    for text in ("80.1 %", "82.5 %", "−6.2", "1 min 24 s", "4.1 MB", "93.1 %", "SLDA is 8.2 points ahead of SSD"):
        assert text in source
    for text in ("SSD on digits", "10 classes in 5 tasks", "1,437 training", "fine-tuning", "seed 7", "Tiny-ImageNet"):
        assert text in source
    assert "ssd-edge train &#x27;data.path=my photos&#x27;" in source
    assert "after task 5, on task 1 (class 0, class 1): 75.2 %" in source
    assert "task 2: class 2, class 3; 300 training and 60 test images" in source


@pytest.mark.parametrize(("tasks", "numbered"), [(5, True), (10, True), (20, True), (21, False), (50, False)])
def test_heat_map_has_one_cell_for_each_learned_task(tasks: int, numbered: bool) -> None:
    page = Page(render(example_metrics(tasks), RUN))
    cells = tasks * (tasks + 1) // 2
    assert page.count("g", "number") == (cells if numbered else 0)
    assert sum(bool(re.match(r"after task \d+, on task", text)) for text in page.text) == cells


def test_values_above_the_diagonal_are_not_drawn() -> None:
    metrics = example_metrics(5)
    for t, row in enumerate(metrics["accuracy_matrix"]):
        row[t + 1 :] = [0.123] * (4 - t)
    assert "12.3" not in render(metrics, RUN)


def test_markup_in_names_stays_text() -> None:
    evil = ["<script>alert(1)</script>", "</title><b>", '"quoted" onload="x', "a & b", "&lt;", "]]>", "犬 🐕", "x" * 64]
    metrics = example_metrics(4, names=evil)
    metrics |= {"data": "<i>data</i>", "display": "<u>me</u>", "split": "<s>"}
    metrics["baselines"] = {"<em>": metrics["baselines"]["finetune"] | {"display": "<em>"}}
    run = RUN | {"argv": ["<br>"], "config": {"<hr>": {"<p>": ["<q>"]}}, "machine": "<code>", "versions": {"<kbd>": 1}}
    page = Page(render(metrics, run))
    assert not {tag for tag, _ in page.elements} & {"script", "b", "i", "u", "s", "em", "br", "hr", "q", "code", "kbd"}
    assert not {key for _, values in page.elements for key in values} & {"onload", "quoted"}
    shown = " ".join(page.text)
    for name in [*evil, "<i>data</i>", "<u>me</u>", "<em>", "<br>", "<hr>", "<q>", "<code>", "<kbd>"]:
        assert name in shown


def test_classes_are_sorted_worst_first_and_capped() -> None:
    source = render(example_metrics(50), RUN)
    listed = re.findall(r'<span class="label " title="([^"]*)">', source)
    assert listed == [f"class {row}" for row in range(40)]
    assert "and 60 more, from 41.0 % to 100.0 %" in source
    assert "more, from" not in render(example_metrics(20), RUN)


def test_a_run_without_comparison_states_it() -> None:
    source = render(example_metrics(5, others=False), RUN)
    assert "Neither baselines nor the panel were run" in source
    assert "joint training" not in source
    assert 'class="note"' not in source


def test_only_the_learner_is_highlighted() -> None:
    page = Page(render(example_metrics(5), RUN))
    assert (page.count("tr", "learner"), page.count("span", "learner")) == (1, 3)
    assert page.count("tr", "joint") == 1


def test_zero_accuracy_can_be_drawn() -> None:
    metrics = example_metrics(3, others=False) | scores(3, 0.0, 1.0)
    assert "−10 %" not in render(metrics, RUN)
    assert "-10 %" not in render(metrics, RUN)


def test_a_page_is_small() -> None:
    assert len(render(example_metrics(5), RUN).encode()) < 40_000
    assert len(render(example_metrics(50), RUN).encode()) < 250_000
