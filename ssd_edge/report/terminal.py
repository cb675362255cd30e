"""Terminal output of a run: progress, one line per task, and the final tables.

A terminal gets colours (unless NO_COLOR is set) and a live progress bar; pipes and logs get plain lines without control
codes.
"""

from __future__ import annotations

import io
import re
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from ssd_edge.errors import printable, require
from ssd_edge.files import write_text
from ssd_edge.report.compare import ROLES, compared, lead_note, ranked
from ssd_edge.report.events import Event, Message, Progress, TaskLearned
from ssd_edge.report.wording import describe_stream, development, percent, points, step_name
from ssd_edge.system import duration, size

if TYPE_CHECKING:
    from rich.console import Console as RichConsole
    from rich.console import RenderableType
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID
    from rich.table import Table

WIDTH = 100  # columns of a pipe or log
SPARSE_SECONDS = 10.0  # between progress lines if there is no terminal
_COLD, _WARM = (26, 36, 52), (111, 176, 245)  # colours of the accuracy matrix at 0 % and 100 %


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
        event = type(event)(**_clean(vars(event)))
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
        self._rich.print(printable(text), soft_wrap=True)

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
        """Show a progress bar for a new job if there is a terminal."""
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
        """Remove the progress bar of the running job, if any."""
        if self._live is not None:
            self._live[0].stop()
        self._job = self._live = None

    def _task_line(self, event: TaskLearned) -> None:
        """Print one line on a learned task."""
        from rich.cells import set_cell_size

        shown = [f"{100 * accuracy:.0f}" for accuracy in event.accuracies]
        each = " ".join(shown[i] if i is not None else "…" for i in _elided(len(shown), 10))
        number = f"{event.step_name} {event.step + 1:>{len(str(event.steps))}}/{event.steps}"
        names = set_cell_size(_shorten(", ".join(event.classes), 24), 24)
        line = f"{number}  {names}  {duration(event.seconds):>11}  mean {percent(event.mean_accuracy):>7} of {each}"
        self._rich.print(line, no_wrap=True, overflow="ellipsis")

    def table(self, metrics: Mapping[str, Any]) -> None:
        """Print the accuracy matrix, the comparison with other learners, and a note if one of them is better."""
        for part in _summary(metrics, self._rich.width):
            self._rich.print(part)


def export_svg(metrics: Mapping[str, Any], path: Path) -> None:
    """Write the output of `Console.table` as an SVG image.

    Raises:
        EnvironmentUnfitError: If rich is not installed or the file cannot be written.
    """
    recorder = _rich(io.StringIO(), True, record=True)
    for part in _summary(metrics, recorder.width):
        recorder.print(part)
    title = printable(f"{compared(metrics)[0].display} on {metrics['data']}")
    svg = recorder.export_svg(title=title, unique_id="ssd-edge")
    # Remove the font that rich's style sheet would fetch from the network; the fallback is monospace.
    write_text(path, re.sub(r"@font-face\s*\{.*?\}", "", svg, flags=re.DOTALL))


def _rich(stream: TextIO, terminal: bool, record: bool = False) -> RichConsole:
    """Return a rich console without markup, because a class may be called ``[red]`` or ``:smile:``."""
    require("rich", "train", "write to the terminal")
    from rich.console import Console as RichConsole

    options: dict[str, Any] = {} if terminal and not record else {"width": WIDTH}
    if record:  # the image must not depend on the environment
        options |= {"record": True, "color_system": "truecolor", "no_color": False}
    # force_terminal: FORCE_COLOR must not put control codes into a log. force_jupyter: notebooks get plain lines too.
    return RichConsole(
        file=stream,
        force_terminal=terminal,
        force_jupyter=False,
        markup=False,
        emoji=False,
        highlight=False,
        **options,
    )


