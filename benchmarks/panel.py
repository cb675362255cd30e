"""Compare `landmark` with the closed-form panel on many streams, with few and many images, in five class orders.

No rival has more state than `landmark`.

Usage: SSD_EDGE_DATA=FOLDER python benchmarks/panel.py --json FILE [--tiny FOLDER] [--streams …] [--shots 5 20 100 0]
       [--orders 5] [--heads …] [--jobs 2] [--again HEAD …] [--check-streams] [--frontier [--landmark-priors FOLDER]]

All heads see the same embeddings, images and class order. Order i is one of the five of SDMLP; it also seeds the
learner and the draw of images where --shots limits them (0: all images). `landmark` always has its default settings.
The settings of a rival are chosen from `CANDIDATES` for each stream and number of images, on held-out training images
of order 0. Rivals with an adjustable size (`MOST`) are as large as the state of `landmark` allows; FeCAM sees fewer
directions of the embedding, the leading ones of the pretraining covariance. State is counted at 4 bytes per float;
constants that come with the backbone are counted separately. Where nothing depends on the seed and two orders agree,
the others are not run ("repeated" in the record). Rivals on CIFAR-100 in 50 tasks are not run either: their statistics
equal those of the same images in 10 tasks.

An interrupted run resumes where it stopped. A record is reused while its settings are unchanged; --again discards the
records of a head.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import functools
import json
import math
import multiprocessing
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssd_edge import files, learners
from ssd_edge.backbones import package
from ssd_edge.config import StreamConfig
from ssd_edge.errors import InputError
from ssd_edge.learners.priors import Priors
from ssd_edge.learners.registry import CLOSED_FORM
from ssd_edge.report.terminal import Console
from ssd_edge.reproduction.sources import Inputs, Sources, read_inputs, write_inputs
from ssd_edge.reproduction.specs import ORDERS, streams
from ssd_edge.run.storage import environment
from ssd_edge.run.streams import make_stream
from ssd_edge.run.tasks import StreamData, prepare

STREAMS = ("cifar10", "cifar100-10x10", "cifar100-50x2", "mnist-pixels", "mnist", "tiny-imagenet")
TWINS = {"cifar100-50x2": "cifar100-10x10"}  # the same images and classes, split into tasks differently
PROTOCOLS = ("cifar10", "cifar10-repetition", "cifar10-blurry", "cifar10-online")
BUDGETS_MB = (0.25, 0.5, 1, 2, 4, 8, 16, 32)
# Upper limit of the setting that determines a rival's size. FeCAM: D. FlyModel: published; 40,000 gain 0.2 points.
MOST = {"ranpac": 20_000, "fecam": 1_000_000, "flymodel": 10_000}
TUNING_NEURONS = (
    4_000  # size at which FlyModel's settings for all images are chosen; lr depends on the size for few images
)
SHRINKAGES = ((1.0, 1.0), (0.1, 0.1), (10.0, 0.0))
GRIDS: dict[str, tuple[dict[str, Any], ...]] = {
    "slda": tuple({"prior_weight": weight} for weight in (-1.0, 0.0, 1000.0)),
    "fecam": tuple(
        {"tukey": tukey, "shrink_diagonal": one, "shrink_off_diagonal": two}
        for tukey in (1.0, 0.5)
        for one, two in SHRINKAGES
    ),
    "flymodel": tuple({"lr": lr, "active": active} for lr in (0.005, 0.2) for active in (0.01, 0.05)),
}
CANDIDATES: dict[str, tuple[dict[str, Any], ...]] = {head: GRIDS.get(head, ({},)) for head in CLOSED_FORM}
AGREE = 0.0005  # difference in accuracy below which two orders are considered equal up to rounding
LEAST_LOSS = 0.003  # `landmark` counts as worse if it loses more accuracy than this and than two standard errors

Record = dict[str, Any]
_opened: dict[str, tuple[Path, Priors]] = {}  # in a worker process: stream → arrays and priors


def start_worker(opened: dict[str, tuple[Path, Priors]]) -> None:
    """Initialise a worker process with the streams."""
    torch.set_num_threads(1)
    _opened.update(opened)


@functools.lru_cache(maxsize=1)
def read_stream(path: Path) -> Inputs:
    """Return the arrays of one data set."""
    return read_inputs(path)


@functools.lru_cache(maxsize=2)
def ordered_stream(stream: str, order: int) -> StreamData:
    """Return a stream with its classes in the given order."""
    inputs = read_stream(_opened[stream][0])
    config = StreamConfig(**streams()[stream].stream, order=f"sdmlp-{ORDERS[order]}")
    return prepare(inputs.dataset, make_stream(inputs.dataset.classes, config, order), True, inputs.embedded)


def tasks_of(stream: str, shots: int, order: int) -> list[Tensor]:
    """Return the indices of the training images of each task; `shots` images per class, 0 for all."""
    tasks = list(ordered_stream(stream, order).train_tasks)
    if not shots:
        return tasks
    labels = torch.from_numpy(read_stream(_opened[stream][0]).dataset.train_labels)
    generator, taken = torch.Generator().manual_seed(1_000_003 * order + shots), torch.zeros(len(labels)).bool()
    for label in labels.unique():
        own = (labels == label).nonzero().flatten()
        taken[own[torch.randperm(len(own), generator=generator)[:shots]]] = True
    return [task[taken[task]] for task in tasks]


def state_size(learner: learners.Learner) -> tuple[int, int]:
    """Return the bytes of a learner's state at 4 bytes per float, and those of its constants from the backbone."""
    state, constants = learner.state_dict(), learner.constants()

    def size(tensors: Mapping[str, Tensor]) -> int:
        return sum(t.numel() * (4 if t.dtype == torch.float64 else t.element_size()) for t in tensors.values())

    return size({name: tensor for name, tensor in state.items() if name not in constants}), size(constants)


