"""Let a fleet of simulated devices learn, add up what they have learned, and compare with one device taught everything.

Usage: python benchmarks/fleet.py DATA [--devices 1000] [--images 20] [--classes 2] [--learner slda] [--backbone tiny]
       [--engine flower | loop] [--rounds good bad] [--json FILE]

With --devices 0 only the last table is made. DATA is what data.path accepts. The common bundle knows ten classes of as
many images each; then each device is taught its own classes, at random, from images that no other device has, through
the function that a device calls (with its guard and its held-out images, without its store; embeddings are computed
once). It answers the query of `exporters.fleet`: in Flower's own simulation, one virtual SuperNode per device and a
worker per core, or in a loop without Flower.

There are two rounds of everything: one in which all is well, and one in which 5 % of the devices fail, 5 % answer twice
and 1 % send garbage. Both bundles are compared on the test images with one device that was taught, one after the other,
what the good devices were. With DATA's test images as another occasion, the last table is about `names`: how many pairs
of devices with the same class, or with different ones, are held to differ.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import json
import os
import re
import resource
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from shared import read
from torch import Tensor

from device_runtime.learning import contribution, teach
from device_runtime.learning.budget import Meter
from device_runtime.learning.exchange import Origin
from device_runtime.learning.guard import Limits
from device_runtime.learning.state import DeviceState
from exporters.export import export_package
from exporters.fleet.gateway import Gateway, Reply
from exporters.fleet.names import Means, Yardstick
from ssd_edge import bundle as bundles
from ssd_edge import files, learners
from ssd_edge.backbones import package
from ssd_edge.classes import ClassRegistry
from ssd_edge.learners.closed_form.sums import ClassStatistics
from ssd_edge.learners.retention import TrackRecord
from ssd_edge.learners.unknown import Rejector
from ssd_edge.run.preprocessing import level_standardisation
from ssd_edge.run.storage import environment

BASE = 10  # classes of the common bundle
FAIL, TWICE, GARBAGE = 0.05, 0.05, 0.01  # shares of the devices
ANY = Limits(force=True)
BAR = {"scores": 1e-3, "seconds": 600.0, "bytes": 4e6}


@dataclasses.dataclass(frozen=True)
class Plan:
    """What every device is taught, in a folder that all processes can read.

    Attributes:
        folder: Holds ``common.ssdedge`` and ``plan.npz``.
        bad: True if some devices fail, answer twice or send garbage.
    """

    folder: Path
    bad: bool

    def kind(self, device: int) -> str:
        """Return what is wrong with a device: ``fail``, ``twice``, ``garbage`` or nothing."""
        if not self.bad:
            return ""
        place = np.random.default_rng(5).permutation(len(plan_of(self.folder)["classes"]))[device]
        limits = np.round(np.cumsum([GARBAGE, FAIL, TWICE]) * len(plan_of(self.folder)["classes"]))
        return next((k for k, limit in zip(("garbage", "fail", "twice"), limits, strict=True) if place < limit), "")

    def answer(self, context: Any) -> list[Reply]:
        """Return the answer of the device of a node."""
        device = int(context.node_config["partition-id"])
        kind = self.kind(device)
        if kind == "fail":
            raise RuntimeError(f"camera-{device} is broken")
        reply = taught(self.folder, device)
        if kind == "garbage":
            rng = np.random.default_rng(device)
            spoilt = {
                key: np.full_like(array, np.nan) if device % 2 else rng.standard_normal(array.shape).astype(array.dtype)
                for key, array in reply.arrays.items()
                if key.endswith(("sums", "second"))
            }
            reply = dataclasses.replace(reply, arrays={**reply.arrays, **spoilt})
        return [reply, reply] if kind == "twice" else [reply]


@functools.lru_cache(maxsize=2)
def plan_of(folder: Path) -> dict[str, np.ndarray]:
    """Return embeddings, and the classes and images of each device."""
    return {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("vectors", "classes", "images", "names")}


@functools.lru_cache(maxsize=2)
def common(folder: Path) -> bundles.Bundle:
    """Return the common bundle."""
    torch.set_num_threads(1)
    return bundles.read(folder / "common.ssdedge", allow_control_flow=True)


def lesson(folder: Path, device: int) -> tuple[list[str], np.ndarray]:
    """Return the class names of a device, and the embeddings of its images ``(classes, images, D)``."""
    plan = plan_of(folder)
    return [str(plan["names"][label]) for label in plan["classes"][device]], plan["vectors"][plan["images"][device]]


def taught(folder: Path, device: int) -> Reply:
    """Teach a device as one is taught, and return its answer."""
    base = _state(folder)
    names, vectors = lesson(folder, device)
    sources = {
        name: [np.frombuffer(one.tobytes(), np.uint8) for one in part]
        for name, part in zip(names, vectors, strict=True)
    }
    every = torch.from_numpy(vectors.reshape(-1, vectors.shape[-1]))
    state, _ = teach.teach(base, sources, lambda *_: every, 1, ANY, Meter(None, None), {})
    facts = base.bundle
    installation = hashlib.sha256(f"camera-{device}".encode()).hexdigest()[:16]
    origin = Origin(installation, (), facts.bundle_sha256, facts.manifest["backbone"]["sha256"], 2)
    part = contribution.since(state, base, origin)
    return Reply(f"camera-{device}", part.to_arrays(), part.about())


@functools.lru_cache(maxsize=2)
def _state(folder: Path) -> DeviceState:
    return DeviceState.of_bundle(common(folder))


def make_bundle(folder: Path, data: Any, embedder: Any, options: dict[str, Any], chosen: dict[int, np.ndarray]) -> None:
    """Write the common bundle.

    Args:
        folder: Where to.
        data: Embedded data set.
        embedder: Its backbone.
        options: Learner and settings.
        chosen: Class → positions of its training images.
    """
    vectors = torch.cat([data.train[positions] for positions in chosen.values()])
    rows = torch.cat([torch.full((len(p),), row) for row, p in enumerate(chosen.values())])
    learner = learners.build(options, vectors.shape[1], embedder.priors, 0)
    learner.learn(learners.Task(vectors, rows))
    statistics = ClassStatistics(vectors.shape[1])
    statistics.add(vectors, rows)
    known = np.isin(data.test_labels, list(chosen))
    row_of = {label: row for row, label in enumerate(chosen)}
    tests = data.test[torch.from_numpy(known)], torch.tensor([row_of[label] for label in data.test_labels[known]])
    rejector = Rejector.calibrate(statistics, vectors, rows, *tests)
    record = TrackRecord.tested_on(learner, statistics, rejector, *tests)
    registry = ClassRegistry()
    for label, positions in chosen.items():
        registry = registry.add(data.classes[label], "base", len(positions))
    onnx = export_package(package.load(package.SHIPPED))
    side = embedder.pixels.size
    images = np.random.default_rng(0).integers(0, 256, (4, side, side, 3)).astype(np.uint8)
    vectors = embedder.embed(images)
    probe = {"images": images, "embeddings": vectors, "rows": learner.predict(torch.from_numpy(vectors)).numpy()}
    entries = {
        "backbone": onnx,
        "learner": files.tensor_bytes(*learners.pack(learner)),
        "unknown": files.tensor_bytes(rejector.state()),
        "record": files.tensor_bytes(record.state()),
        "classes": files.json_bytes(registry.to_json()),
        "probe": files.tensor_bytes(probe, {"min_cosine": 0.9999, "max_difference": 1e-2}),
        "card": b"# fleet\n",
    }
    if learner.class_statistics() is None:
        entries["statistics"] = files.tensor_bytes({key: t.numpy() for key, t in statistics.state().items()})
    facts = {"dim": learner.dim, "precision": "fp32", "opset": 18, "id": embedder.identity}
    manifest = {
        "name": "common",
        "created": "2026-12-01T00:00:00Z",
        "release": 1,
        "target": "cpu",
        "metrics": {},
        "producer": {"ssd_edge": "0.1.0", "git": "unknown", "packages": {}},
        "backbone": {"file": "backbone.onnx", "sha256": files.sha256(onnx), **embedder.pixels.to_dict(), **facts},
        "learner": {"name": learner.name, "settings": learners.pack(learner)[1]["settings"]},
        "classes": registry.names,
        "parity": {},
    }
    packed = bundles.pack(manifest, {bundles.ROLES[role]: (role, part) for role, part in entries.items()})
    bundles.write(folder / "common.ssdedge", packed)


def make_plan(folder: Path, data: Any, devices: int, classes: int, images: int) -> dict[int, np.ndarray]:
    """Share the training images out to devices; return those of the common bundle by class.

    Raises:
        SystemExit: There are too few images.
    """
    rng, count = np.random.default_rng(0), len(data.classes)
    left = {label: list(rng.permutation(np.flatnonzero(data.train_labels == label))) for label in range(count)}
    chosen = {label: np.array([left[label].pop() for _ in range(images)]) for label in range(BASE)}
    drawn, taken = [], []
    for _ in range(devices):
        shares = np.array([len(left[label]) // images for label in range(count)], float)
        if (shares > 0).sum() < classes:
            raise SystemExit(f"{data.train_labels.size:,} images are too few for {devices} devices")
        labels = rng.choice(count, classes, replace=False, p=shares / shares.sum())
        drawn.append(labels)
        taken.append([[left[label].pop() for _ in range(images)] for label in labels])
    np.save(folder / "vectors.npy", data.train.numpy())
    np.save(folder / "classes.npy", np.array(drawn))
    np.save(folder / "images.npy", np.array(taken))
    np.save(folder / "names.npy", np.array(data.classes))
    return chosen


def gather(plan: Plan, ledger: Path, engine: str) -> dict[str, Any]:
    """Run a round and write the bundle; return the report, what was written, and the time of both."""
    output, devices = plan.folder / f"{ledger.name}.ssdedge", len(plan_of(plan.folder)["classes"])
    began = time.monotonic()
    if engine == "flower":
        os.environ.setdefault("RAY_worker_niceness", "0")  # otherwise 15: they would wait for whatever else is running
        from flwr.simulation import run_simulation

        from exporters.fleet.flower import client_app, server_app

        settings = {"ledger": str(ledger), "output": str(output), "max-forgetting": 1.0, "nodes": devices}
        backend = {"init_args": {"num_cpus": 2}, "client_resources": {"num_cpus": 1, "num_gpus": 0.0}}
        server = server_app(plan.folder / "common.ssdedge", **settings, timeout=600)
        run_simulation(server, client_app(plan.answer), num_supernodes=devices, backend_config=backend)
        found: dict[str, Any] = files.read_json(ledger / "round-000001.json")
    else:
        gateway = Gateway(ledger, common(plan.folder))
        found = gateway.gather(_answers(plan, devices)).to_dict()
        gateway.issue(output, limits=ANY)
    return {"seconds": round(time.monotonic() - began, 1), "round": found, "bundle": str(output)}


def _answers(plan: Plan, devices: int) -> Iterator[Reply]:
    @dataclasses.dataclass
    class Node:
        node_config: dict[str, int]

    for device in range(devices):
        try:
            yield from plan.answer(Node({"partition-id": device}))
        except RuntimeError as error:
            yield Reply(f"camera-{device}", problem=str(error))


def one_device(plan: Plan) -> tuple[DeviceState, float]:
    """Return one device that was taught what the good devices were, one after the other, and the seconds."""
    state, began = _state(plan.folder), time.monotonic()
    registry, learner = state.registry, learners.restore(*learners.pack(state.learner), dim=state.bundle.dim)
    for device in range(len(plan_of(plan.folder)["classes"])):
        if plan.kind(device) in ("fail", "garbage"):
            continue
        names, vectors = lesson(plan.folder, device)
        for name in names:
            count = vectors.shape[1]
            registry = (
                registry.add(name, "device", count) if registry.row(name) is None else registry.taught(name, count)
            )
        rows = torch.tensor([registry.row_of(name) for name in names]).repeat_interleave(vectors.shape[1])
        learner.learn(learners.Task(torch.from_numpy(vectors.reshape(len(rows), -1)), rows))
    return state.replace(registry=registry, learner=learner), time.monotonic() - began


def compare(bundle: str, one: DeviceState, test: Tensor, labels: list[str]) -> dict[str, float]:
    """Return how far the scores of a bundle are from those of one device, and the accuracy of both."""
    fleet = DeviceState.of_bundle(bundles.read(bundle, allow_control_flow=True))
    order = [fleet.registry.row_of(name) for name in one.registry.names]
    assert len(order) == len(fleet.registry), "the classes differ"
    scores = [fleet.learner.scores(test)[:, order], one.learner.scores(test)[:, : len(order)]]
    answers = [np.array(one.registry.names)[part.argmax(1).numpy()] for part in scores]
    away = float((scores[0] - scores[1]).abs().max())
    return {
        "largest_score": float(scores[1].abs().max()),
        "largest_difference": away,
        "relative": away / float(scores[1].abs().max()),
        "same_answers": float((answers[0] == answers[1]).mean()),
        "accuracy_fleet": float((answers[0] == np.array(labels)).mean()),
        "accuracy_one": float((answers[1] == np.array(labels)).mean()),
        "images_equal": {e.name: e.images for e in fleet.registry.entries}
        == {e.name: e.images for e in one.registry.entries},
    }


def named(plan: Plan, found: dict[str, Any]) -> dict[str, bool]:
    """Return whether the report names every bad device, and only those."""
    kinds: dict[str, set[int]] = {"fail": set(), "twice": set(), "garbage": set()}
    for device in range(len(plan_of(plan.folder)["classes"])):
        if kind := plan.kind(device):
            kinds[kind].add(device)

    def devices(texts: Iterable[str]) -> set[int]:
        return {int(re.findall(r"camera-(\d+)", text)[-1]) for text in texts}

    failed = [f"{who} {reason}" for who, reason in found["failed"].items()]
    said = {"fail": failed, "twice": found["repeated"], "garbage": found["refused"]}
    return {kind: devices(texts) == kinds[kind] for kind, texts in said.items()}


def pairs(data: Any, images: int, most: int = 10) -> dict[str, float]:
    """Return which share of pairs of devices is held to differ: of one class, of another occasion, of two classes."""
    rng = np.random.default_rng(1)
    apart, parts, labels, other = [], [], [], []
    for label in range(len(data.classes)):
        own = rng.permutation(np.flatnonzero(data.train_labels == label))[: most * images]
        for positions in own[: len(own) // images * images].reshape(-1, images):
            vectors = data.train[positions].double()
            parts.append(vectors.mean(0))
            apart.append((vectors - parts[-1]).float())
            labels.append(label)
        later = rng.permutation(np.flatnonzero(data.test_labels == label))[:images]
        other.append(data.test[later].double().mean(0) if len(later) == images else None)
    around = torch.cat(apart)
    scatter, freedom = (around.T @ around).double(), float(len(parts) * (images - 1))
    means, label_of = torch.stack(parts), np.array(labels)
    devices = Means(means, torch.full((len(means),), float(images)).double())
    classes = [devices.of(np.flatnonzero(label_of == label)).pooled() for label in np.unique(label_of)]
    known = Means(torch.cat([one.vectors for one in classes]), torch.cat([one.counts for one in classes]))
    yardstick = Yardstick.of(scatter, freedom, known)
    assert yardstick is not None
    differ = yardstick.differ(devices, devices).numpy()
    first, second = np.triu_indices(len(label_of), 1)
    same = label_of[first] == label_of[second]
    seen = [label for label, mean in enumerate(other) if mean is not None]
    late = Means(torch.stack([other[label] for label in seen]), torch.full((len(seen),), float(images)).double())
    across = yardstick.differ(late, devices).numpy()
    own = np.array(seen)[:, None] == label_of[None]
    return {
        "images": images,
        "same": float(differ[first, second][same].mean()),
        "another_occasion": float(across[own].mean()),
        "different": float(differ[first, second][~same].mean()),
    }


def rounds(at: Path, data: Any, embedder: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Return the results of both rounds, which use a folder for their files."""
    results = {}
    chosen = make_plan(at, data, args.devices, args.classes, args.images)
    make_bundle(at, data, embedder, {"name": args.learner}, chosen)
    labels = [data.classes[label] for label in data.test_labels]
    for name in args.rounds:
        plan = Plan(at, name == "bad")
        found = gather(plan, at / name, args.engine)
        report = found.pop("round")
        one, seconds = one_device(plan)
        found |= {"one_device_seconds": round(seconds, 1), **compare(found.pop("bundle"), one, data.test, labels)}
        if name == "bad":
            found["named"] = named(plan, report)
        found |= {"bytes": report["bytes"], "counted": len(report["counted"]), "conflicts": len(report["conflicts"])}
        found |= {kind: len(report[kind]) for kind in ("failed", "repeated", "refused", "late")}
        found["devices"] = args.devices
        found["ledger_mb"] = round(sum(path.stat().st_size for path in (at / name).iterdir()) / 1e6, 1)
        found["state_bytes"] = one.learner.memory_bytes()
        results[name] = found
        print(json.dumps(found), flush=True)
    return results


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("data")
    parser.add_argument("--devices", type=int, default=1000)
    parser.add_argument("--images", type=int, default=20)
    parser.add_argument("--classes", type=int, default=2)
    parser.add_argument("--learner", default="slda")
    parser.add_argument("--backbone", default="tiny")
    parser.add_argument("--engine", choices=["flower", "loop"], default="flower")
    parser.add_argument("--rounds", nargs="+", choices=["good", "bad"], default=["good", "bad"])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    data, _, embedder = read(args.data, args.backbone, 0, 1)
    if not data.standardised:
        mu, sigma = map(torch.from_numpy, level_standardisation(data.train.numpy(), data.widths))
        data = dataclasses.replace(data, train=(data.train - mu) / sigma, test=(data.test - mu) / sigma)
    results: dict[str, Any] = {}
    if args.devices:
        with tempfile.TemporaryDirectory() as folder:
            results = rounds(Path(folder), data, embedder, args)
    typical = np.median(np.bincount(data.train_labels))
    results["names"] = [pairs(data, images) for images in (5, 10, 20) if 2 * images <= typical]
    verdicts = verdict(results) if args.devices else []
    for line, value, bar, met in verdicts:
        print(f"{'met   ' if met else 'MISSED'} {line:48} {value:>12} (bar {bar})")
    for row in results["names"]:
        print(
            f"held to differ with {row['images']:2} images: "
            + ", ".join(f"{k} {v:.1%}" for k, v in row.items() if k != "images")
        )
    if args.json:
        command = {key: str(value) for key, value in vars(args).items() if key not in ("data", "json")}
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        files.write_json(
            args.json,
            {
                "settings": {**command, "data": Path(args.data).name},
                **results,
                "peak_mb": peak,
                "environment": environment(),
            },
        )


