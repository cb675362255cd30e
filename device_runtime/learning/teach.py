"""Learning on the device: what is known, and new images → what is then known. Nothing is written here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from device_runtime.learning import budget as budgets
from device_runtime.learning import lessons
from device_runtime.learning.budget import Meter
from device_runtime.learning.guard import Limits, judge
from device_runtime.learning.lessons import ImageSource
from device_runtime.learning.state import Knowledge
from device_runtime.learning.unknown import Rejector
from ssd_edge import learners

NOTHING_KNOWN = {"kind": "no class was known before", "accuracy_before": None, "accuracy_after": None, "drop": 0.0}
COPIES = 2  # of the learner's state that are held beside the one that answers: the one taught, and its tensors packed

Embed = Callable[[Sequence[ImageSource], Callable[[float], Any]], torch.Tensor]


def copy_of(learner: learners.Learner) -> learners.Learner:
    """A learner of its own, with equal answers bit for bit."""
    return learners.restore(*learners.pack(learner))


def teach(
    known: Knowledge,
    images: Mapping[str, Sequence[ImageSource]],
    embed: Embed,
    seed: int,
    limits: Limits | None,
    meter: Meter,
) -> tuple[Knowledge, dict[str, Any]]:
    """What a device knows after a learn, and the report of it; arguments and errors as `Device.learn_all`.

    A fifth of the images is held out, a copy of the learner is taught with the rest and measured on it; then another
    copy is taught with all of them, so that none is wasted.

    Args:
        known: before; it stays as it is.
        images: name → images.
        embed: images, and what is told the share done → embeddings ``(N, D)``.
        seed: of the choice of held-out images.
        limits: of forgetting.
        meter: of time and memory.
    """
    registry, plan = lessons.plan(known.registry, images)
    sources = [source for lesson in plan for source in lesson.sources]
    meter.check_memory(COPIES * known.learner.memory_bytes() + 2 * len(sources) * known.learner.dim * 4)
    meter.stage("embedding")
    embeddings = embed(sources, meter.check_embedding)
    labels = torch.cat([torch.full((len(lesson.sources),), lesson.row) for lesson in plan])
    meter.stage("trying", budgets.TRIAL)
    held_out = lessons.held_out(copy_of(known.learner), embeddings, labels, seed, meter.tick)
    meter.stage("learning", budgets.RESERVE)
    taught = copy_of(known.learner)
    measured = taught.learn(learners.Task(embeddings, labels), meter.tick)
    meter.stage("checking")
    names = [lessons.name_of(source, number) for number, source in enumerate(sources)]
    judgement = judge(known.learner, taught, known.statistics, embeddings, labels, registry, limits, names)
    judgement.check()
    after = _remember(known, plan, embeddings, labels).replace(registry=registry, learner=taught)
    after.check()
    meter.tick(1.0)
    report = {
        **lessons.report(plan, held_out),
        "old_classes": judgement.retention or NOTHING_KNOWN,
        "warnings": judgement.warnings + meter.warnings(),
        "suspects": judgement.suspects,
        "seconds": round(meter.seconds, 3),
        "peak_mb": meter.peak_mb,
        "measured": {key: float(value) for key, value in measured.items()},
    }
    return after, report


def _remember(
    known: Knowledge, plan: Sequence[lessons.Lesson], embeddings: torch.Tensor, labels: torch.Tensor
) -> Knowledge:
    """With the statistics of the new images, and thresholds for the classes that they are of."""
    statistics = known.statistics.copy()
    statistics.add(embeddings, labels)
    rejector = known.rejector
    if rejector.outgrown(statistics):  # a device that began without classes knows by now how embeddings spread
        rejector = Rejector.fit(statistics, rejector.rate)
    for lesson in plan:
        rejector = rejector.with_class(lesson.row, statistics, embeddings[labels == lesson.row])
    return known.replace(statistics=statistics, rejector=rejector)
