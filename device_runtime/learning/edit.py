"""Editing what a device knows: forget a class, or make one of several. Nothing is written here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from device_runtime.learning.guard import Limits, judge_edit
from device_runtime.learning.state import DeviceState
from device_runtime.learning.teach import NO_CLASSES_BEFORE, copy_learner
from ssd_edge import learners
from ssd_edge.errors import InputError
from ssd_edge.learners.closed_form.linear import LinearLearner
from ssd_edge.learners.closed_form.sums import ClassStatistics


def estimate_cost(
    state: DeviceState,
    learner: learners.Learner,
    statistics: ClassStatistics,
    limits: Limits | None,
    renumbered: dict[int, int] | None = None,
) -> dict[str, Any]:
    """What the edit costs the classes in `statistics`, as `guard.judge_edit` estimates."""
    judgement = judge_edit(state.learner, learner, statistics, state.registry, limits, renumbered)
    judgement.check()
    return {"old_classes": judgement.retention or NO_CLASSES_BEFORE, "warnings": judgement.warnings}


def forget(state: DeviceState, label: str, exactly: bool, limits: Limits | None) -> tuple[DeviceState, dict[str, Any]]:
    """Without a class; arguments, report and errors as `Device.forget`."""
    registry = state.registry.without(label)
    row = state.registry.row_of(label)
    learner = copy_learner(state.learner)
    exact = learner.remove(row, approximately=not exactly)
    statistics = state.statistics.copy()
    statistics.remove(row, approximately=True)  # of no answer, but of the guard and the thresholds for 'unknown'
    left = "" if exact else _LEFT_IN_THE_COVARIANCE if isinstance(learner, LinearLearner) else _LEFT_IN_THE_WEIGHTS
    report = {
        "forgot": state.registry.names[row],
        "images": state.registry.entries[row].images,
        "exact": exact,
        "left": left,
        **estimate_cost(state, learner, statistics, limits),
    }
    after = state.replace(learner=learner, statistics=statistics)
    return _without_rows(after, [row]).replace(registry=registry), report


_LEFT_IN_THE_COVARIANCE = (
    "its counts, mean and scores are gone; how its images spread around their mean stays in the covariance that all "
    "classes share (learner.per_class=true keeps one for each class)"
)
_LEFT_IN_THE_WEIGHTS = "it is never answered again; what it taught the neurons that all classes share stays there"


def merge_labels(
    state: DeviceState, labels: Sequence[str], into: str, limits: Limits | None
) -> tuple[DeviceState, dict[str, Any]]:
    """With one class in place of several; arguments, report and errors as `Device.merge_labels`."""
    registry = state.registry
    rows = [state.registry.row_of(label) for label in dict.fromkeys(labels)]
    if registry.row(into) is None and rows:
        registry = registry.rename(registry.names[rows[0]], into)
    target = registry.row(into)
    others = [row for row in rows if row != target]
    if target is None or not others:
        raise InputError(f"'{into}' can only be merged with other classes; name at least one besides it")
    renamed, learner = registry, copy_learner(state.learner)
    statistics = state.statistics.copy()
    for row in others:
        learner.join(row, target)
        statistics.join(row, target)
        registry = registry.joined(state.registry.names[row], into)
    now = state.replace(registry=renamed)
    cost = estimate_cost(now, learner, state.statistics, limits, dict.fromkeys(others, target))
    report = {
        "merged_labels": [state.registry.names[row] for row in rows],
        "into": registry.names[registry.row_of(into)],
    }
    rejector = state.rejector.refitted(target, statistics)
    after = state.replace(learner=learner, statistics=statistics, rejector=rejector)
    return _without_rows(after, others).replace(registry=registry), {**report, **cost}


def _without_rows(state: DeviceState, rows: Sequence[int]) -> DeviceState:
    """Without rows that are empty by now; those above move up. The registry is the caller's."""
    return state.replace(
        learner=learners.without_rows(state.learner, rows),
        statistics=state.statistics.without_rows(rows),
        rejector=state.rejector.without_rows(rows),
    )


def describe(info: Mapping[str, Any]) -> str:
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
