"""Export a finished run and pack it into a bundle (`ssd-edge deploy`).

Nothing is trained or tuned here. The learner's state is copied from the run; the backbone is exported and must compute
what it computed in the run (see `ladder`), otherwise nothing is written.
"""

from __future__ import annotations

import calendar
import dataclasses
import importlib.util
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from device_runtime.learning.state import DeviceState
from device_runtime.machine import profile
from exporters import ladder, precision
from exporters.export import export_package
from exporters.head import export_head
from exporters.parity import Reference
from ssd_edge import bundle, files, learners, ort, targets
from ssd_edge.backbones import names, onnx_file
from ssd_edge.backbones import package as packages
from ssd_edge.backbones.embedder import open_backbone
from ssd_edge.backbones.onnx import compose, open_session, run
from ssd_edge.bundle import card
from ssd_edge.errors import GateRefusedError, InputError, require
from ssd_edge.learners.priors import Priors
from ssd_edge.run import finished
from ssd_edge.run.finished import FinishedRun
from ssd_edge.system import VERSION
from ssd_edge.targets import Target

Log = Callable[[str], None]

PROBE_BYTES = 2**19  # of pixels: 170 images of 32 × 32 or 3 of 224 × 224
PROBE_IMAGES = 8
PROBE_MARGIN = 2.0


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of `deploy`.

    Attributes:
        target: Name or alias of a target.
        precision: Name of a precision, or ``auto``. Empty: the target's default.
        calibration: Folder of images for int8. None: the run's training images.
        head: If True, add the learner to the bundle as ``head.onnx``, for hosts that only predict.
        sign: File of a private key.
        empty: If True, leave out everything that was learned; every class is taught on the device.
        release: Release number, compared by devices. None: the finish time of the run, in seconds since 1970.
    """

    target: str
    precision: str = ""
    calibration: Path | None = None
    head: bool = False
    sign: Path | None = None
    empty: bool = False
    release: int | None = None


@dataclasses.dataclass(frozen=True)
class DeployResult:
    """A written bundle.

    Attributes:
        bundle: Its path.
        bytes: Its size.
        sha256: Its digest.
        precision: Precision of the backbone.
        parity: Report of the parity check, as in the manifest.
        target: Name of the target.
        classes: Class names by row.
        release: Release number.
        signed_by: Id of the key, or None.
        tensorrt: What TensorRT's parser reported, or None if it was not asked.
        seconds: Duration.
    """

    bundle: str
    bytes: int
    sha256: str
    precision: str
    parity: dict[str, Any]
    target: str
    classes: list[str]
    release: int
    signed_by: str | None
    tensorrt: dict[str, Any] | None
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON object of ``ssd-edge deploy --json``."""
        return dataclasses.asdict(self)


