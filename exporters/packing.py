"""`ssd-edge deploy`: a finished run → one bundle.

Nothing is trained or tuned here. The learner's state goes into the bundle as the run wrote it; the backbone
is exported and must compute what it computed in the run (`parity`), or nothing is written.
"""

from __future__ import annotations

import dataclasses
import shlex
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from exporters import card
from exporters.onnx_export import export_package
from exporters.parity import Reference, parity
from ssd_edge import __version__, bundle, data, files, learners, runs, targets
from ssd_edge.backbones import onnx_file
from ssd_edge.backbones import package as packages
from ssd_edge.backbones.embedder import TorchEmbedder
from ssd_edge.backbones.onnx import OnnxEmbedder, compose
from ssd_edge.classes import ClassRegistry
from ssd_edge.config import TrainConfig
from ssd_edge.errors import BundleRefusedError, InputError, SSDEdgeError, require
from ssd_edge.learners.base import TensorSpec, check_state

Say = Callable[[str], None]

SYNTHETIC_IMAGES = 32
TEST_IMAGES = 256
# What is taken from each file of a run, with its type.
_BACKBONE = {"kind": str, "path": str, "identity": str, "size": int, "dim": int, "provenance": dict}
_RECORD = {"argv": list, "seed": int, "threads": int, "machine": str, "versions": dict}
_METRICS = {
    "data": str,
    "split": str,
    "train_images": int,
    "test_images": int,
    "class_accuracy": dict,
    "average_accuracy": float,
    "average_incremental_accuracy": float,
    "backward_transfer": float,
    "forgetting": float,
    "panel": dict,
}


@dataclasses.dataclass(frozen=True)
class _Run:
    """A finished run, read and checked."""

    folder: Path
    config: TrainConfig
    record: dict[str, Any]  # run.json
    metrics: dict[str, Any]
    backbone: dict[str, Any]
    registry: ClassRegistry
    learner: learners.Learner
    states: dict[str, bytes]  # role in the bundle -> file as the run wrote it


def deploy(run: Path, target: str, output: Path, say: Say) -> dict[str, Any]:
    """Write the bundle of a run.

    The same run gives the same bytes again, with the same packages and as long as its data can be read.

    Args:
        run: its folder.
        target: one of `targets.targets`, or an alias.
        output: the file to write; an older one is replaced. Its name becomes the name of the bundle.
        say: told what happens and what to do next.

    Returns:
        ``bundle`` (path), ``bytes``, ``sha256``, ``parity``, ``target``, ``classes``, ``seconds``.

    Raises:
        InputError: not a run, not finished, its backbone has changed or is gone, unknown target, no such folder.
        BundleRefusedError: a file of the run is damaged.
        GateRefusedError: the exported backbone does not compute what the run computed.
    """
    began = time.monotonic()
    run, output = Path(run), Path(output)
    target = targets.get(target).name
    if not output.absolute().parent.is_dir():
        raise InputError(f"the folder of {output} does not exist; create it first")
    if output.is_dir():
        raise InputError(f"{output} is a folder, but a file is needed, e.g. {output / 'robot.ssdedge'}")
    state = _read(run)
    say(f"exporting the backbone {state.backbone['identity']}")
    onnx, reference = _export(state)
    measured = _parity(state, onnx, reference, say)
    manifest = _manifest(state, onnx, measured, target, output.stem[: bundle.MAX_TITLE_LENGTH])
    roles = {
        **state.states,
        "backbone": onnx,
        "classes": files.json_bytes(state.registry.to_json()),
        "card": card.render(manifest, state.registry).encode(),
    }
    packed = bundle.pack(manifest, {bundle.ROLES[role]: (role, content) for role, content in roles.items()})
    bundle.write(output, packed)
    say(f"next, on the device: ssd-edge device install {shlex.quote(output.name)}")
    return {
        "bundle": str(output),
        "bytes": len(packed),
        "sha256": files.sha256(packed),
        "parity": measured,
        "target": target,
        "classes": state.registry.names,
        "seconds": round(time.monotonic() - began, 2),
    }


