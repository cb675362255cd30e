"""Terminal output: plain lines in a pipe, a live progress bar and colours on a terminal."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from rich.cells import cell_len

from ssd_edge.errors import EnvironmentUnfitError
from ssd_edge.report import events
from ssd_edge.report import terminal as module
from ssd_edge.report.events import Message, TaskLearned
from ssd_edge.report.terminal import WIDTH, Console, export_svg
from ssd_edge.run.metrics import summary

ESCAPE = "\x1b"


class Terminal(io.StringIO):
    """Text stream that reports itself as a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")


def sample_metrics(tasks: int, name: str = "class") -> dict[str, Any]:
    """Return metrics of a run with baselines and panel."""

    def scores(first: float, keep: float) -> dict[str, Any]:
        matrix = [[first * keep ** (t - i) if i <= t else 0.0 for i in range(tasks)] for t in range(tasks)]
        return {**summary(matrix).to_dict(), "seconds": 83.6, "state_bytes": 4_112_000}

    slda = scores(0.9, 0.99)
    names = [f"{name} {row}" for row in range(2 * tasks)]
    return {
        "learner": "ridge",
        "data": "digits",
        "classes": names,
        "tasks": [{"classes": names[2 * t : 2 * t + 2]} for t in range(tasks)],
        **scores(0.85, 0.97),
        "baselines": {"ssd": scores(0.8, 0.5)},
        "panel": {"slda": slda["average_accuracy"], "joint": 0.931},
        "panel_details": {"slda": slda, "joint": {"accuracy_matrix": None, "seconds": None}},
    }


def printed(metrics: dict[str, Any]) -> list[str]:
    """Return the lines of the tables in a pipe."""
    stream = io.StringIO()
    Console(stream).table(metrics)
    return stream.getvalue().splitlines()


def test_tables_in_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # no effect on a pipe
    lines = printed(sample_metrics(5))
    assert lines[0] == "ridge on digits: 10 classes in 5 tasks"
    rows = [" ".join(line.split()) for line in lines]
    assert "5 class 8, class 9 75.2 77.6 80.0 82.5 85.0" in rows
    assert "ridge this run 80.1 % 82.5 % 6.2 1 min 24 s 4.1 MB" in rows
    assert "joint all data at once 93.1 % – – – –" in rows
    told = " ".join(lines)
    assert "85.0 % with the first 2 classes, 80.1 % with all 10. Later classes made this harder" in told
    assert "Nothing was forgotten" in told
    assert lines[-1] == "SLDA is 8.2 points ahead of ridge on this stream."
    assert ESCAPE not in "".join(lines)


@pytest.mark.parametrize("tasks", [1, 5, 10, 11, 50])
def test_wide_tables_are_abbreviated_to_fit(tasks: int) -> None:
    lines = printed(sample_metrics(tasks, name="犬の名前 a rather long name"))
    assert max(cell_len(line) for line in lines) <= WIDTH
    header = next(line for line in lines if line.startswith("after task"))
    assert ("…" in header) == (tasks > 10)
    assert header.split()[-1] == str(tasks)


def test_an_abbreviated_matrix_keeps_both_ends() -> None:
    lines = printed(sample_metrics(50))
    header = next(line for line in lines if line.startswith("after task")).split()[2:]
    assert header == ["1", "2", "3", "4", "5", "…", "47", "48", "49", "50"]
    first = [line.split()[0] for line in lines[4 : 4 + len(header)]]
    assert first == header


def test_task_line() -> None:
    stream = io.StringIO()
    console = Console(stream)
    console(TaskLearned(2, 10, ("bird", "[red]cat"), 0.8123, (0.9, 0.8, 0.74), 1.2))
    console(TaskLearned(49, 50, ("犬" * 64, "b"), 1.0, (*[0.5] * 49, 1.0), 7512))
    first, second = stream.getvalue().splitlines()
    assert first == "task  3/10  bird, [red]cat                 1.20 s  mean  81.2 % of 90 80 74"
    assert second.endswith("…    2 h 05 min  mean 100.0 % of 50 50 50 50 50 … 50 50 50 100")
    assert cell_len(second) <= WIDTH
    assert cell_len(second[: second.index("mean")]) == first.index("mean")  # columns stay aligned with wide characters


def test_a_long_task_line_is_cut() -> None:
    stream = io.StringIO()
    Console(stream)(TaskLearned(999, 1000, ("犬" * 64,), 1.0, (1.0,) * 1000, 7512))
    assert stream.getvalue().count("\n") == 1


