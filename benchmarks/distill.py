"""Distil small backbones on photographs without labels, and compare their heads with those of the same as shipped.

Usage: python benchmarks/distill.py DATA [--cases CASE …] [--epochs N] [--size N] [--validate] [--set KEY=VALUE …]
       [--json FILE]

DATA is what data.path accepts. Students see its training images without labels; a head (the default learner) then
learns all training images and is tested on the test images: the mean of five orders, whose first five classes
standardise. --validate holds out the last quarter of each class's training images in the order of their files, in which
neighbours show one scene, and uses no test image: settings were chosen so. The cases of half learn from 25 of the
classes, and are also tested on the others. A case that is in the file already, at this size, is not run again. One
thread.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ssd_edge import files, learners
from ssd_edge.backbones import distilled
from ssd_edge.backbones.embedder import Embedder, level_standardisation, open_backbone
from ssd_edge.backbones.onnx import OnnxEmbedder
from ssd_edge.config import BackboneConfig, DataConfig, DistillationConfig, merge, parse_section
from ssd_edge.data import Images, load
from ssd_edge.learners.closed_form.slda import SLDA
from ssd_edge.report.terminal import Console
from ssd_edge.run.storage import environment
from ssd_edge.run.teachers import ask

ORDERS, FIRST_TASK = 5, 5
CPU = torch.device("cpu")


@dataclasses.dataclass(frozen=True)
class Case:
    """One row of the table.

    Attributes:
        teachers: What teaches; empty: nothing, the student is judged as shipped.
        student: Network.
        own_size: True to keep its own size; the bundled network then runs as the package that it is.
        half: True if it is taught on the photographs of one half of the classes.
        settings: Other settings of the training.
    """

    teachers: tuple[str, ...]
    student: str = distilled.RESNET9
    own_size: bool = False
    half: bool = False


CASES = {
    "lite0": Case((), "lite0", own_size=True),
    "resnet9, 32 pixels": Case((), own_size=True),
    "resnet9": Case(()),
    "resnet9 < lite0": Case(("lite0",)),
    "resnet9 < lite0, half": Case(("lite0",), half=True),
    "lite2": Case((), "lite2", own_size=True),
    "resnet9 < lite0 + lite2": Case(("lite0", "lite2")),
    "resnet9 < lite2": Case(("lite2",)),
    "small lite0": Case((), "lite0"),
    "small lite0 < lite0 + lite2": Case(("lite0", "lite2"), "lite0"),
}


@dataclasses.dataclass(frozen=True)
class Photographs:
    """Photographs to learn from and to be tested on.

    Attributes:
        everything: All training images, also those that are held out: teachers are asked once.
        kept: Positions of `train` among them.
        train, test: The images.
        labels, truth: Their classes.
        half: True for the classes of one half.
    """

    everything: Images
    kept: np.ndarray
    train: Images
    labels: np.ndarray
    test: Images
    truth: np.ndarray
    half: np.ndarray

    @classmethod
    def read(cls, path: str, validate: bool) -> Photographs:
        """Return those of a data set; with `validate`, no test images but held-out training images."""
        data = load(DataConfig(path=path), 0)
        half = np.zeros(len(data.classes), dtype=bool)
        half[np.random.default_rng(0).permutation(len(half))[: len(half) // 2]] = True
        if not validate:
            kept = np.arange(len(data.train))
            return cls(data.train, kept, data.train, data.train_labels, data.test, data.test_labels, half)
        members = [np.flatnonzero(data.train_labels == label) for label in range(len(data.classes))]
        held = np.sort(np.concatenate([part[len(part) - len(part) // 4 :] for part in members]))
        kept = np.setdiff1d(np.arange(len(data.train)), held)
        labels = data.train_labels
        return cls(data.train, kept, data.train.take(kept), labels[kept], data.train.take(held), labels[held], half)

    def judge(self, embedder: Embedder) -> dict[str, Any]:
        """Return the accuracies of a head on a backbone, by default on all classes."""
        train, test = (
            np.concatenate([embedder.embed(part) for part in images.batches(embedder.pixels)])
            for images in (self.train, self.test)
        )
        right, few = np.zeros(len(test)), np.zeros(len(test))
        places = np.concatenate([np.arange(count) for count in np.bincount(self.labels)])
        assert (np.diff(self.labels) >= 0).all()
        for order in range(ORDERS):
            first = np.random.default_rng(1000 + order).permutation(len(self.half))[:FIRST_TASK]
            mu, sigma = np.zeros(1), np.ones(1)
            if not embedder.standardised:
                mu, sigma = level_standardisation(train[np.isin(self.labels, first)], embedder.widths)
            vectors = torch.from_numpy(((train - mu) / sigma).astype(np.float32))
            tested = torch.from_numpy(((test - mu) / sigma).astype(np.float32))
            for chosen, found in ((places >= 0, right), (places < 5, few)):
                head = SLDA(train.shape[1], SLDA.Settings(), embedder.priors)
                head.learn(learners.Task(vectors[chosen], torch.from_numpy(self.labels[chosen])))
                found += (head.predict(tested).numpy() == self.truth) / ORDERS
        of_half = self.half[self.truth]
        shares = {"accuracy": right, "five": few, "half": right[of_half], "other": right[~of_half]}
        rounded = {name: round(float(part.mean()), 4) for name, part in shares.items()}
        return {**rounded, "features": embedder.dim, "size": embedder.pixels.size}


def subset(answers: distilled.Answers, kept: np.ndarray) -> distilled.Answers:
    """Return the answers to some photographs, their features centred anew."""
    chosen = (part[:, kept].astype(np.float32) for part in answers.features)
    features = tuple((part - part[0].mean(0)).astype(np.float16) for part in chosen)
    scores = None if answers.scores is None else answers.scores[:, kept]
    return dataclasses.replace(answers, features=features, scores=scores)


def run(case: Case, photographs: Photographs, config: DistillationConfig) -> dict[str, Any]:
    """Return what one case gives."""
    if not case.teachers and case.own_size:
        name = "tiny" if case.student == distilled.RESNET9 else case.student
        return photographs.judge(open_backbone(BackboneConfig(name), CPU))
    config = dataclasses.replace(config, student=case.student)
    console, network = Console(), distilled.open_student(config, print)
    if not case.teachers:
        return photographs.judge(OnnxEmbedder(distilled.as_graph(network, network.build(), {})))
    chosen = np.flatnonzero(photographs.half[photographs.labels] | (not case.half))
    answers = subset(ask(case.teachers, (), photographs.everything, CPU, console), photographs.kept[chosen])
    images = photographs.train.take(chosen)
    began = time.monotonic()

    def report(epoch: int, epochs: int, loss: float, seconds: float) -> None:
        print(f"  epoch {epoch}/{epochs}, loss {loss:.4f}, {seconds:.0f} s", flush=True)

    made = distilled.distil(network, images, answers, config, CPU, print, report)
    trained = {"photographs": len(images), "epochs": made.epochs, "loss": round(made.loss, 4)}
    trained["seconds"] = round(time.monotonic() - began)
    return {**trained, **photographs.judge(OnnxEmbedder(made.graph))}


def main(arguments: Sequence[str] | None = None) -> None:
    """Print one line for each case, and write JSON if requested."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--cases", nargs="*", metavar="CASE", default=list(CASES))
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--validate", action="store_true")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    given = merge({}, [f"train.{word}" for word in args.set]).get("train", {})
    config = parse_section(DistillationConfig, {"epochs": args.epochs, "size": args.size, **given}, "train")
    photographs = Photographs.read(args.data, args.validate)
    command = f"python benchmarks/distill.py {Path(args.data).name} --epochs {args.epochs} --size {args.size}"
    command += f" --set {' '.join(args.set)}" if args.set else ""
    result: dict[str, Any] = {**environment(), "rows": []}
    if args.json and args.json.exists():
        result = json.loads(args.json.read_text(encoding="utf-8"))
    for name in args.cases:
        case = CASES[name]
        about = {"case": name, "asked": 0 if case.own_size else args.size}
        if any((row["case"], row["asked"]) == tuple(about.values()) for row in result["rows"]):
            continue
        about |= {"student": case.student, "teachers": list(case.teachers), "half_only": case.half}
        row = {**about, **run(case, photographs, config), "command": command}
        print(json.dumps(row), flush=True)
        result["rows"].append(row)
        if args.json:
            files.write_json(args.json, result)


if __name__ == "__main__":
    main()