def verdict(results: dict[str, Any]) -> list[tuple[str, str, str, bool]]:
    """Return what was measured beside what it should be."""
    rows: list[tuple[str, str, str, bool]] = []
    for name in set(results) & {"good", "bad"}:
        part = results[name]
        rows += [
            (
                f"{name}: scores, difference to one device",
                f"{part['largest_difference']:.1e}",
                f"{BAR['scores']:g}",
                part["largest_difference"] <= BAR["scores"],
            ),
            (f"{name}: same answers", f"{part['same_answers']:.2%}", "100%", part["same_answers"] == 1.0),
            (f"{name}: same numbers of images", str(part["images_equal"]), "True", part["images_equal"]),
            (f"{name}: seconds", f"{part['seconds']}", f"{BAR['seconds']:g}", part["seconds"] <= BAR["seconds"]),
            (
                f"{name}: most bytes a device sends",
                f"{part['bytes'][2]:,}",
                f"{BAR['bytes']:,.0f}",
                part["bytes"][2] <= BAR["bytes"],
            ),
        ]
    every = results.get("bad", {}).get("named", {})
    rows += [(f"bad: every one named: {kind}", str(met), "True", met) for kind, met in every.items()]
    return rows


if __name__ == "__main__":
    import fleet  # by name, under which the workers of the simulation find it

    fleet.main()