def test_a_message_is_neither_wrapped_nor_interpreted() -> None:
    stream = io.StringIO()
    text = "[bold]saved[/bold] :smile: " + "/long/path" * 30
    Console(stream)(Message(text))
    assert stream.getvalue() == text + "\n"


def test_progress_in_a_pipe_is_sparse(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    stream = io.StringIO()
    with events.progress(Console(stream), "SSD", 5) as update:
        for second in range(26):
            now = float(second)
            update(second // 6, (second % 6) / 6, "loss 0.1" if second < 15 else "")
    assert stream.getvalue() == "SSD: task 2/5, 67 %, loss 0.1\nSSD: task 4/5, 33 %\n"


def test_progress_of_a_single_step_has_no_step_number(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    stream = io.StringIO()
    with events.progress(Console(stream), "embedding") as update:
        now = 11.0
        update(0, 0.5, "300 images")
    assert stream.getvalue() == "embedding: 50 %, 300 images\n"


def test_live_only_progress_is_not_printed_in_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    piped, terminal = io.StringIO(), Terminal()
    for stream in (piped, terminal):
        with events.progress(Console(stream), "reproduce", 5, live_only=True) as update:
            now += 11.0
            update(0, 1.0)
    assert piped.getvalue() == ""
    assert "reproduce" in terminal.getvalue()


def test_progress_on_a_terminal_is_a_live_bar() -> None:
    stream = Terminal()
    console = Console(stream)
    with events.progress(console, "SSD [x]", 2) as update:
        update(1, 0.5, "loss [0.1]")
        console(Message("between"))
    written = stream.getvalue()
    assert ESCAPE + "[2K" in written
    assert "SSD [x]" in written
    assert "75%" in written
    assert "loss [0.1]" in written
    assert "between\n" in written


def test_colours_on_a_terminal_unless_disabled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    coloured, plain = Terminal(), Terminal()
    Console(coloured).table(sample_metrics(2))
    monkeypatch.setenv("NO_COLOR", "1")
    Console(plain).table(sample_metrics(2))
    assert ESCAPE + "[38;5;" in coloured.getvalue()
    assert "[38;" not in plain.getvalue()


def test_svg_of_the_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "tables.svg"
    export_svg(sample_metrics(5, name="<b>&"), path)
    first = path.read_bytes()
    text = "".join(ElementTree.fromstring(first).itertext()).replace("\xa0", " ")
    assert "1  <b>& 0, <b>& 1" in text
    assert "SLDA is 8.2 points ahead of ridge on this stream." in text
    assert b"@font-face" not in first
    assert b"url(http" not in first
    monkeypatch.setenv("NO_COLOR", "1")
    export_svg(sample_metrics(5, name="<b>&"), path)
    assert path.read_bytes() == first  # does not depend on the environment


def test_names_with_control_codes(tmp_path: Path) -> None:
    """rich passes them on."""
    hostile = "a\x1b[2J\x9b1m\u202e\nb"
    stream = io.StringIO()
    console = Console(stream)
    console.print(hostile)
    console(Message(hostile))
    console(TaskLearned(0, 1, (hostile,), 1.0, (1.0,), 1.0))
    with events.progress(console, hostile) as update:
        update(0, 0.5, hostile)
    metrics = sample_metrics(2, hostile) | {"data": hostile}
    console.table(metrics)
    assert all(letter.isprintable() or letter == "\n" for letter in stream.getvalue())
    assert stream.getvalue().startswith("a?[2J?1m? b\na?[2J?1m? b\n")
    export_svg(metrics, tmp_path / "a.svg")
    ElementTree.parse(tmp_path / "a.svg")


def test_a_notebook_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = type("ZMQInteractiveShell", (), {})()
    monkeypatch.setitem(__import__("builtins").__dict__, "get_ipython", lambda: kernel)
    stream = io.StringIO()
    console = Console(stream)
    with events.progress(console, "SSD", 2) as update:
        update(1, 0.5)
        console(Message("saved"))
    console.table(sample_metrics(2))
    assert stream.getvalue().startswith("saved\nridge on digits")
    assert ESCAPE not in stream.getvalue()


def test_without_rich(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "rich", None)
    with pytest.raises(EnvironmentUnfitError, match=r"the package 'rich' is needed .* pip install 'ssd-edge\[train\]'"):
        Console(io.StringIO())
