"""The terminal side of a run: progress, one line a task, the final tables.

On a terminal: colours (unless NO_COLOR is set) and one live line. Elsewhere, in a pipe or a log: plain lines
without control codes.
"""

from __future__ import annotations

import io
import re
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from ssd_edge.errors import require
from ssd_edge.files import write_text
from ssd_edge.report.compare import ROLES, compared, lead_note, ranked
from ssd_edge.report.events import Event, Message, Progress, TaskLearned
from ssd_edge.report.wording import describe_stream, percent, points, step_name
from ssd_edge.system import duration, size

if TYPE_CHECKING:
    from rich.console import Console as RichConsole
    from rich.console import RenderableType
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID
    from rich.table import Table

WIDTH = 100  # columns of what is no terminal
SPARSE_SECONDS = 10.0  # between the lines that stand for the live one where there is no terminal
_COLD, _WARM = (26, 36, 52), (111, 176, 245)  # of the accuracy matrix: the dark colours of the report


class Console:
    """Listener that prints the events of a run to a stream, standard output by default.

    Raises:
        EnvironmentUnfitError: If rich is not installed.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        stream = stream or sys.stdout
        self._rich = _rich(stream, stream.isatty())
        self._job: str | None = None  # description of the running job
        self._live: tuple[RichProgress, TaskID] | None = None  # its progress bar on a terminal
        self._printed = 0.0  # time of its last progress line elsewhere

    def __call__(self, event: Event) -> None:
        """Print one event."""
        if isinstance(event, Message):
            self.print(event.text)
        elif isinstance(event, TaskLearned):
            self._task_line(event)
        elif isinstance(event, Progress):
            self._progress(event)
        elif event.description == self._job:
            self._end_job()

    def print(self, text: str) -> None:
        """Print one line without wrapping it, so that a path in it can be copied."""
        self._rich.print(text, soft_wrap=True)

    def _progress(self, event: Progress) -> None:
        """Update the live bar; without a terminal, print a line at most every `SPARSE_SECONDS`."""
        if event.description != self._job:
            self._start_job(event)
        if self._live is not None:
            bar, row = self._live
            bar.update(row, completed=event.step + event.share, note=event.note)
        elif not event.live_only and time.monotonic() - self._printed >= SPARSE_SECONDS:
            self._printed = time.monotonic()
            number = f"{event.step_name} {event.step + 1}/{event.steps}, " if event.steps > 1 else ""
            text = f"{event.description}: {number}{100 * event.share:.0f} %"
            self.print(f"{text}, {event.note}" if event.note else text)

    def _start_job(self, event: Progress) -> None:
        self._end_job()
        self._job, self._printed = event.description, time.monotonic()
        if not self._rich.is_interactive:
            return
        from rich import progress

        columns = (
            progress.TextColumn("{task.description}", markup=False),
            progress.BarColumn(),
            progress.TaskProgressColumn(),
            progress.TimeRemainingColumn(),
            progress.TextColumn("{task.fields[note]}", markup=False),
        )
        bar = progress.Progress(*columns, console=self._rich, transient=True)
        bar.start()
        self._live = bar, bar.add_task(event.description, total=event.steps, note="")

    def _end_job(self) -> None:
        if self._live is not None:
            self._live[0].stop()
        self._job = self._live = None

    def _task_line(self, event: TaskLearned) -> None:
        from rich.cells import set_cell_size

        shown = [f"{100 * accuracy:.0f}" for accuracy in event.accuracies]
        each = " ".join(shown[i] if i is not None else "…" for i in _elided(len(shown), 10))
        number = f"{event.step_name} {event.step + 1:>{len(str(event.steps))}}/{event.steps}"
        names = set_cell_size(_shorten(", ".join(event.classes), 24), 24)
        line = f"{number}  {names}  {duration(event.seconds):>11}  mean {percent(event.mean_accuracy):>7} of {each}"
        self._rich.print(line, no_wrap=True, overflow="ellipsis")

    def table(self, metrics: Mapping[str, Any]) -> None:
        """The accuracy matrix, the comparison with baselines and panel, and who is ahead."""
        for part in _summary(metrics, self._rich.width):
            self._rich.print(part)


def export_svg(metrics: Mapping[str, Any], path: Path) -> None:
    """Write what `Console.table` prints as a picture, for a README.

    Raises:
        EnvironmentUnfitError: rich is not installed, or the file cannot be written.
    """
    recorder = _rich(io.StringIO(), True, record=True)
    for part in _summary(metrics, recorder.width):
        recorder.print(part)
    title = f"{compared(metrics)[0].display} on {metrics['data']}"
    svg = recorder.export_svg(title=title, unique_id="ssd-edge")
    # rich's style sheet fetches a font; a picture must not call anyone, and monospace is as good.
    write_text(path, re.sub(r"@font-face\s*\{.*?\}", "", svg, flags=re.DOTALL))


def _rich(stream: TextIO, terminal: bool, record: bool = False) -> RichConsole:
    """A console that takes all text as it is: a class may be called ``[red]`` or ``:smile:``."""
    require("rich", "train", "write to the terminal")
    from rich.console import Console as RichConsole

    options: dict[str, Any] = {} if terminal and not record else {"width": WIDTH}
    if record:  # the picture is the same wherever it is made
        options |= {"record": True, "color_system": "truecolor", "no_color": False}
    # force_terminal: else FORCE_COLOR would put control codes into a log
    return RichConsole(file=stream, force_terminal=terminal, markup=False, emoji=False, highlight=False, **options)


def _summary(metrics: Mapping[str, Any], width: int) -> list[RenderableType]:
    from rich.text import Text

    heading = f"{compared(metrics)[0].display} on {metrics['data']}: {describe_stream(metrics)}"
    parts = [Text(heading, style="bold"), "", _matrix(metrics, width), "", _comparison(metrics, width)]
    note = lead_note(metrics)
    return [*parts, "", Text(note, style="yellow")] if note else parts


def _matrix(metrics: Mapping[str, Any], width: int) -> Table:
    """Accuracy in percent; a row after each task (or experience), a column for each task's images."""
    from rich.text import Text

    label = 28  # characters of the first column, which names the task's classes; the others have 6 and a space
    matrix, tasks = metrics["accuracy_matrix"], metrics["tasks"]
    introduced = metrics.get("introduced", range(len(tasks)))
    step, room = step_name(len(tasks), len(matrix)), max(3, (width - label) // 7)
    columns = _elided(len(tasks), room)
    table = _table(f"after {step}", *("…" if task is None else str(task + 1) for task in columns), padding=0)
    for drawn in table.columns[1:]:
        drawn.justify, drawn.min_width = "center", 6
    rows = _elided(len(matrix), room if step == "task" else 2 * room)
    for row in rows:
        if row is None:
            table.add_row("…")
            continue
        cells = []
        for column in columns:
            accuracy = None if column is None or introduced[column] > row else matrix[row][column]
            gap = "…" if column is None and row >= len(rows) // 2 else ""
            cells.append(Text(gap) if accuracy is None else Text(f"{100 * accuracy:.1f}", style=_heat(accuracy)))
        new = [
            ("" if step == "task" else f"task {task + 1}: ") + ", ".join(map(str, tasks[task]["classes"]))
            for task, first in enumerate(introduced)
            if first == row
        ]
        table.add_row(_shorten("  ".join([str(row + 1), *new]), label), *cells)
    return table


def _comparison(metrics: Mapping[str, Any], width: int) -> Table:
    """Every method, the most accurate first; what does not fit into `width` columns is left to the report."""
    rows = ranked(metrics)
    columns: dict[str, list[str]] = {
        "method": [_shorten(method.display, 20) for method in rows],
        "": [ROLES[method.role] for method in rows],
        "average": [percent(method.values["average_accuracy"]) for method in rows],
        "incremental": [percent(method.values.get("average_incremental_accuracy")) for method in rows],
        "BWT": [points(method.values.get("backward_transfer"), signed=True) for method in rows],
        "forgetting": [points(method.values.get("forgetting")) for method in rows],
        "time": [duration(method.values.get("seconds")) for method in rows],
        "state": [size(method.values.get("state_bytes")) for method in rows],
    }
    for spare in ("", "incremental", "forgetting", "time"):
        if sum(max(map(len, (name, *cells))) + 3 for name, cells in columns.items()) <= width:
            break
        del columns[spare]
    table = _table(*columns)
    if "" in columns:
        table.columns[1].justify = "left"
    for method, cells in zip(rows, zip(*columns.values(), strict=True), strict=True):
        table.add_row(*cells, style="bold cyan" if method.role == "learner" else None)
    return table


def _table(first: str, *others: str, padding: int = 1) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, padding))
    table.add_column(first, no_wrap=True)
    for name in others:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _heat(accuracy: float) -> str:
    """Background and ink of a cell, both given, so that it is readable on any terminal."""
    share = accuracy**2  # as in the report: most accuracies lie in the upper half
    red, green, blue = (round(low + share * (high - low)) for low, high in zip(_COLD, _WARM, strict=True))
    return f"{'#000000' if share > 0.62 else '#ffffff'} on rgb({red},{green},{blue})"


def _elided(count: int, room: int) -> list[int | None]:
    """Indices 0 … count−1, or, where only `room` entries fit, the first and last of them around None."""
    if count <= room:
        return list(range(count))
    first, last = room // 2, (room - 1) // 2
    return [*range(first), None, *range(count - last, count)]


def _shorten(text: str, cells: int) -> str:
    """Cut to so many columns of a terminal, where some letters take two."""
    from rich.cells import cell_len, chop_cells

    return text if cell_len(text) <= cells else chop_cells(text, cells - 1)[0].rstrip(", ") + "…"