def bytes_of(head: str, size: int, classes: int) -> int:
    """Return the state bytes of a rival with `size` features, directions or neurons."""
    triangle, small = size * (size + 1) // 2, classes + 8
    if head == "ranpac":
        return 4 * (triangle + 2 * classes * size + 2 * classes) + small
    if head == "fecam":
        return 4 * classes * (triangle + size + 1) + small
    return 4 * classes * size + small


def largest(fits: Callable[[int], bool], most: int) -> int:
    """Return the largest number up to `most` that fits, assuming that all smaller ones do; 0 if none fits."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def size_settings(head: str, budget: int, classes: int, dim: int) -> dict[str, Any]:
    """Return the size settings of a rival that fills a budget in bytes; {} if its size cannot be set.

    Raises:
        InputError: If even the smallest size does not fit.
    """
    if head not in MOST:
        return {}
    most = min(MOST[head], dim) if head == "fecam" else MOST[head]
    size = largest(lambda wanted: bytes_of(head, wanted, classes) <= budget, most)
    if size < 2:
        raise InputError(f"{head} for {classes} classes does not fit in {budget:,} bytes; raise the budget")
    if head == "fecam":
        return {"directions_seen": size} if size < dim else {}
    if head == "flymodel":
        return {"neurons": size, "inputs_per_neuron": min(32, dim)}
    return {"features": size}


def view_of(count: int, dim: int, priors: Priors, seed: int) -> Tensor:
    """Return ``(dim, count)`` orthonormal leading directions of the pretraining covariance, or random ones."""
    if priors.within_covariance is not None:
        vectors = torch.linalg.eigh(torch.from_numpy(priors.within_covariance).double()).eigenvectors.flip(1)
    else:
        vectors = torch.linalg.qr(torch.randn(dim, dim, generator=torch.Generator().manual_seed(seed)).double()).Q
    return vectors[:, :count].float()


class TrainedLearner:
    """A learner that has learned a stream.

    Attributes:
        seconds: Training time of each task.
    """

    def __init__(self, options: Mapping[str, Any], tasks: Sequence[learners.Task], priors: Priors, seed: int) -> None:
        given, dim = dict(options), tasks[0].embeddings.shape[1]
        count = given.pop("directions_seen", dim)
        self.view = None if count == dim else view_of(count, dim, priors, seed)
        self.learner = learners.build(given, count, priors, seed)
        self.learner.expect(1 + max(int(task.labels.max()) for task in tasks))
        self.seconds = []
        for task in tasks:
            began = time.perf_counter()
            self.learner.learn(learners.Task(self.project(task.embeddings), task.labels))
            self.seconds.append(time.perf_counter() - began)

    def project(self, vectors: Tensor) -> Tensor:
        """Return embeddings as the learner sees them."""
        return vectors if self.view is None else vectors @ self.view

    def correct(self, vectors: Tensor, rows: Tensor) -> int:
        """Return the number of correct predictions for ``(N, D)`` embeddings."""
        parts = zip(vectors.split(4096), rows.split(4096), strict=True)
        return sum(int((self.learner.predict(self.project(part)) == truth).sum()) for part, truth in parts)


def measured(options: Mapping[str, Any], stream: str, tasks: Sequence[Tensor], order: int, priors: Priors) -> Record:
    """Learn the tasks in sequence and evaluate on all test images."""
    prepared = ordered_stream(stream, order)
    given = [learners.Task(prepared.train[task], prepared.train_rows[task]) for task in tasks]
    trained = TrainedLearner(options, given, priors, order)
    state, constants = state_size(trained.learner)
    return {
        "accuracy": trained.correct(prepared.test, prepared.test_rows) / len(prepared.test),
        "state_bytes": state,
        "constant_bytes": constants,
        "learned": sum(map(len, tasks)),
        "seconds": round(sum(trained.seconds), 4),
        "slowest_task_seconds": round(max(trained.seconds), 4),
        "note": trained.learner.note,
    }


def splits(rows: Tensor, shots: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield indices of learned and held-out samples.

    A fifth of each class is held out, or a tenth with all images; up to 20 images per class give five folds. At least
    one image of each class is learned.
    """
    parts = 5 if shots else 10
    place = torch.zeros(len(rows), dtype=torch.int64)  # position of a sample within its class
    for row in rows.unique():
        own = (rows == row).nonzero().flatten()
        place[own] = torch.randperm(len(own), generator=torch.Generator().manual_seed(0))
    for turn in range(parts if 0 < shots <= 20 else 1):
        held = place % parts == turn
        if held.any():
            yield (~held).nonzero().flatten(), held.nonzero().flatten()