def deploy(folder: Path, options: Options, output: Path, log: Log) -> DeployResult:
    """Write the bundle of a run.

    The same run and options give the same bytes, given the same package versions and as long as the run's data can be
    read.

    Args:
        folder: Folder of the run.
        options: Options of the export.
        output: File to write; an existing one is replaced. Its stem becomes the name of the bundle.
        log: Receives progress messages.

    Raises:
        InputError: The folder is not a finished run, its backbone has changed or is missing, the target does not
            support the options, or the output folder does not exist.
        BundleRefusedError: A file of the run is damaged.
        GateRefusedError: The exported backbone does not compute what the run computed, or TensorRT rejects it.
    """
    began = time.monotonic()
    folder, output = Path(folder), Path(output)
    target = targets.get(options.target)
    _check_options(options, target)
    if not files.is_folder(output.absolute().parent):
        raise InputError(f"the folder of {output} does not exist; create it first")
    files.check_output(output)
    sign = None
    if options.sign is not None:
        from ssd_edge.bundle import signing

        sign = signing.signer(options.sign)
    state = finished.read(folder)
    head = export_head(state.learner, state.registry.names) if options.head else None  # before minutes of work
    images = ladder.samples(state, options.calibration, log)
    log(f"exporting the backbone {state.backbone['identity']}")
    exported, reference, priors = _export(state)
    if options.empty:
        state = finished.emptied(state, priors)
    targets.check_opset(target, onnx_file.opset(exported))
    learner = None if options.empty else state.learner
    choice = ladder.choose(exported, reference, learner, images, target, options.precision, log)
    checked = _check_tensorrt(choice.onnx, "backbone", target, log)
    if head is not None:
        _check_tensorrt(head, "head", target, log)
    manifest = _manifest(state, choice, target, options.release, output.stem[: bundle.MAX_TITLE_LENGTH])
    roles = {
        **state.states,
        "backbone": choice.onnx,
        "classes": files.json_bytes(state.registry.to_json()),
        "probe": _probe(state, choice),
        "card": card.render(manifest, state.registry).encode(),
    }
    if head is not None:
        roles["head"] = head
    # control flow was allowed in the configuration, or refused before
    whole = bundle.parse(_packed(manifest, roles, None), allow_control_flow=True)
    roles["answers"] = DeviceState.of_bundle(whole).head().to_bytes()
    packed = _packed(manifest, roles, sign)
    opened = bundle.parse(packed, allow_control_flow=True)
    _check_memory(opened, target, log)
    bundle.write(output, packed)
    return DeployResult(
        bundle=str(output),
        bytes=len(packed),
        sha256=files.sha256(packed),
        precision=choice.precision,
        parity=choice.report,
        target=target.name,
        classes=state.registry.names,
        release=manifest["release"],
        signed_by=opened.signature.key if opened.signature else None,
        tensorrt=checked,
        seconds=round(time.monotonic() - began, 2),
    )


def _packed(manifest: dict[str, Any], roles: dict[str, bytes], sign: Callable[[bytes], bytes] | None) -> bytes:
    return bundle.pack(manifest, {bundle.ROLES[role]: (role, content) for role, content in roles.items()}, sign)


def _check_options(options: Options, target: Target) -> None:
    """Check the options before anything is exported."""
    known = [ladder.AUTO, *precision.names()]
    if options.precision not in ("", *known):
        raise InputError(f"unknown precision '{options.precision}'; known: {', '.join(known)}")
    wanted = options.precision or target.default_precision
    if wanted != ladder.AUTO:
        targets.check_precision(target, wanted)
        calibrated = " or ".join(each.name for each in precision.PRECISIONS if each.calibrated)
        if options.calibration is not None and not precision.get(wanted).calibrated:
            raise InputError(
                f"--calibration is for {calibrated}, but the precision is {wanted}; add --precision {calibrated} or "
                f"{ladder.AUTO}"
            )
    if options.head and options.empty:
        raise InputError("--head is a learner that only predicts, but --classes none leaves it untrained; drop one")
    if options.release is not None and options.release < 0:
        raise InputError(f"--release must be 0 or more, but is {options.release}")


def _export(state: FinishedRun) -> tuple[bytes, Reference, Priors]:
    """Return the exported graph, the embeddings it must reproduce, and the priors of the backbone."""
    config = state.config.backbone
    own = open_backbone(config, torch.device("cpu"), state.folder)
    if own.identity != (stated := state.backbone["identity"]):
        raise InputError(
            f"the backbone {config.name} is {own.identity}, but {state.folder} was made with {stated}; restore that "
            "backbone, or train again"
        )
    if own.graph is None:
        package = packages.load(names.package_folder(config))
        return export_package(package), own.embed, own.priors
    mu, sigma = state.standardisation(own.dim)
    graph = own.graph
    # not apart: opening it has tried the same graph
    onnx = compose(
        graph.model,
        graph.pixels,
        graph.mean,
        graph.std,
        graph.layout,
        mu,
        sigma,
        name=own.identity,
        allow_control_flow=graph.allow_control_flow,
        levels=graph.levels,
    )
    return onnx, lambda images: (own.embed(images) - mu) / sigma, own.priors


def _check_tensorrt(onnx: bytes, what: str, target: Target, log: Log) -> dict[str, Any] | None:
    """Build an engine with TensorRT-RTX if it is installed, as the device will; this needs no GPU."""
    if target.tensorrt is None:
        return None
    if importlib.util.find_spec("tensorrt_rtx") is None:
        log("not checked with TensorRT's parser (on x86-64 Linux: pip install tensorrt-rtx)")
        return None
    from device_runtime.backbone.tensorrt.engines import check_graph

    checked = check_graph(onnx)
    size = f"{checked.layers} layers, {checked.bytes / 1e6:.1f} MB"
    log(f"TensorRT-RTX {checked.version} accepts the {what}: {size}")
    return checked.to_dict()