def _read(folder: Path) -> _Run:
    config = runs.open_folder(folder)
    record = _read_object(folder / "run.json", {"status": str})
    if record["status"] != "finished":
        raise InputError(
            f"{folder} is not finished; take it up again with: ssd-edge train --resume {shlex.quote(str(folder))}"
        )
    needed = ("metrics.json", "backbone.json", "classes.json", "learner.safetensors", "statistics.safetensors")
    missing = [name for name in needed if not (folder / name).is_file()]
    if missing:
        raise InputError(f"{folder} is not a complete run: {', '.join(missing)} missing; restore or train again")
    roles = [role for role in ("learner", "statistics", "top_n") if (folder / bundle.ROLES[role]).is_file()]
    states = {role: files.read_bytes(folder / bundle.ROLES[role]) for role in roles}
    state = _Run(
        folder=folder,
        config=config,
        record=_read_object(folder / "run.json", {**_RECORD, "finished": str}),
        metrics=_read_object(folder / "metrics.json", {**_METRICS, "baselines": dict, "tasks": list}),
        backbone=_read_object(folder / "backbone.json", _BACKBONE),
        registry=ClassRegistry.from_json(files.read_json(folder / "classes.json")),
        learner=learners.restore(*files.parse_tensors(states["learner"], str(folder / "learner.safetensors"))),
        states=states,
    )
    _check_together(state)
    return state


def _read_object(path: Path, kinds: dict[str, type]) -> dict[str, Any]:
    """A JSON object that has these keys.

    Raises:
        BundleRefusedError: it has not; numbers may be whole where a float is wanted.
    """
    value = files.read_json(path)
    for key, kind in kinds.items():
        found = value.get(key) if isinstance(value, dict) else None
        if not isinstance(found, (int, float) if kind is float else kind):
            raise BundleRefusedError(f"{path} is damaged: '{key}' is {found!r}, not {kind.__name__}; restore it")
    return value