def choose_settings(head: str, size: Mapping[str, Any], stream: str, shots: int, priors: Priors) -> Record:
    """Return the candidate with the best accuracy on held-out training images of order 0; the first of equals."""
    prepared, index = ordered_stream(stream, 0), torch.cat(tasks_of(stream, shots, 0))
    vectors, rows = prepared.train[index], prepared.train_rows[index]
    given, scores = {"name": head, **size}, []
    if head == "flymodel" and not shots:
        given["neurons"] = min(size["neurons"], TUNING_NEURONS)
    for candidate in CANDIDATES[head]:
        right = judged = 0
        for learned, held in splits(rows, shots):
            trained = TrainedLearner(
                {**given, **candidate}, [learners.Task(vectors[learned], rows[learned])], priors, 0
            )
            right, judged = right + trained.correct(vectors[held], rows[held]), judged + len(held)
        scores.append(right / judged)
    return {
        "stream": stream,
        "shots": shots,
        "head": head,
        "sized": dict(size),
        "candidates": list(CANDIDATES[head]),
        "held_out": [round(score, 5) for score in scores],
        "judged": judged,
        "chosen": CANDIDATES[head][scores.index(max(scores))],
    }


def depends_on_seed(head: str, size: Mapping[str, Any], priors: Priors) -> bool:
    """Return True if a rival depends on the seed."""
    drawn_view = bool(size) and priors.within_covariance is None
    return head in ("ranpac", "flymodel") or (head == "fecam" and drawn_view)