def _clean(value: Any) -> Any:
    """Return a value with `printable` texts: rich passes control codes on, and names may come from anywhere."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, Mapping):
        return {_clean(key): _clean(item) for key, item in value.items()}
    return type(value)(map(_clean, value)) if isinstance(value, list | tuple) else value


def _summary(metrics: Mapping[str, Any], width: int) -> list[RenderableType]:
    """Return heading, accuracy matrix, comparison and note."""
    from rich.text import Text

    metrics = _clean(metrics)
    heading = f"{compared(metrics)[0].display} on {metrics['data']}: {describe_stream(metrics)}"
    parts: list[RenderableType] = [
        Text(heading, style="bold"),
        "",
        _matrix(metrics, width),
        "",
        _comparison(metrics, width),
    ]
    legend = "accuracy: at the end · on the way: after each step, on average · drop: points lost since the best"
    parts += ["", Text(legend, style="dim")]
    if told := development(metrics):
        parts += ["", told]
    note = lead_note(metrics)
    return [*parts, "", Text(note, style="yellow")] if note else parts


def _matrix(metrics: Mapping[str, Any], width: int) -> Table:
    """Return the accuracy in percent, one row per learned task (or experience) and one column per tested task."""
    from rich.text import Text

    label = 28  # width of the first column; the others have 6 characters and a space
    matrix, tasks = metrics["accuracy_matrix"], metrics["tasks"]
    introduced = metrics.get("introduced", range(len(tasks)))
    step, room = step_name(len(tasks), len(matrix)), max(3, (width - label) // 7)
    columns = _elided(len(tasks), room)
    table = _table(f"after {step}", *("…" if task is None else str(task + 1) for task in columns), padding=0)
    for cell_column in table.columns[1:]:
        cell_column.justify, cell_column.min_width = "center", 6
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
    """Return one row per method, the most accurate first, without columns that do not fit into `width`."""
    rows = ranked(metrics)
    columns: dict[str, list[str]] = {
        "method": [_shorten(method.display, 20) for method in rows],
        "": [ROLES[method.role] for method in rows],
        "accuracy": [percent(method.values["average_accuracy"]) for method in rows],
        "on the way": [percent(method.values.get("average_incremental_accuracy")) for method in rows],
        "drop": [points(method.values.get("forgetting")) for method in rows],
        "time": [duration(method.values.get("seconds")) for method in rows],
        "state": [size(method.values.get("state_bytes")) for method in rows],
    }
    for optional in ("", "on the way", "drop", "time"):
        if sum(max(map(len, (name, *cells))) + 3 for name, cells in columns.items()) <= width:
            break
        del columns[optional]
    table = _table(*columns)
    if "" in columns:
        table.columns[1].justify = "left"
    for method, cells in zip(rows, zip(*columns.values(), strict=True), strict=True):
        table.add_row(*cells, style="bold cyan" if method.role == "learner" else None)
    return table


def _table(first: str, *others: str, padding: int = 1) -> Table:
    """Return an empty table with these columns."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, padding))
    table.add_column(first, no_wrap=True)
    for name in others:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _heat(accuracy: float) -> str:
    """Return the style of a cell; it sets both colours to be readable on any terminal."""
    share = accuracy**2  # squared, because most accuracies are above 50 %
    red, green, blue = (round(low + share * (high - low)) for low, high in zip(_COLD, _WARM, strict=True))
    return f"{'#000000' if share > 0.62 else '#ffffff'} on rgb({red},{green},{blue})"


def _elided(count: int, room: int) -> list[int | None]:
    """Return the indices 0 … count−1; if only `room` entries fit, the first and last ones around None."""
    if count <= room:
        return list(range(count))
    first, last = room // 2, (room - 1) // 2
    return [*range(first), None, *range(count - last, count)]


def _shorten(text: str, cells: int) -> str:
    """Shorten text to a number of terminal cells; wide characters take two."""
    from rich.cells import cell_len, chop_cells

    return text if cell_len(text) <= cells else chop_cells(text, cells - 1)[0].rstrip(", ") + "…"