def _check_together(state: _Run) -> None:
    """Learner, statistics, classes and backbone are of one run."""
    classes, dim, learner = len(state.registry), state.backbone["dim"], state.learner
    if (len(learner.seen), learner.dim) != (classes, dim):
        raise BundleRefusedError(
            f"{state.folder}: the learner has {len(learner.seen)} classes and embeddings of {learner.dim}, but "
            f"classes.json and backbone.json say {classes} and {dim}; restore the files of one run"
        )
    if learners.top_n_table(learner) is not None and "top_n" not in state.states:
        raise InputError(f"{state.folder} is not a complete run: top_n.safetensors missing; restore or train again")
    path = state.folder / "statistics.safetensors"
    arrays, _ = files.parse_tensors(state.states["statistics"], str(path))
    schema = {
        "counts": TensorSpec(("C",), "float64", "samples of each class"),
        "sums": TensorSpec(("C", "D"), "float64", "sum of the embeddings of each class"),
        "second": TensorSpec((dim * (dim + 1) // 2,), "float64", "second moments, upper triangle"),
    }
    _check_arrays(arrays, schema, {"C": classes, "D": dim}, path)


def _check_arrays(
    arrays: dict[str, np.ndarray], schema: dict[str, TensorSpec], bound: dict[str, int], path: Path
) -> None:
    check_state({name: torch.from_numpy(array) for name, array in arrays.items()}, schema, bound, str(path))


def _export(state: _Run) -> tuple[bytes, Reference]:
    """The graph for the bundle, and the embeddings that it must give."""
    config = state.config.backbone
    if state.backbone["kind"] == "onnx":
        own = OnnxEmbedder(config)
        _check_identity(state, own.identity)
        path = state.folder / "standardisation.safetensors"
        arrays, _ = files.read_tensors(path)
        schema = {name: TensorSpec(("D",), "float32", "of the features of the first task") for name in ("mu", "sigma")}
        _check_arrays(arrays, schema, {"D": own.dim}, path)
        mu, sigma = arrays["mu"], arrays["sigma"]
        original = onnx_file.read(config.onnx)
        onnx = compose(original, config.size, config.mean, config.std, config.layout, mu, sigma)
        return onnx, lambda images: (own.embed(images) - mu) / sigma
    package = packages.load(Path(config.path) if config.path else None)
    _check_identity(state, package.identity)
    return export_package(package), TorchEmbedder(package, torch.device("cpu")).embed


def _check_identity(state: _Run, found: str) -> None:
    stated = state.backbone["identity"]
    if found != stated:
        path = state.backbone["path"] or "that ships with SSD-Edge"
        raise InputError(
            f"the backbone {path} is {found}, but {state.folder} was made with {stated}; "
            "restore that backbone, or train again"
        )


def _parity(state: _Run, onnx: bytes, reference: Reference, say: Say) -> dict[str, Any]:
    """Parity on synthetic images, and on test images of the run where its data can still be read."""
    size, learner = state.backbone["size"], state.learner
    measured = {"synthetic": parity(onnx, reference, _synthetic(size), learner)}
    try:
        images, rows = _test_images(state, size)
    except InputError as error:
        say(f"parity on synthetic images only: {error}")
    else:
        measured["test"] = parity(onnx, reference, images, learner, rows)
    for kind, values in measured.items():
        say(
            f"parity on {values['images']} {kind} images: largest difference {values['max_difference']:.1e} σ, "
            f"{values['agreement']:.1%} of the decisions agree"
        )
    return measured


def _synthetic(size: int) -> np.ndarray:
    """Seeded noise, half of it in coarse patches: ``(32, size, size, 3)``."""
    generator = np.random.default_rng(0)
    half = SYNTHETIC_IMAGES // 2
    fine = generator.integers(0, 256, (half, size, size, 3), dtype=np.uint8)
    patches = generator.integers(0, 256, (half, 4, 4, 3), dtype=np.uint8)
    index = np.arange(size) * 4 // size
    return np.concatenate([fine, patches[:, index][:, :, index]])


def _test_images(state: _Run, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Some test images, evenly spread over all, and their learner rows.

    Raises:
        InputError: the data cannot be read any more, or is not that of the run.
    """
    try:
        dataset = data.load(state.config.data, state.config.run.seed)
        if dataset.fingerprint != state.record.get("identity", {}).get("data"):
            raise InputError(f"{dataset.name} has changed since the run")
        chosen = np.linspace(0, len(dataset.test) - 1, min(TEST_IMAGES, len(dataset.test))).astype(np.int64)
        images = dataset.test.load(chosen, size)
    except SSDEdgeError as error:
        raise InputError(f"the run's data cannot be used ({error})") from error
    rows = np.array([state.registry.row(name) for name in dataset.classes])
    return images, rows[dataset.test_labels[chosen]]


def _manifest(state: _Run, onnx: bytes, measured: dict[str, Any], target: str, name: str) -> dict[str, Any]:
    record, metrics, backbone = state.record, state.metrics, state.backbone
    _, learner = learners.pack(state.learner)
    exported_with = ("torch", "onnx", "onnxscript", "onnxruntime")
    return {
        "name": name,
        "created": record["finished"],
        "producer": {
            "ssd_edge": __version__,
            "git": record.get("git_sha") or "unknown",
            "packages": {m: require(m, "export", "export a backbone").__version__ for m in exported_with},
        },
        "backbone": {
            "file": bundle.ROLES["backbone"],
            "sha256": files.sha256(onnx),
            "size": backbone["size"],
            "dim": backbone["dim"],
            "precision": onnx_file.precision(onnx),
            "id": backbone["identity"],
            "provenance": backbone["provenance"],
        },
        "learner": {"name": learner["learner"], "settings": learner["settings"]},
        "classes": state.registry.names,
        "metrics": {
            **{key: metrics[key] for key in _METRICS},
            "tasks": len(metrics["tasks"]),
            "baselines": {other: values["average_accuracy"] for other, values in metrics["baselines"].items()},
        },
        "parity": measured,
        "target": target,
        "run": {key: record[key] for key in _RECORD},
    }
