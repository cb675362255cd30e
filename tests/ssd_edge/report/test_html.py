"""The HTML report: well-formed, self-contained, complete, small, and safe with any name."""

from __future__ import annotations

import dataclasses
import json
import re
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest

from ssd_edge.errors import InputError
from ssd_edge.images import Pixels
from ssd_edge.report.html import render
from ssd_edge.report.results import Answers, LearningPoint, Results
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


class Camera:
    """Test images in plain colours, of which some may be gone."""

    def __init__(self, gone: bool = False) -> None:
        self.gone = gone

    def load(self, indices: Any, form: Pixels) -> np.ndarray:
        if self.gone:
            raise InputError("gear/3.jpg does not exist")
        noise = np.random.default_rng(0).integers(0, 255, (form.size, form.size, 3), dtype=np.uint8)
        return np.stack([noise] * len(indices))  # takes several times as many bytes as a photograph


def example(metrics: dict[str, Any] | None = None, names: list[str] | None = None, each: int = 4) -> Results:
    """Return results in which one image of each class is called the next class, the surest in the first class."""
    names = names or (metrics["classes"] if metrics else ["gear", "nut", "bolt"])
    truth = np.repeat(np.arange(len(names)), each)
    given = truth.copy()
    given[::each] = (given[::each] + 1) % len(names)
    sure = np.linspace(0.95, 0.55, len(truth))
    answers = Answers(
        tuple(f"{names[row]}/{i}.jpg" for i, row in enumerate(truth)), truth, given, sure, sure - 0.6, sure - 0.8
    )
    right = tuple(np.bincount(truth[answers.right], minlength=len(names)).tolist())
    return Results(
        model="SSD",
        data="digits",
        which="a seeded 20 % of each class held out",
        classes=tuple(names),
        learned=tuple(range(10, 10 + len(names))),
        answers=answers,
        photographs=Camera(),
        fewer=(LearningPoint(5, 0.5, tuple(0 for _ in names)), LearningPoint(10 + len(names), answers.accuracy, right)),
        next=(("Put it on a device:", "ssd-edge deploy --target jetson runs/1 -o robot.ssdedge"),),
        metrics=metrics,
        record=RUN if metrics else {"bundle": "robot"},
    )


def report(metrics: dict[str, Any], **changes: Any) -> str:
    return render(dataclasses.replace(example(metrics), **changes))


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

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "input", "br"):  # void elements
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def count(self, tag: str, wanted: str) -> int:
        """Return the number of elements with this name and class."""
        return sum(name == tag and wanted in (values.get("class") or "").split() for name, values in self.elements)


@pytest.mark.parametrize("tasks", [1, 2, 5, 10, 50])
@pytest.mark.parametrize("others", [True, False])
def test_well_formed_and_self_contained(tasks: int, others: bool) -> None:
    source = report(example_metrics(tasks, others))
    page = Page(source)
    assert not re.search(r"(?i)https?:(?!//www.w3.org/2000/svg)|url\(|@import|src=", source)
    assert not {tag for tag, _ in page.elements} & {"link", "img", "iframe", "object"}
    assert not {key for _, values in page.elements for key in values} & {"src", "style", "onclick"}
    addresses = {values["href"].partition(",")[0][:5] for _, values in page.elements if values.get("href")}
    assert {address[0] for address in addresses - {"data:"}} == {"#"}
    places = {values["href"][1:] for _, values in page.elements if (values.get("href") or "").startswith("#")}
    assert places <= {values.get("id") for _, values in page.elements}
    assert not re.search(r"\b(nan|None|inf|undefined)\b", " ".join(page.text))
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
    source = report(metrics)
    for text in ("80.1 %", "82.5 %", "−6.2", "1 min 24 s", "4.1 MB", "93.1 %", "SLDA is 8.2 points ahead of SSD"):
        assert text in source
    for text in ("SSD on digits", "10 classes in 5 tasks", "145 training", "fine-tuning", "seed 7", "Tiny-ImageNet"):
        assert text in source
    assert "75.0 % of the test images are named correctly" in source
    assert "30 of 40 test images" in source
    assert "ssd-edge train &#39;data.path=my photos&#39;" in source
    assert "after task 5, on task 1 (class 0, class 1): 75.2 %" in source
    assert "task 2: class 2, class 3; 300 training and 60 test images" in source


def test_a_device_has_neither_stream_nor_comparison() -> None:
    source = render(example())
    page = Page(source)
    assert "75.0 % of the test images are named correctly" in source
    assert not {values.get("id") for _, values in page.elements} & {"tasks", "others"}
    assert "Backward transfer" not in source
    assert "robot" in page.text


@pytest.mark.parametrize(("tasks", "numbered"), [(5, True), (10, True), (20, True), (21, False), (50, False)])
def test_heat_map_has_one_cell_for_each_learned_task(tasks: int, numbered: bool) -> None:
    page = Page(report(example_metrics(tasks)))
    cells = tasks * (tasks + 1) // 2
    assert page.count("g", "number") == (cells if numbered else 0)
    assert sum(bool(re.match(r"after task \d+, on task", text)) for text in page.text) == cells


def test_values_above_the_diagonal_are_not_drawn() -> None:
    metrics = example_metrics(5)
    for t, row in enumerate(metrics["accuracy_matrix"]):
        row[t + 1 :] = [0.123] * (4 - t)
    assert "12.3" not in report(metrics)