def _check_memory(opened: bundle.Bundle, target: Target, log: Log) -> None:
    """Refuse a bundle that is far too large for the board; near the limit, the rough estimate only gives a warning."""
    needed = profile.estimate(opened).total
    if needed > target.memory_mb:
        raise InputError(
            f"learning on the device would take roughly {needed:,.0f} MiB, but the smallest {target.name} has "
            f"{target.memory_mb:,}; choose a smaller learner (learner.directions, learner.neurons) or backbone, or "
            "a larger board"
        )
    if needed > target.budget_mb:
        log(
            f"warning: learning on the device takes roughly {needed:,.0f} MiB, over half of the "
            f"{target.memory_mb:,} MiB of the smallest {target.name}; measure it: ssd-edge profile"
        )


def _probe(state: FinishedRun, choice: ladder.Choice) -> bytes:
    """Return synthetic images with the embeddings that they must have on the device, and the limits."""
    size = state.pixels.size
    count = max(2, min(PROBE_IMAGES, PROBE_BYTES // (3 * size**2)))
    images = ladder.synthetic(size, 2 * count)[count:]  # coarse patches: closer to photographs than noise
    embeddings = run(open_session(choice.onnx), images)
    if not np.isfinite(embeddings).all():
        raise GateRefusedError("the exported backbone gives NaN or infinity for synthetic images; try --precision fp32")
    rows = np.full(len(images), -1)
    if len(state.registry):
        rows = state.learner.predict(torch.from_numpy(embeddings)).numpy()
    return files.tensor_bytes({"images": images, "embeddings": embeddings, "rows": rows}, _probe_limits(choice))


def _probe_limits(choice: ladder.Choice) -> dict[str, float]:
    """Return the limits for another machine: those of the precision, widened by its measured rounding."""
    allowed, measured = precision.get(choice.precision).limits, choice.report["synthetic"]
    return {
        "min_cosine": max(0.0, min(allowed.min_cosine, 1 - PROBE_MARGIN * (1 - measured["min_cosine"]))),
        "max_difference": max(allowed.max_difference, PROBE_MARGIN * measured["max_difference"]),
    }


def _manifest(
    state: FinishedRun, choice: ladder.Choice, target: Target, release: int | None, name: str
) -> dict[str, Any]:
    record, metrics, backbone = state.record, state.metrics, state.backbone
    finish = calendar.timegm(time.strptime(record["finished"], finished.TIME))
    _, learner = learners.pack(state.learner)
    packages = {name: require(name, "export", "export a backbone") for name in ("torch", "onnx", "onnxscript")}
    packages["onnxruntime"] = ort.load("export", "export a backbone")
    return {
        "name": name,
        "created": record["finished"],
        "release": finish if release is None else release,
        "target": target.name,
        "producer": {
            "ssd_edge": VERSION,
            "git": record.get("git_sha") or "unknown",
            "packages": {name: package.__version__ for name, package in packages.items()},
        },
        "backbone": {
            "file": bundle.ROLES["backbone"],
            "sha256": files.sha256(choice.onnx),
            **state.pixels.to_dict(),
            "dim": backbone["dim"],
            "precision": choice.precision,
            "opset": onnx_file.opset(choice.onnx),
            "id": backbone["identity"],
            "provenance": backbone["provenance"],
        },
        "learner": {"name": learner["learner"], "settings": learner["settings"]},
        "classes": state.registry.names,
        "metrics": {}
        if not len(state.registry)  # the metrics are those of the learner that was left out
        else {
            **{key: metrics[key] for key in finished.METRICS},
            "tasks": len(metrics["tasks"]),
            "baselines": {other: values["average_accuracy"] for other, values in metrics["baselines"].items()},
        },
        "parity": choice.report,
        "run": {key: record[key] for key in finished.RECORD},
    }
