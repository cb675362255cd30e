"""Forget a class, or merge several into one. Nothing is written to disk here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from device_runtime.learning.guard import Limits, judge_edit
from device_runtime.learning.state import DeviceState, copy_learner
from device_runtime.results import NO_OLD_CLASSES, ForgetResult, MergeLabelsResult, Retention
from ssd_edge import learners
from ssd_edge.errors import InputError
from ssd_edge.learners.closed_form.linear import LinearLearner
from ssd_edge.learners.closed_form.sums import ClassStatistics
from ssd_edge.learners.retention import TrackRecord

_LEFT_IN_THE_COVARIANCE = (
    "its counts, mean and scores are gone; how its images spread around their mean stays in the covariance that all "
    "classes share (learner.per_class=true keeps one for each class)"
)
_LEFT_IN_THE_WEIGHTS = "it is never predicted again, but its effect on the weights that all classes share remains"


def estimate_cost(
    state: DeviceState,
    learner: learners.Learner,
    statistics: ClassStatistics,
    limits: Limits | None,
    renumbered: Mapping[int, int] | None = None,
) -> tuple[Retention, list[str], TrackRecord]:
    """Return the cost of an edit for the classes in `statistics`, warnings, and the record with it: `guard.judge_edit`.

    Raises:
        GateRefusedError: The cost exceeds `limits`.
    """
    judgement = judge_edit(state, learner, statistics, state.registry, limits, renumbered)
    judgement.check()
    return judgement.retention or NO_OLD_CLASSES, judgement.warnings, judgement.record


def forget(state: DeviceState, label: str, exactly: bool, limits: Limits | None) -> tuple[DeviceState, ForgetResult]:
    """Remove a class; arguments, result and errors as `Device.forget`."""
    registry = state.registry.without(label)
    row = state.registry.row_of(label)
    learner = copy_learner(state.learner)
    exact = learner.remove(row, approximately=not exactly)
    # class statistics beside the learner are used by the guard and the thresholds for 'unknown' only
    changed = state.with_learner(learner, lambda statistics: statistics.remove(row, approximately=True))
    left = "" if exact else _LEFT_IN_THE_COVARIANCE if isinstance(learner, LinearLearner) else _LEFT_IN_THE_WEIGHTS
    retention, warnings, record = estimate_cost(state, learner, changed.statistics, limits)
    result = ForgetResult(
        forgot=state.registry.names[row],
        images=state.registry.entries[row].images,
        exact=exact,
        left=left,
        old_classes=retention,
        warnings=warnings,
    )
    return _without_rows(changed.replace(record=record), [row]).replace(registry=registry), result


def merge_labels(
    state: DeviceState, labels: Sequence[str], into: str, limits: Limits | None
) -> tuple[DeviceState, MergeLabelsResult]:
    """Merge several classes into one; arguments, result and errors as `Device.merge_labels`."""
    registry = state.registry
    rows = [state.registry.row_of(label) for label in dict.fromkeys(labels)]
    if registry.row(into) is None and rows:
        registry = registry.rename(registry.names[rows[0]], into)
    target = registry.row(into)
    others = [row for row in rows if row != target]
    if target is None or not others:
        raise InputError(f"'{into}' can only be merged with other classes; name at least one besides it")
    renamed, learner = registry, copy_learner(state.learner)
    for row in others:
        learner.join(row, target)
        registry = registry.joined(state.registry.names[row], into)

    def join(statistics: ClassStatistics) -> None:
        for row in others:
            statistics.join(row, target)

    changed = state.with_learner(learner, join)
    retention, warnings, record = estimate_cost(
        state.replace(registry=renamed), learner, state.statistics, limits, dict.fromkeys(others, target)
    )
    result = MergeLabelsResult(
        merged_labels=[state.registry.names[row] for row in rows],
        into=registry.names[registry.row_of(into)],
        old_classes=retention,
        warnings=warnings,
    )
    after = changed.replace(
        rejector=state.rejector.joined(others, target, changed.statistics),
        record=record.joined(learner, changed.statistics, others, target),
    )
    return _without_rows(after, others).replace(registry=registry), result


def _without_rows(state: DeviceState, rows: Sequence[int]) -> DeviceState:
    """Drop empty rows, which moves later rows up; the caller updates the registry."""
    return state.replace(
        learner=learners.without_rows(state.learner, rows),
        counted=None if state.counted is None else state.counted.without_rows(rows),
        rejector=state.rejector.without_rows(rows),
        record=state.record.without_rows(rows),
    )
