"""Which precision a bundle gets: each step of the ladder is measured on images before it is taken.

A narrower graph gives other embeddings, and the learner was made with the old ones. So a precision is a claim that is
checked: on test images of the run where its data can still be read, and on synthetic ones.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from exporters import parity, precision
from ssd_edge import data, files, targets
from ssd_edge.backbones import onnx_file
from ssd_edge.errors import GateRefusedError, InputError, SSDEdgeError
from ssd_edge.learners import Learner
from ssd_edge.run.finished import FinishedRun
from ssd_edge.targets import Target

Say = Callable[[str], None]

AUTO = "auto"
SYNTHETIC_IMAGES = 32
TEST_IMAGES = 1024  # of 32 × 32 pixels; fewer of larger ones
MIN_TEST_IMAGES = 256
CALIBRATION_IMAGES = 256


@dataclasses.dataclass(frozen=True)
class Samples:
    """Images for the ladder.

    Attributes:
        judged: kind of images → uint8 ``(N, size, size, 3)``, and their learner rows ``(N,)`` where known.
        calibration: for int8, never among `judged`; or why there are none.
        source: where the calibration images come from, in words.
    """

    judged: dict[str, tuple[np.ndarray, np.ndarray | None]]
    calibration: np.ndarray | str
    source: str = ""


@dataclasses.dataclass(frozen=True)
class Choice:
    """The graph that passed.

    Attributes:
        onnx: its bytes.
        precision: of it.
        report: for the manifest, JSON values.
    """

    onnx: bytes
    precision: str
    report: dict[str, Any]


def samples(run: FinishedRun, folder: Path | None, say: Say) -> Samples:
    """Images to judge with and to calibrate with.

    Args:
        run: its test images judge; its training images calibrate, unless there is a folder.
        folder: of the user's calibration images; without the run's data every fourth of them judges.
        say: told when the run's data cannot be read any more.

    Raises:
        InputError: the folder has too few images that can be read.
    """
    size = run.backbone["size"]
    judged: dict[str, tuple[np.ndarray, np.ndarray | None]] = {"synthetic": (synthetic(size), None)}
    calibration: np.ndarray | str
    try:
        dataset = data.load(run.config.data, run.config.run.seed)
        if dataset.fingerprint != run.record.get("identity", {}).get("data"):
            raise InputError(f"{dataset.name} has changed since the run")
        rows = np.array([run.registry.row(name) for name in dataset.classes])
        count = max(MIN_TEST_IMAGES, min(TEST_IMAGES, TEST_IMAGES * 32**2 // size**2))
        chosen = _spread(len(dataset.test), count)
        judged["test"] = dataset.test.load(chosen, size), rows[dataset.test_labels[chosen]]
        calibration = dataset.train.load(_spread(len(dataset.train), CALIBRATION_IMAGES), size)
        source = "training images of the run"
    except SSDEdgeError as error:
        say(f"parity on synthetic images only: the run's data cannot be used ({error})")
        calibration, source = f"the run's data cannot be used ({error})", ""
    if folder is not None:
        brought = precision.calibration_images(folder, size, CALIBRATION_IMAGES)
        source = "a folder of the user"
        if "test" in judged:
            calibration = brought
        else:
            held_out = np.arange(len(brought)) % 4 == 0
            judged["brought"], calibration = (brought[held_out], None), brought[~held_out]
    return Samples(judged, calibration, source)


def choose(
    onnx: bytes,
    reference: parity.Reference,
    learner: Learner | None,
    images: Samples,
    target: Target,
    wanted: str,
    say: Say,
) -> Choice:
    """The graph in the wanted precision, if it computes what the run computed.

    Args:
        onnx: as it was exported, or brought by the user: then it may be narrow already, and stays as it is.
        reference: the embeddings that the run was made with.
        learner: of the run; None: its decisions are not compared.
        images: of `samples`.
        target: that it is for.
        wanted: `AUTO` for the fastest precision that passes, or the name of one; empty: the target's default.
        say: told the figures.

    Raises:
        InputError: the target does not run that precision, or int8 without images.
        GateRefusedError: it does not pass; names what does.
    """
    ladder = _Ladder(onnx, reference, learner, images, say)
    native = onnx_file.precision(onnx)
    if native != precision.FP32.name:
        if wanted not in ("", AUTO, native):
            raise InputError(f"the backbone is {native} itself and cannot be made {wanted}; leave --precision out")
        return ladder.step(native)
    if wanted != AUTO:
        wanted = wanted or target.default_precision
        targets.check_precision(target, wanted)
        try:
            return ladder.step(wanted)
        except GateRefusedError as error:
            others = [name for name in target.precisions if name != wanted]
            passing = [name for name in others if ladder.passes(name)]
            advice = f"--precision {passing[0]} would pass" if passing else "no other precision passes"
            raise GateRefusedError(f"{error}; {advice}; nothing was written") from error
    refused = {}
    for name in target.precisions:
        try:
            choice = ladder.step(name)
        except (GateRefusedError, InputError) as error:
            refused[name] = str(error)
            say(f"{name}: refused: {error}")
        else:
            return dataclasses.replace(choice, report={**choice.report, "refused": refused})
    raise GateRefusedError(f"no precision passes: {refused[target.precisions[-1]]}; nothing was written")


class _Ladder:
    """The steps, each measured on the same images; the reference is computed once."""

    def __init__(
        self, onnx: bytes, reference: parity.Reference, learner: Learner | None, images: Samples, say: Say
    ) -> None:
        self.onnx, self.learner, self.images, self.say = onnx, learner, images, say
        self.wanted = {kind: reference(pixels) for kind, (pixels, _) in images.judged.items()}
        self.sound = False  # whether the graph as it came has passed

    def step(self, name: str) -> Choice:
        """One precision, or why not; raises like `choose`."""
        native = onnx_file.precision(self.onnx)
        if name != native and not self.sound:
            # a mistake of the export that is smaller than the rounding of int8 would not be seen there
            self.step(precision.FP32.name)
        calibration = self.images.calibration if precision.get(name).calibrated else None
        if isinstance(calibration, str) and name != native:
            raise InputError(
                f"{name} needs images to calibrate with, but {calibration}; name some: --calibration FOLDER"
            )
        graph = precision.convert(self.onnx, name, calibration if isinstance(calibration, np.ndarray) else None)
        report: dict[str, Any] = {"precision": name}
        if isinstance(calibration, np.ndarray):
            report["calibration"] = {
                "images": len(calibration),
                "sha256": files.sha256(calibration.tobytes()),
                "source": self.images.source,
            }
        problems: list[str] = []
        for kind, (pixels, rows) in self.images.judged.items():
            embeddings = self.wanted[kind]
            measured = parity.measure(graph, lambda _, known=embeddings: known, pixels, self.learner, rows)
            report[kind] = measured
            # Rounding weighs more on noise than on photographs, which it says little about where there are some.
            if kind != "synthetic" or name == precision.FP32.name or len(self.images.judged) == 1:
                problems += [f"{problem} on {kind} images" for problem in parity.failures(measured, name)]
            self.say(f"{name} on {measured['images']} {kind} images: {_told(measured)}")
        if problems:
            raise GateRefusedError(f"the backbone in {name} does not compute what the run computed: {problems[0]}")
        self.sound = True
        return Choice(graph, name, report)

    def passes(self, name: str) -> bool:
        """Whether `step` would return."""
        try:
            self.step(name)
        except (GateRefusedError, InputError):
            return False
        return True


def _told(measured: dict[str, Any]) -> str:
    words = [f"cosine {measured['min_cosine']:.6f}", f"largest difference {measured['max_difference']:.1e} σ"]
    if "agreement" in measured:
        words.append(f"{measured['agreement']:.1%} of the decisions agree")
    if accuracy := measured.get("accuracy"):
        words.append(f"accuracy {accuracy['reference']:.3f} → {accuracy['exported']:.3f}")
    return ", ".join(words)


def synthetic(size: int, count: int = SYNTHETIC_IMAGES) -> np.ndarray:
    """Seeded noise, half of it in coarse patches: uint8 ``(count, size, size, 3)``."""
    generator = np.random.default_rng(0)
    half = count // 2
    fine = generator.integers(0, 256, (half, size, size, 3), dtype=np.uint8)
    patches = generator.integers(0, 256, (count - half, 4, 4, 3), dtype=np.uint8)
    index = np.arange(size) * 4 // size
    return np.concatenate([fine, patches[:, index][:, :, index]])


def _spread(length: int, count: int) -> np.ndarray:
    """At most `count` of `length` positions, evenly spread."""
    return np.linspace(0, length - 1, min(count, length)).astype(np.int64)