def agree(first: Record, second: Record) -> bool:
    """Return True if two orders agree up to rounding."""
    return first["settings"] == second["settings"] and abs(first["accuracy"] - second["accuracy"]) <= AGREE


def panel(
    stream: str, shots: int, order: int, heads: Sequence[str], known: Mapping[str, Mapping[str, Record]]
) -> tuple[list[Record], list[Record]]:
    """Run all heads on one stream, number of images and order.

    Args:
        stream: Name of the stream.
        shots: Images per class, 0 for all.
        order: Number of the class order.
        heads: Names of the rivals.
        known: Records by head: ``kept`` of this cell, ``choices`` of settings, ``first`` and ``second`` of orders 0
            and 1 where they may replace this one, ``twin`` of the stream that differs only in its tasks.

    Returns:
        Records of the cells, and of the settings chosen.
    """
    priors, place = _opened[stream][1], {"stream": stream, "shots": shots, "order": order}
    dim, classes = ordered_stream(stream, order).train.shape[1], len(ordered_stream(stream, order).names)
    cells, choices = [], []

    def cell(head: str, size: Mapping[str, Any], tuned: Mapping[str, Any]) -> Record:
        settings = {"name": head, **size, **tuned}
        kept = known["kept"].get(head)
        if kept and kept["settings"] == settings and not kept.get("repeated"):
            return kept
        options = {"name": "landmark"} if head == "landmark" else settings
        made = measured(options, stream, tasks_of(stream, shots, order), order, priors)
        if head in MOST and made["state_bytes"] != bytes_of(head, next(iter(size.values()), dim), classes):
            raise RuntimeError(f"{head} takes {made['state_bytes']:,} bytes, which is not what it was sized by")
        return {**place, "head": head, "settings": settings, "sized": dict(size), **made}

    cells.append(cell("landmark", {}, dataclasses.asdict(learners.settings_of({"name": "landmark"}))))
    for head in heads:
        size = size_settings(head, cells[0]["state_bytes"], classes, dim)
        twin, first, second = (known[name].get(head) for name in ("twin", "first", "second"))
        if twin and twin["sized"] == size:
            cells.append({**twin, **place, "repeated": True})
            continue
        if (
            first
            and second
            and not depends_on_seed(head, size, priors)
            and agree(first, second)
            and first["sized"] == size
        ):
            cells.append({**second, **place, "repeated": True})
            continue
        candidates = CANDIDATES[head] if head != "slda" or priors.within_covariance is not None else ({},)
        if len(candidates) == 1:
            cells.append(cell(head, size, candidates[0]))
            continue
        choice = known["choices"].get(head)
        stale = choice is None or choice["candidates"] != list(candidates) or (order == 0 and choice["sized"] != size)
        if stale:
            choice = choose_settings(head, size, stream, shots, priors)
            choices.append(choice)
        cells.append(cell(head, size, choice["chosen"]))
    return cells, choices


def protocol(stream: str, order: int) -> Record:
    """Run `landmark` on a stream of another protocol with all images."""
    priors = _opened[stream][1]
    made = measured({"name": "landmark"}, stream, tasks_of(stream, 0, order), order, priors)
    return {"stream": stream, "order": order, **made}


