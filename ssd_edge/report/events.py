"""Events of a run. Code below the command line emits them to a listener and prints nothing itself."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Protocol, TypeAlias


@dataclasses.dataclass(frozen=True)
class Message:
    """A line of text for the user."""

    text: str


@dataclasses.dataclass(frozen=True)
class Progress:
    """Progress of a running job. The first event of a job is emitted when it starts.

    Attributes:
        description: Name of the job.
        step: Index of the current step, from 0.
        steps: Number of steps.
        share: Completed share of the current step, 0..1.
        note: Extra detail, e.g. the loss.
        step_name: Noun for a step, e.g. ``task``.
        live_only: True if the event is only worth showing in a live progress bar.
    """

    description: str
    step: int = 0
    steps: int = 1
    share: float = 0.0
    note: str = ""
    step_name: str = "task"
    live_only: bool = False


@dataclasses.dataclass(frozen=True)
class ProgressEnded:
    """End of the job with this description, whether it succeeded or raised."""

    description: str


@dataclasses.dataclass(frozen=True)
class TaskLearned:
    """Result of one learned task (or experience) of the main learner.

    Attributes:
        step: Index of the task, from 0.
        steps: Number of tasks.
        classes: Names of the classes in the task.
        mean_accuracy: Mean accuracy over the tasks seen so far.
        accuracies: Accuracy on each task seen so far, in order.
        seconds: Training time of the task.
        step_name: Noun for a step, ``task`` or ``experience``.
    """

    step: int
    steps: int
    classes: tuple[str, ...]
    mean_accuracy: float
    accuracies: tuple[float, ...]
    seconds: float
    step_name: str = "task"


Event: TypeAlias = "Message | Progress | ProgressEnded | TaskLearned"
Listener: TypeAlias = Callable[[Event], None]


def ignore(event: Event) -> None:
    """Discard an event."""


class Update(Protocol):
    """Callable that reports the progress of one job."""

    def __call__(self, step: int, share: float, note: str = "") -> None:
        """Report the current step, its completed share and an optional note."""


@contextlib.contextmanager
def progress(
    listener: Listener, description: str, steps: int = 1, step_name: str = "task", live_only: bool = False
) -> Iterator[Update]:
    """Emit the progress events of one job.

    Args:
        listener: Receives the events.
        description: Name of the job.
        steps: Number of steps.
        step_name: Noun for a step.
        live_only: True if updates are only worth showing in a live progress bar.

    Yields:
        A function that reports the current step, from 0, its completed share and an optional note.
    """

    def update(step: int, share: float, note: str = "") -> None:
        listener(Progress(description, step, steps, share, note, step_name, live_only))

    update(0, 0.0)
    try:
        yield update
    finally:
        listener(ProgressEnded(description))