def test_markup_in_names_stays_text() -> None:
    evil = ["<script>alert(1)</script>", "</title><b>", '"quoted" onload="x', "a & b", "&lt;", "]]>", "犬 🐕", "x" * 64]
    metrics = example_metrics(4, names=evil)
    metrics |= {"display": "<u>me</u>"}
    metrics["baselines"] = {"<em>": metrics["baselines"]["finetune"] | {"display": "<em>"}}
    run = RUN | {"argv": ["<br>"], "config": {"<hr>": {"<p>": ["<q>"]}}, "machine": "<code>", "versions": {"<kbd>": 1}}
    page = Page(report(metrics, record=run, model="<u>me</u>", data="<i>data</i>", which="<s>"))
    assert not {tag for tag, _ in page.elements} & {"u", "s", "em", "hr", "q", "kbd"}
    assert sum(tag == "script" for tag, _ in page.elements) == 2
    assert not {key for _, values in page.elements for key in values} & {"onload", "quoted"}
    shown = " ".join(page.text)
    for name in [*evil, "<i>data</i>", "<u>me</u>", "<em>", "<br>", "<hr>", "<q>", "<code>", "<kbd>"]:
        assert name in shown


def test_every_class_is_in_the_matrix_and_in_the_list() -> None:
    page = Page(render(example(names=[f"kind {row}" for row in range(200)])))
    cells = [values["data-at"] for _, values in page.elements if "data-at" in values]
    assert len(cells) == 400  # the diagonal, and one mistake in each row
    assert {cell.partition(",")[0] for cell in cells} == set(map(str, range(200)))
    places = [(values["x"], values["y"]) for _, values in page.elements if values.get("class") == "right"]
    assert sorted(int(x) for x, _ in places) == list(range(200))
    assert all(x == y for x, y in places)
    assert page.count("details", "class") == 200


def test_the_script_finds_what_it_looks_up() -> None:
    source = render(example())
    found = json.loads(re.search(r'id="data">(.*?)</script>', source, re.DOTALL)[1])
    assert found["classes"] == ["gear", "nut", "bolt"]
    assert found["cells"] == {"0,1": [1, [0]], "1,2": [1, [4]], "2,0": [1, [8]]}
    assert sorted(found["orders"]["alike"]) == [0, 1, 2]
    page = Page(source)
    identifiers = {values.get("id") for _, values in page.elements}
    asked = set(re.findall(r'\bat\("(\w+)"\)', source))
    assert asked
    assert asked <= identifiers


def test_mistakes_are_shown_the_surest_first() -> None:
    source = render(example())
    part = source[source.index('id="mistakes"') : source.index('id="mixed"')]
    assert re.findall(r'href="#p(\d+)"', part) == ["0", "4", "8"]
    assert '<b>gear</b><br>called <i>nut</i><br><span class="soft">95 % sure' in part


def test_without_images_the_report_says_so() -> None:
    for changes, reason in (
        ({"photographs": None, "missing": "the folder is gone"}, "the folder is gone"),
        ({"photographs": Camera(gone=True)}, "gear/3.jpg does not exist"),
    ):
        source = render(dataclasses.replace(example(), **changes))
        page = Page(source)
        assert "Without photographs: " in source
        assert reason in source
        assert not [values for tag, values in page.elements if tag in ("image", "use")]
        assert "75.0 % of the test images" in source


def test_a_page_without_mistakes() -> None:
    whole = example()
    answers = dataclasses.replace(whole.answers, given=whole.answers.truth)
    source = render(dataclasses.replace(whole, answers=answers))
    assert "100.0 % of the test images" in source
    assert "every test image is named correctly" in source
    assert 'id="mistakes"' not in source


def test_files_that_were_not_used_are_accounted_for() -> None:
    skipped = ["a is empty", "b is a film"]
    accounts = {"warnings": ["2 files left out: <a>"], "ignored": "3 hidden files", "skipped": skipped}
    page = Page(report(example_metrics(2), record=RUN | {"accounts": accounts}))
    for text in ("2 files left out: <a>", "not looked at: 3 hidden files", "All 2 left out", "b is a film"):
        assert text in page.text
    assert "Files" not in Page(report(example_metrics(2))).text


def test_a_run_without_comparison_states_it() -> None:
    source = report(example_metrics(5, others=False))
    assert "Not compared yet" in source
    assert "joint training" not in source
    assert 'class="note"' not in source


def test_only_the_learner_is_highlighted() -> None:
    page = Page(report(example_metrics(5)))
    assert (page.count("tr", "learner"), page.count("span", "learner")) == (1, 3)
    assert page.count("tr", "joint") == 1


def test_zero_accuracy_can_be_drawn() -> None:
    metrics = example_metrics(3, others=False) | scores(3, 0.0, 1.0)
    assert "−10 %" not in report(metrics)
    assert "-10 %" not in report(metrics)


def test_a_page_is_small_however_many_classes_and_mistakes() -> None:
    assert len(report(example_metrics(5)).encode()) < 500_000
    many = example(names=[f"kind {row}" for row in range(2000)], each=2)
    source = render(many)
    assert source.count("<image ") > 100
    assert len(source.encode()) < 5_000_000
