"""Contents of the report of a run: its answers to test images, kept in its folder for the next report."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ssd_edge import files, learners
from ssd_edge.classes import ClassRegistry
from ssd_edge.errors import BundleRefusedError
from ssd_edge.learners import Learner, Task
from ssd_edge.learners.retention import TrackRecord, scores_of
from ssd_edge.learners.unknown import Rejector
from ssd_edge.report.results import Answers, LearningPoint, Photographs, Results

FILE = "answers.safetensors"
CAPS = (1, 2, 3, 6, 12, 25, 50, 100, 200, 400)  # images per class to learn again from, about twice as many each time
POINTS = 4  # of them, the largest
LONGEST = 5.0  # seconds a task; a learner that takes longer is not learned again


def answer(
    learner: Learner, rejector: Rejector, record: TrackRecord, embeddings: Tensor, rows: Tensor, names: Sequence[str]
) -> Answers:
    """Return the answers of a model to labelled images.

    Args:
        learner: The learner.
        rejector: Its thresholds for ``unknown``.
        record: Its held-out results, from which probabilities are calibrated.
        embeddings: Standardised embeddings ``(M, D)``.
        rows: Rows of their classes, int64 ``(M,)``.
        names: Names of the images.
    """
    scores = scores_of(learner, embeddings, torch.arange(len(rejector.thresholds)))
    sure = record.confidence(scores)

    def margins(answered: np.ndarray) -> np.ndarray:
        found: np.ndarray = rejector.accepts(embeddings, torch.from_numpy(answered))[1].numpy()
        return found

    return Answers.of(names, rows.numpy(), scores.numpy(), None if sure is None else sure.numpy(), margins)


def places(rows: Tensor, seed: int) -> Tensor:
    """Return how many images of its class come before each image in a seeded order, int64 ``(N,)``.

    Args:
        rows: Rows of the images, int64 ``(N,)``.
        seed: Seed of the order.
    """
    shuffled = torch.from_numpy(np.random.default_rng([seed, 0]).permutation(len(rows)))
    place = torch.zeros(len(rows), dtype=torch.int64)
    for row in range(int(rows.max()) + 1):
        members = shuffled[rows[shuffled] == row]
        place[members] = torch.arange(len(members))
    return place


def from_fewer(
    build: Callable[[], Learner], train: Task, place: Tensor, test: Tensor, test_rows: Tensor
) -> list[LearningPoint]:
    """Learn again from fewer images, all classes at once, and return the accuracies on the test images.

    Args:
        build: Returns a new learner.
        train: Training data; at least the first images of each class by `place`, up to the largest of `CAPS`.
        place: `places` of its images; more images contain fewer ones.
        test: Test embeddings ``(M, D)``.
        test_rows: Their rows, int64 ``(M,)``.
    """
    found = []
    for cap in [cap for cap in CAPS if cap <= int(place.max())][-POINTS:]:
        learner, kept = build(), place < cap
        learner.learn(train.of(kept))
        right = torch.bincount(test_rows[learner.predict(test) == test_rows], minlength=len(learner.seen))
        found.append(_point(cap, right.numpy(), len(test)))
    return found


def restore(folder: Path) -> tuple[Learner, Rejector, TrackRecord]:
    """Load the model of a run whose learner has finished.

    Raises:
        InputError: A file is missing.
        BundleRefusedError: A file is damaged.
    """
    rejector, record = (files.read_tensors(folder / f"{name}.safetensors")[0] for name in ("unknown", "record"))
    learner = learners.restore(*files.read_tensors(folder / "learner.safetensors"))
    return learner, Rejector.from_state(rejector), TrackRecord.from_state(record)


def write(folder: Path, answers: Answers, fewer: Sequence[LearningPoint]) -> None:
    """Keep the answers of a run to its own test images."""
    again = {
        "images": np.array([point.images for point in fewer], dtype=np.int64),
        "right": np.array([point.right for point in fewer], dtype=np.int64),  # of shape (0,) without points
    }
    files.write_tensors(folder / FILE, {**answers.arrays(), **again}, {"names": list(answers.names)})


def _point(images: int, right: np.ndarray, tested: int) -> LearningPoint:
    return LearningPoint(images, float(right.sum()) / tested, tuple(right.tolist()))


def of_run(
    folder: Path,
    metrics: Mapping[str, Any],
    record: Mapping[str, Any],
    photographs: Photographs | None,
    missing: str = "",
) -> Results:
    """Return the results of a run as it has kept them.

    Args:
        folder: Folder of the run.
        metrics: Content of metrics.json.
        record: Content of run.json.
        photographs: Its test images; None if they are gone.
        missing: Why they are.

    Raises:
        InputError: The run has no answers.
        BundleRefusedError: A file is damaged.
    """
    arrays, metadata = files.read_tensors(folder / FILE)
    registry = ClassRegistry.from_json(files.read_json(folder / "classes.json"))
    learned = tuple(entry.images for entry in registry.entries)
    try:
        images, right = arrays.pop("images"), arrays.pop("right")
        answers = Answers(names=tuple(metadata["names"]), **arrays)
        own = np.bincount(answers.truth[answers.right], minlength=len(learned))
        again = [*zip(images.tolist(), right, strict=True), (max(learned), own)] if len(images) else []
        fewer = [_point(count, part, len(answers.truth)) for count, part in again]
    except (KeyError, TypeError, ValueError) as error:
        raise BundleRefusedError(f"{folder / FILE} is damaged ({error!r}); delete it and evaluate the run") from error
    return results_of(folder, metrics, record, answers, photographs, missing, tuple(fewer))


def files_of(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the content of metrics.json and run.json of a finished run."""
    return files.read_json(folder / "metrics.json"), files.read_json(folder / "run.json")


def again(folder: Path, answers: Answers, photographs: Photographs) -> Results:
    """Return the results of a run whose own test images were answered again, with what it has kept of fewer images."""
    metrics, record = files_of(folder)
    fewer = of_run(folder, metrics, record, None).fewer if files.exists(folder / FILE) else ()
    return results_of(folder, metrics, record, answers, photographs, fewer=fewer)


def results_of(
    folder: Path,
    metrics: Mapping[str, Any],
    record: Mapping[str, Any],
    answers: Answers,
    photographs: Photographs | None,
    missing: str = "",
    fewer: tuple[LearningPoint, ...] = (),
) -> Results:
    """Return the results of a run with these answers to its own test images; other arguments as for `of_run`."""
    entries = ClassRegistry.from_json(files.read_json(folder / "classes.json")).entries
    return Results(
        model=str(metrics.get("display") or metrics["learner"]),
        data=str(metrics["data"]),
        which=str(metrics["split"]),
        classes=tuple(entry.name for entry in entries),
        learned=tuple(entry.images for entry in entries),
        answers=answers,
        photographs=photographs,
        missing=missing,
        fewer=fewer,
        next=_next(folder, metrics),
        metrics=metrics,
        record=record,
    )


def _next(folder: Path, metrics: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """Return what can be done with a run."""
    name = shlex.quote(str(folder))
    deploy = ("Put it on a device:", f"ssd-edge deploy --target jetson {name} -o robot.ssdedge")
    if metrics.get("baselines") or metrics.get("panel"):
        return (deploy,)
    return deploy, ("Compare it with other learners, which takes minutes:", f"ssd-edge compare {name}")