def frontier(stream: str, head: str, budget_mb: float, priors: Priors | None) -> Record:
    """Return one point of accuracy against state, with all images in order 0.

    Rivals learn all images in one task, which does not change their statistics.

    Args:
        stream: Name of the stream.
        head: Name of the head.
        budget_mb: Limit of the state in MB; 0 for the default size.
        priors: Priors of `landmark`; None for those of the stream.
    """
    point: Record = {"stream": stream, "head": head, "budget_mb": budget_mb}
    own, prepared, budget = _opened[stream][1], ordered_stream(stream, 0), int(budget_mb * 1e6)
    dim, classes, tasks = prepared.train.shape[1], len(prepared.names), tasks_of(stream, 0, 0)
    if head == "landmark":
        priors, options = priors or own, {"name": "landmark"}
        if budget:
            few = torch.cat([(prepared.train_rows == row).nonzero().flatten()[:3] for row in range(classes)])
            probe, refusals = [learners.Task(prepared.train[few], prepared.train_rows[few])], []

            def fits(directions: int) -> bool:
                try:
                    learner = TrainedLearner({"name": "landmark", "directions": directions}, probe, priors, 0).learner
                    return state_size(learner)[0] <= budget
                except InputError as error:
                    refusals.append((directions, str(error)))
                    return False

            count = largest(fits, 8192)
            refused = [why for directions, why in refusals if directions == count + 1]
            if not count or refused:
                return {**point, "skipped": refused[0] if refused else "no number of directions fits in this budget"}
            options["directions"] = count
        return {**point, "settings": options, **measured(options, stream, tasks, 0, priors)}
    try:
        size = size_settings(head, budget, classes, dim) if budget else {}
    except InputError as error:
        return {**point, "skipped": str(error)}
    if budget and bytes_of(head, next(iter(size.values()), dim), classes) <= budget / 2:
        return {**point, "skipped": "the largest one that is measured fits in half of this budget"}
    tuned = choose_settings(head, size, stream, 0, own)["chosen"] if len(CANDIDATES[head]) > 1 else {}
    options = {"name": head, **size, **tuned}
    return {**point, "settings": options, **measured(options, stream, [torch.cat(tasks)], 0, own)}


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and its standard error, which is 0 for a single value."""
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def summary(cells: Sequence[Record]) -> list[Record]:
    """Summarise heads per stream and number of images; compare `landmark` with the best head of at most its size."""
    found: dict[tuple[str, int], dict[str, dict[int, Record]]] = collections.defaultdict(dict)
    for cell in cells:
        found[cell["stream"], cell["shots"]].setdefault(cell["head"], {})[cell["order"]] = cell
    rows = []
    for (stream, shots), heads in found.items():
        row: Record = {"stream": stream, "shots": shots, "heads": {}}
        for head, orders in heads.items():
            mean, error = mean_and_error([cell["accuracy"] for cell in orders.values()])
            state = max(cell["state_bytes"] for cell in orders.values())
            row["heads"][head] = {"accuracy": mean, "error": error, "state_bytes": state, "orders": len(orders)}
        own = row["heads"].get("landmark")
        rivals = {
            head: one["accuracy"]
            for head, one in row["heads"].items()
            if own and head != "landmark" and one["state_bytes"] <= own["state_bytes"]
        }
        if rivals:
            best = max(rivals, key=rivals.__getitem__)
            both = sorted(heads["landmark"].keys() & heads[best].keys())
            gain, error = mean_and_error([heads["landmark"][n]["accuracy"] - heads[best][n]["accuracy"] for n in both])
            row |= {"best_rival": best, "gain": gain, "two_errors": 2 * error}
            row["verdict"] = "WORSE" if gain < -max(LEAST_LOSS, 2 * error) else "ok"
        rows.append(row)
    return rows


def show(rows: Sequence[Record]) -> None:
    """Print the summary, in percent."""
    for row in rows:
        print(f"\n{row['stream']}, {row['shots'] or 'all'} images per class")
        for head, one in row["heads"].items():
            accuracy = f"{100 * one['accuracy']:6.2f} ± {100 * one['error']:.2f}"
            print(f"  {head:9} {accuracy} {one['state_bytes'] / 1e6:8.3f} MB")
        if "gain" in row:
            gain = f"{100 * row['gain']:+.2f} ± {100 * row['two_errors']:.2f}"
            print(f"  gain over {row['best_rival']}: {gain} points (two standard errors): {row['verdict']}")
    for name, part in (("all images", True), ("few images", False)):
        gains = [row["gain"] for row in rows if "gain" in row and (row["shots"] == 0) == part]
        if gains:
            print(f"mean gain, {name}: {100 * statistics.fmean(gains):+.2f} points over {len(gains)} rows")


class Records:
    """Records of a run, saved after every change.

    Args:
        path: JSON file; existing records are reused.
        again: Heads whose records are discarded.
    """

    def __init__(self, path: Path, again: Sequence[str]) -> None:
        self.path, self.environment = path, environment()
        self.record = files.read_json(path) if path.exists() else {}
        cells = [cell for cell in self.record.get("cells", []) if cell["head"] not in again]
        choices = [one for one in self.record.get("choices", []) if one["head"] not in again]
        self.cells = {(one["stream"], one["shots"], one["order"], one["head"]): one for one in cells}
        self.choices = {(one["stream"], one["shots"], one["head"]): one for one in choices}

    def at(self, stream: str | None, shots: int, order: int) -> dict[str, Record]:
        """Return the records of a cell by head."""
        return {key[3]: cell for key, cell in self.cells.items() if key[:3] == (stream, shots, order)}

    def known(self, stream: str, shots: int, order: int) -> dict[str, dict[str, Record]]:
        """Return the records that `panel` may reuse; two orders have the same images only with all images."""
        all_images = shots == 0 and order > 1
        return {
            "kept": self.at(stream, shots, order),
            "choices": {key[2]: one for key, one in self.choices.items() if key[:2] == (stream, shots)},
            "first": self.at(stream, shots, 0) if all_images else {},
            "second": self.at(stream, shots, 1) if all_images else {},
            "twin": self.at(TWINS.get(stream), shots, order),
        }

    def add(self, cells: Sequence[Record], choices: Sequence[Record]) -> None:
        """Add the results of a job."""
        self.cells |= {(one["stream"], one["shots"], one["order"], one["head"]): one for one in cells}
        self.choices |= {(one["stream"], one["shots"], one["head"]): one for one in choices}
        self.save()

    def save(self, **more: Any) -> None:
        """Write all records."""
        args = [word if "/" not in word else "PATH" for word in sys.argv[1:]]
        command = shlex.join(["python", "benchmarks/panel.py", *args])
        cells, choices = list(self.cells.values()), list(self.choices.values())
        made = {"command": command, **self.environment, "cells": cells, "choices": choices, "summary": summary(cells)}
        self.record |= {**made, **more}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        files.write_text(self.path, json.dumps(self.record, indent=1) + "\n")


def fill(records: Records, pool: ProcessPoolExecutor, args: argparse.Namespace, names: Sequence[str]) -> None:
    """Run the panel; a cell starts once the cells whose results it may reuse are complete."""
    heads = [head for head in args.heads if head != "landmark"]
    waiting = [(name, shots, order) for order in range(args.orders) for name in names for shots in args.shots]
    left, running = set(waiting), {}

    def ready(name: str, shots: int, order: int) -> bool:
        needed = {(name, shots, 0), (TWINS.get(name), shots, order)} | ({(name, shots, 1)} if shots == 0 else set())
        return not any(one in left for one in needed - {(name, shots, order)} if one[2] <= order)

    total, began = len(waiting), time.monotonic()
    while left:
        for one in [one for one in waiting if ready(*one)]:
            waiting.remove(one)
            running[pool.submit(panel, *one, heads, records.known(*one))] = one
        done: set[Future] = wait(running, return_when=FIRST_COMPLETED).done
        for future in done:
            one = running.pop(future)
            records.add(*future.result())
            left.discard(one)
            done_now = f"{time.monotonic() - began:6.0f} s  {total - len(left)}/{total}"
            print(f"{done_now}  {one[0]}, {one[1] or 'all'} images, order {one[2]}", flush=True)


def open_streams(names: Sequence[str], tiny: Path | None, folder: Path) -> dict[str, tuple[Path, Priors]]:
    """Return arrays and priors of each stream with data and backbone available; print the names of the others."""
    sources, opened = Sources(torch.device("cpu"), Console(), tiny), {}
    for name in names:
        source = streams()[name]
        if source.backbone != "shipped" and sources.tiny_backbone is None:
            print(f"SKIPPED {name}: no backbone of its own; give --tiny FOLDER", flush=True)
            continue
        try:
            inputs = sources.inputs(source, (), False)
        except InputError as error:
            print(f"SKIPPED {name}: {error}", flush=True)
            continue
        opened[name] = write_inputs(folder, inputs), inputs.priors
    return opened


def main() -> None:
    """Run the selected benchmarks and print the summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", nargs="*", choices=STREAMS, default=list(STREAMS))
    parser.add_argument("--shots", type=int, nargs="+", default=[5, 20, 100, 0])
    parser.add_argument("--orders", type=int, choices=range(1, len(ORDERS) + 1), default=len(ORDERS))
    parser.add_argument("--heads", nargs="+", choices=list(CANDIDATES), default=list(CANDIDATES))
    parser.add_argument("--tiny", type=Path, help="backbone package pretrained on half of Tiny-ImageNet's classes")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--again", nargs="+", choices=list(CANDIDATES), default=[], help="measure these heads anew")
    parser.add_argument("--check-streams", action="store_true", help="landmark on the repeated, blurry, online streams")
    parser.add_argument("--frontier", action="store_true", help="accuracy against state on CIFAR-10 too")
    parser.add_argument("--landmark-priors", type=Path, help="backbone package with the priors of the frontier")
    args = parser.parse_args()
    if any(shots == 1 or shots < 0 for shots in args.shots):
        parser.error("--shots must be 0 (all) or at least 2: one image is learned and one judged to choose settings")
    extra = [*(PROTOCOLS if args.check_streams else ()), *(("cifar10",) if args.frontier else ())]
    with tempfile.TemporaryDirectory() as scratch:
        opened = open_streams(list(dict.fromkeys([*args.streams, *extra])), args.tiny, Path(scratch))
        torch.set_num_threads(1)
        records = Records(args.json, args.again)
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(args.jobs, context, start_worker, (opened,)) as pool:
            fill(records, pool, args, [name for name in args.streams if name in opened])
            if args.check_streams:
                jobs = [pool.submit(protocol, name, n) for name in PROTOCOLS if name in opened for n in (0, 1)]
                found = []
                for job in jobs:
                    found.append(one := job.result())
                    records.save(streams=found)
                    print(f"{one['stream']}, order {one['order']}: {100 * one['accuracy']:.2f}", flush=True)
            if args.frontier and "cifar10" in opened:
                priors = package.load(args.landmark_priors).priors if args.landmark_priors else None
                asked = [(head, 0.0) for head in CANDIDATES if head not in MOST]
                asked += [(head, budget) for head in ("landmark", *MOST) for budget in BUDGETS_MB]
                jobs = [pool.submit(frontier, "cifar10", *one, priors) for one in asked]
                points = []
                for job in jobs:
                    points.append(one := job.result())
                    records.save(frontier=points)
                    result = one.get("skipped") or f"{100 * one['accuracy']:.2f} in {one['state_bytes'] / 1e6:.3f} MB"
                    print(f"{one['head']:9} {one['budget_mb'] or '':>5}: {result}", flush=True)
    show(summary(list(records.cells.values())))


if __name__ == "__main__":
    main()
