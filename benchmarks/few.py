"""Teach `ssd` a tenth class of CIFAR-10 from few images, after nine classes in four tasks: accuracy by steps.

Usage: SSD_EDGE_DATA=FOLDER python benchmarks/few.py [--test] [--json FILE]

As on a device, embeddings are given (32×32 backbone) and only images of the new class are learned. Five class orders,
two draws of the images. Accuracy is on 2,500 images of a held-out fifth of the training images; with --test only the
schedule in epochs and the default are compared, on the test images. One thread.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from split import embeddings, protocol
from torch import Tensor

from ssd_edge import learners
from ssd_edge.backbones.embedder import open_backbone
from ssd_edge.config import BackboneConfig, DataConfig
from ssd_edge.data import load
from ssd_edge.learners import Task
from ssd_edge.report.terminal import Console
from ssd_edge.run.embed import embed
from ssd_edge.run.storage import environment

TASKS, NEW = ((0, 1, 2), (3, 4), (5, 6), (7, 8)), 9
ORDERS, DRAWS, IMAGES = range(5), range(2), (5, 20, 100, 500)
STEPS, EVERY, STOP = (40, 100, 200, 300, 400, 600), 20, 300
STOPPED = f"all recognised, at most {STOP}"
EPOCHS_ALONE = {"min_steps": 1}


def nine_classes(build: Callable[..., learners.Learner], images: Tensor, rows: Tensor) -> dict[str, Tensor]:
    """Return the state of a learner that was taught nine classes."""
    learner = build()
    learner.expect(NEW)
    for task in TASKS:
        index = torch.isin(rows, torch.tensor(task)).nonzero().flatten()
        learner.learn(Task(images[index], rows[index]))
    return learner.state_dict()


def accuracy(learner: learners.Learner, images: Tensor, rows: Tensor) -> tuple[float, float]:
    """Return the accuracy on the nine old classes and on the new one."""
    right, new = learner.predict(images) == rows, rows == NEW
    return float(right[~new].double().mean()), float(right[new].double().mean())


def by_steps(learner: learners.Learner, task: Task, test: tuple[Tensor, Tensor]) -> dict[int | str, tuple]:
    """Learn a task; return steps and accuracies by number of steps, and when all images are recognised first."""
    found: dict[int | str, tuple] = {}
    epochs, per_epoch = learner.settings.epochs_of(len(task.labels)), -(-len(task.labels) // learner.settings.batch)
    seen = learner.seen

    def watch(share: float) -> None:
        step = round(share * epochs) * per_epoch
        if step % EVERY:
            return
        learner.seen = torch.cat([seen, seen.new_ones(1)])  # from the first step on the new class can be an answer
        result = (step, *accuracy(learner, *test))
        if step >= min(STEPS) and STOPPED not in found:
            done = step >= STOP or bool((learner.predict(task.embeddings) == task.labels).all())
            found.update({STOPPED: result} if done else {})
        found.update({step: result} if step in STEPS else {})
        learner.seen = seen

    learner.learn(task, watch)
    return found


def summary(schedule: int | str, images: int, found: list[dict[str, Any]]) -> dict[str, Any]:
    """Return means and extremes over orders and draws."""
    new, lost = ([one[key] for one in found] for key in ("new", "lost"))
    return {
        "schedule": schedule,
        "images": images,
        "steps": round(statistics.mean(one["steps"] for one in found)),
        "new": statistics.mean(new),
        "new_least": min(new),
        "old_loses": statistics.mean(lost),
        "old_loses_most": max(lost),
    }


def main() -> None:
    """Print one line per schedule and number of images; write JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--test", action="store_true", help="measure on the test images")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    embedder = open_backbone(BackboneConfig(name="tiny"), torch.device("cpu"))
    vectors, labels = embeddings("cifar10-jpg.tar.xz", embedder)
    if args.test:
        dataset = load(DataConfig(path="cifar10-jpg.tar.xz"), 0)
        test_vectors = torch.from_numpy(embed(dataset, embedder, Console(), True)["test"])
        test_labels = torch.from_numpy(dataset.test_labels)
    found: dict[tuple[int | str, int], list[dict[str, Any]]] = {}
    for order in ORDERS:
        kept, held_out, row = protocol(labels, order)
        train, test = (vectors[kept], row[kept]), (vectors[held_out[:2500]], row[held_out[:2500]])
        if args.test:
            row_of = torch.zeros(NEW + 1, dtype=torch.int64).scatter_(0, labels, row)
            train, test = (vectors, row), (test_vectors, row_of[test_labels])

        def build(order: int = order, **options: Any) -> learners.Learner:
            return learners.build({"name": "ssd", **options}, vectors.shape[1], embedder.priors, order)

        state, of_new = nine_classes(build, *train), (train[1] == NEW).nonzero().flatten()
        for images in IMAGES:
            for draw in DRAWS:
                chosen = of_new[torch.randperm(len(of_new), generator=torch.Generator().manual_seed(draw))[:images]]
                task = Task(train[0][chosen], train[1][chosen])
                schedules = {"40 epochs": EPOCHS_ALONE, "default": {}} if args.test else {"": {"min_steps": max(STEPS)}}
                for name, options in schedules.items():
                    learner = build(**options)
                    learner.load_state_dict(state)
                    old = accuracy(learner, *test)[0]
                    if args.test:
                        epochs = learner.learn(task)["epochs"]
                        steps = int(epochs) * -(-images // learner.settings.batch)
                        results: dict[int | str, tuple] = {name: (steps, *accuracy(learner, *test))}
                    else:
                        results = by_steps(learner, task, test)
                    for schedule, (steps, after, new) in results.items():
                        one = {"steps": steps, "new": new, "lost": old - after}
                        found.setdefault((schedule, images), []).append(one)
        print(f"order {order}", flush=True)
    rows = [summary(schedule, images, ones) for (schedule, images), ones in found.items()]
    for one in rows:
        print(one)
    if args.json:
        key = "test" if args.test else "rows"
        stored = json.loads(args.json.read_text()) if args.json.exists() else {}
        stored.update({"command": "python benchmarks/few.py; python benchmarks/few.py --test", **environment()})
        args.json.write_text(json.dumps({**stored, key: rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
