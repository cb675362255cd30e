"""Editing what a device knows: forget a class, or make one of several. Nothing is written here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from device_runtime.learning.guard import Limits, judge_edit
from device_runtime.learning.state import Knowledge
from device_runtime.learning.teach import NOTHING_KNOWN, copy_of
from ssd_edge import learners
from ssd_edge.errors import InputError
from ssd_edge.learners.closed_form.linear import LinearLearner
from ssd_edge.learners.closed_form.sums import ClassStatistics


def judged(
    known: Knowledge,
    learner: learners.Learner,
    statistics: ClassStatistics,
    limits: Limits | None,
    renumbered: dict[int, int] | None = None,
) -> dict[str, Any]:
    """What the edit costs the classes in `statistics`, as `guard.judge_edit` estimates."""
    judgement = judge_edit(known.learner, learner, statistics, known.registry, limits, renumbered)
    judgement.check()
    return {"old_classes": judgement.retention or NOTHING_KNOWN, "warnings": judgement.warnings}


def forget(known: Knowledge, label: str, exactly: bool, limits: Limits | None) -> tuple[Knowledge, dict[str, Any]]:
    """Without a class; arguments, report and errors as `Device.forget`."""
    registry = known.registry.without(label)
    row = known.registry.row_of(label)
    learner = copy_of(known.learner)
    exact = learner.remove(row, approximately=not exactly)
    statistics = known.statistics.copy()
    statistics.remove(row, approximately=True)  # of no answer, but of the guard and the thresholds for 'unknown'
    left = "" if exact else _LEFT_IN_THE_COVARIANCE if isinstance(learner, LinearLearner) else _LEFT_IN_THE_WEIGHTS
    report = {
        "forgot": known.registry.names[row],
        "images": known.registry.entries[row].images,
        "exact": exact,
        "left": left,
        **judged(known, learner, statistics, limits),
    }
    after = known.replace(learner=learner, statistics=statistics)
    return _without_rows(after, [row]).replace(registry=registry), report


_LEFT_IN_THE_COVARIANCE = (
    "its counts, mean and scores are gone; how its images spread around their mean stays in the covariance that all "
    "classes share (learner.per_class=true keeps one for each class)"
)
_LEFT_IN_THE_WEIGHTS = "it is never answered again; what it taught the neurons that all classes share stays there"


def merge_labels(
    known: Knowledge, labels: Sequence[str], into: str, limits: Limits | None
) -> tuple[Knowledge, dict[str, Any]]:
    """With one class in place of several; arguments, report and errors as `Device.merge_labels`."""
    registry = known.registry
    rows = [known.registry.row_of(label) for label in dict.fromkeys(labels)]
    if registry.row(into) is None and rows:
        registry = registry.rename(registry.names[rows[0]], into)
    target = registry.row(into)
    others = [row for row in rows if row != target]
    if target is None or not others:
        raise InputError(f"'{into}' can only be merged with other classes; name at least one besides it")
    renamed, learner = registry, copy_of(known.learner)
    statistics = known.statistics.copy()
    for row in others:
        learner.join(row, target)
        statistics.join(row, target)
        registry = registry.joined(known.registry.names[row], into)
    now = known.replace(registry=renamed)
    cost = judged(now, learner, known.statistics, limits, dict.fromkeys(others, target))
    report = {
        "merged_labels": [known.registry.names[row] for row in rows],
        "into": registry.names[registry.row_of(into)],
    }
    rejector = known.rejector.refitted(target, statistics)
    after = known.replace(learner=learner, statistics=statistics, rejector=rejector)
    return _without_rows(after, others).replace(registry=registry), {**report, **cost}


def _without_rows(known: Knowledge, rows: Sequence[int]) -> Knowledge:
    """Without rows that are empty by now; those above move up. The registry is the caller's."""
    return known.replace(
        learner=learners.without_rows(known.learner, rows),
        statistics=known.statistics.without_rows(rows),
        rejector=known.rejector.without_rows(rows),
    )


def described(info: Mapping[str, Any]) -> str:
    """What made a generation, in a few words, from what was committed with it; empty where nothing is known."""
    if "renamed" in info:
        return "rename '{}' to '{}'".format(*info["renamed"])
    if "forgot" in info:
        return f"forget '{info['forgot']}'{'' if info['exact'] else ', not exactly'}"
    if "merged_labels" in info:
        return f"merge {', '.join(map(repr, info['merged_labels']))} into '{info['into']}'"
    taught = ", ".join(f"'{one['label']}' ({one['images']} images)" for one in info.get("taught", ()))
    if "merged" in info:
        return f"merge with installation {info['merged']}: {taught}"
    return f"learn {taught}" if taught else f"install {info['bundle']}" if "bundle" in info else ""
