"""Teachers of `ssd-edge distill`: backbones by name, and finished runs, whose learners add class scores.

Several runs of the same classes are an ensemble: their probabilities are averaged. A specialist is a run of some of
these classes, easily confused ones. It says how the probability of its classes together is distributed among them; how
much that is, and the rest, is the generalist's. Of all distributions that agree with the specialist within its classes,
this one diverges least from the generalist's (as section 5 of Hinton, Vinyals & Dean 2015, without a dustbin class).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ssd_edge import files
from ssd_edge.backbones import names
from ssd_edge.backbones.distilled import Answers
from ssd_edge.backbones.embedder import Embedder, level_standardisation, open_backbone
from ssd_edge.config import BackboneConfig
from ssd_edge.data import Images, cache
from ssd_edge.errors import InputError
from ssd_edge.images import check_embedded
from ssd_edge.learners.retention import TrackRecord, scores_of
from ssd_edge.report import events
from ssd_edge.report.events import Listener, Message
from ssd_edge.run import finished
from ssd_edge.run.evaluate import open_embedder, standardise
from ssd_edge.run.finished import FinishedRun

BATCH = 256
LEAST = -1e4  # of a logarithm in float16: a probability of zero


@dataclasses.dataclass(frozen=True)
class Opinion:
    """Answers of a run to photographs and their mirror images.

    Attributes:
        classes: Names of its classes.
        logarithms: Of their probabilities, float64 ``(2, N, C)``.
    """

    classes: Sequence[str]
    logarithms: np.ndarray


def ask(
    teachers: Sequence[str],
    specialists: Sequence[str],
    photographs: Images,
    device: torch.device,
    listener: Listener,
    use_cache: bool = True,
) -> Answers:
    """Return what teachers say about photographs and their mirror images.

    Args:
        teachers: Names of backbones, and folders of runs.
        specialists: Folders of runs of some of the classes of the runs among the teachers.
        photographs: Images.
        device: Where packages run; graphs run on the CPU.
        listener: Receives progress events.
        use_cache: Keep the features of each backbone for the next time.

    Raises:
        InputError: A teacher is unknown, or the classes of the runs do not fit together.
        BundleRefusedError: A run or a package is damaged.
        EnvironmentUnfitError: A package is missing, or a download fails.
    """
    opened = [_open(name, device, listener) for name in teachers]
    experts = [_open_run(name) for name in specialists]
    generalists = [run for _, run in opened if run is not None]
    check_classes(_classes_by_folder(generalists), _classes_by_folder([run for _, run in experts]))
    asked: dict[str, np.ndarray] = {}
    standard: dict[str, np.ndarray] = {}
    opinions: tuple[list[Opinion], list[Opinion]] = [], []
    for number, ((embedder, run), name) in enumerate(zip([*opened, *experts], [*teachers, *specialists], strict=True)):
        key, special = embedder.identity, number >= len(opened)
        if key not in asked:
            asked[key] = _features(embedder, name, photographs, listener, use_cache)
        if run is not None:
            opinions[special].append(Opinion(_classes(run), _log_probabilities(run, embedder, asked[key])))
        if not special:
            mu, sigma = level_standardisation(asked[key][0], embedder.widths)
            standard[key] = ((asked[key] - mu) / sigma).astype(np.float16)
    scores = combined(*opinions) if generalists else None
    cards = [_card(name, *each) for name, each in zip([*teachers, *specialists], [*opened, *experts], strict=True)]
    return Answers(tuple(standard.values()), scores, tuple(cards))


def _classes(run: FinishedRun) -> tuple[str, ...]:
    return tuple(entry.name for entry in run.registry.entries)


def _classes_by_folder(runs: Sequence[FinishedRun]) -> dict[str, Sequence[str]]:
    return {str(run.folder): _classes(run) for run in runs}


def _open(name: str, device: torch.device, listener: Listener) -> tuple[Embedder, FinishedRun | None]:
    """Open a teacher; a folder is a run."""
    if files.is_folder(Path(name)):
        return _open_run(name)
    return open_backbone(BackboneConfig(name), device, say=lambda text: listener(Message(text))), None


def _open_run(name: str) -> tuple[Embedder, FinishedRun]:
    run = finished.read(Path(name))
    return open_embedder(run.folder, run.config), run


def check_classes(generalists: Mapping[str, Sequence[str]], specialists: Mapping[str, Sequence[str]]) -> None:
    """Check that all generalists have the same classes, and each specialist at least two of them.

    Args:
        generalists: Names of the classes of each run, by its folder.
        specialists: As well.

    Raises:
        InputError: They do not, or there are specialists alone.
    """
    if not generalists:
        if specialists:
            raise InputError(
                "a specialist tells classes apart that a generalist confuses, but no teacher has classes; add a run of "
                "all classes: --teacher RUN"
            )
        return
    (first, own), *others = generalists.items()
    for folder, classes in others:
        if differing := sorted(set(classes) ^ set(own)):
            raise InputError(
                f"{first} and {folder} differ in their classes ({', '.join(differing[:5])}), so their scores cannot be "
                "averaged; give a run of some of the classes as --specialist"
            )
    for folder, classes in specialists.items():
        if unknown := sorted(set(classes) - set(own)):
            raise InputError(
                f"the specialist {folder} has classes that {first} did not learn: {', '.join(unknown[:5])}; train it "
                "on some of the generalist's classes"
            )
        if len(classes) < 2:
            raise InputError(f"the specialist {folder} has one class, but tells classes apart; leave it out")


def _features(embedder: Embedder, name: str, photographs: Images, listener: Listener, use_cache: bool) -> np.ndarray:
    """Return the raw features of photographs and their mirror images, float32 ``(2, N, D)``."""

    def compute() -> dict[str, np.ndarray]:
        total, parts = len(photographs), []
        listener(Message(f"asking {name} about {total:,} photographs and their mirror images"))
        with events.progress(listener, "asking") as update:
            for pixels in photographs.batches(embedder.pixels, BATCH):
                mirrored = np.ascontiguousarray(pixels[:, :, ::-1])
                parts.append(np.stack([embedder.embed(pixels), embedder.embed(mirrored)]))
                done = sum(part.shape[1] for part in parts)
                update(0, done / total, f"{done:,} photographs")
        found = np.concatenate(parts, axis=1)
        for view in found:
            check_embedded(view, photographs.names)
        return {"features": found}

    key = {"teacher": embedder.identity, "photographs": photographs.digest().hex(), "torch": torch.__version__}
    return cache.embeddings(key, compute, use_cache)["features"]


def _log_probabilities(run: FinishedRun, embedder: Embedder, features: np.ndarray) -> np.ndarray:
    """Return the logarithms of the probabilities of a run's classes, float64 ``(2, N, C)``.

    The temperature is that of the answer, as when a device answers; without held-out images it is 1.
    """
    record = TrackRecord.from_state(files.parse_tensors(run.states["record"], "record.safetensors")[0])
    temperatures = record.temperatures()
    found = []
    for view in features:
        embeddings = torch.from_numpy(standardise(run.folder, embedder, view))
        scores = scores_of(run.learner, embeddings, torch.arange(len(run.registry))).double()
        if temperatures is not None:
            scores = scores / temperatures[scores.argmax(1)][:, None]
        found.append(scores.log_softmax(1).numpy())
    return np.stack(found)


def combined(general: Sequence[Opinion], special: Sequence[Opinion]) -> np.ndarray:
    """Return the logarithms of the probabilities of all teachers together, float16 ``(2, N, C)``.

    The classes are in the order of the first teacher. Specialists come one after the other, if they share classes.
    """
    order = list(general[0].classes)
    together = np.zeros_like(general[0].logarithms)
    for each in general:
        columns = [list(each.classes).index(name) for name in order]
        together += np.exp(each.logarithms[..., columns]) / len(general)
    for each in special:
        columns = [order.index(name) for name in each.classes]
        together[..., columns] = together[..., columns].sum(-1, keepdims=True) * np.exp(each.logarithms)
    with np.errstate(divide="ignore"):
        logarithms: np.ndarray = np.maximum(np.log(together), LEAST).astype(np.float16)
    return logarithms


def _card(name: str, embedder: Embedder, run: FinishedRun | None) -> dict[str, Any]:
    """Return what a teacher is, without the folders of a local path."""
    provenance: Mapping[str, Any] = embedder.provenance
    kept = {key: provenance[key] for key in ("arch", "source", "sha256", "data", "terms") if key in provenance}
    card = {"name": names.public(name), "identity": embedder.identity, **kept}
    if run is not None:
        card |= {"name": f"run {run.folder.resolve().name}", "backbone": names.public(run.config.backbone.name)}
        card |= {"learner": run.learner.display, "classes": len(run.registry)}
    return card
