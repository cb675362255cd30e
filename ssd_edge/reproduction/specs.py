"""Streams, budgets and experiments from YAML, and the learner settings that follow from them.

An experiment is a table of systems (learners with settings) on streams. A budget is a training schedule. Settings of
the budget, the experiment and the stream apply in this order, each only to learners that have the key; then those of
the system, and finally the limits of the smoke budget.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from ssd_edge import learners
from ssd_edge.config import StreamConfig, parse_section, read_yaml
from ssd_edge.errors import InputError, did_you_mean
from ssd_edge.files import list_folder
from ssd_edge.learners.gradient.finetune import JOINT
from ssd_edge.run.train import JOINT_NAME

FOLDER = Path(__file__).resolve().parent / "experiments"
BUDGETS = ("smoke", "reduced", "full")
ORDERS = (0, 3, 15, 27, 97)  # class orders of SDMLP's code: the original order, and four seeds of legacy NumPy
METRICS = ("accuracy", "backward_transfer", "entropy", "trace")
LAYOUTS = ("rows", "grid")
FIGURES = ("", "neurons", "similarity", "training", "tasks", "values", "surface")  # see `drawings`
SMALLEST_TOP_N = 2  # the softmax over one neuron is constant


@dataclasses.dataclass(frozen=True)
class Budget:
    """A training schedule.

    Attributes:
        name: smoke, reduced or full.
        why: Description for the page.
        orders: Default number of class orders.
        learner: Settings for all learners that have them.
        learners: Further settings by learner name.
        images: Maximum number of training and test images per class; () for all.
        most: Upper limits of settings, applied last.
    """

    name: str
    why: str
    orders: int
    learner: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    learners: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    images: tuple[int, ...] = ()
    most: Mapping[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class StreamSource:
    """A data set split into tasks.

    Attributes:
        name: Key in streams.yaml.
        title: Title on the page.
        data: File under ``$SSD_EDGE_DATA``.
        classes: ``data.classes``; empty for all.
        stream: Keys of `StreamConfig`, without the order.
        pixels: Use the 784 pixels of a 28 × 28 image, in 0..1, instead of embeddings.
        backbone: ``shipped``, or ``tiny-100`` for one pretrained on classes outside the stream.
        learner: Learner settings for this stream.
    """

    name: str
    title: str
    data: str
    classes: tuple[str, ...] = ()
    stream: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    pixels: bool = False
    backbone: Literal["shipped", "tiny-100"] = "shipped"
    learner: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        parse_section(StreamConfig, self.stream, f"streams.{self.name}.stream")


@dataclasses.dataclass(frozen=True)
class System:
    """One row of an experiment's table.

    Attributes:
        name: Printed name.
        learner: ``name`` and settings.
        budgets: Further settings by budget.
        by_stream: Further settings by stream and budget; ``any`` means all budgets.
        reported: Published number by stream; None if the paper gives none.
        note: Footnote of the table.
        budget: Default budget; empty for that of the experiment. Dense networks take days at the published schedule.
    """

    name: str
    learner: Mapping[str, Any]
    budgets: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    by_stream: Mapping[str, Mapping[str, Mapping[str, Any]]] = dataclasses.field(default_factory=dict)
    reported: Mapping[str, float | None] = dataclasses.field(default_factory=dict)
    note: str = ""
    budget: str = ""


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One table of the page.

    Attributes:
        id: Identifier on the command line, e.g. T1.
        title: Heading.
        place: Table or figure of the paper; empty if it is not in the paper.
        text: Description in one or two sentences.
        streams: Names in streams.yaml.
        systems: Rows of the table.
        metric: Metric of the ``reported`` numbers.
        learner: Settings for all systems.
        budgets: Further settings for all systems by budget.
        budget: Default budget of its systems.
        orders: Maximum number of class orders; 0 for that of the budget.
        layout: ``rows`` for one row per system and stream, ``grid`` for one row per system and one column per stream.
        figure: Kind of figure; empty for none.
        trace: Trace points per task; 0 for no trace.
        task_given: True if the table also has the accuracy with the task of each test sample given.
        paired: Pairs of system names whose accuracy is compared by class order.
    """

    id: str
    title: str
    streams: tuple[str, ...]
    systems: tuple[System, ...]
    place: str = ""
    text: str = ""
    metric: str = "accuracy"
    learner: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    budgets: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    budget: str = "reduced"
    orders: int = 0
    layout: str = "rows"
    figure: str = ""
    trace: int = 0
    task_given: bool = False
    paired: tuple[tuple[str, str], ...] = ()


def build(kind: type, values: Any, where: str) -> Any:
    """Build a dataclass from a YAML mapping.

    Raises:
        InputError: A key is unknown or missing.
    """
    if not isinstance(values, Mapping):
        raise InputError(f"{where} must be a mapping, but is {values!r}")
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for key in values:
        if key not in fields:
            raise InputError(f"{where} has the unknown key '{key}'.{did_you_mean(str(key), fields)}")
    try:
        return kind(**values)
    except TypeError as error:
        raise InputError(f"{where} is incomplete: {error}") from error


@functools.cache
def budgets() -> dict[str, Budget]:
    """Return all budgets by name."""
    return {
        name: build(Budget, {**values, "name": name, "images": tuple(values.get("images", ()))}, name)
        for name, values in read_yaml(FOLDER / "budgets.yaml").items()
    }


@functools.cache
def streams() -> dict[str, StreamSource]:
    """Return all streams by name."""
    return {
        name: build(StreamSource, {**values, "name": name, "classes": tuple(values.get("classes", ()))}, name)
        for name, values in read_yaml(FOLDER / "streams.yaml").items()
    }


@functools.cache
def experiments() -> dict[str, Experiment]:
    """Return all experiments by id, in the order of the numbers of their files."""
    found = {}
    for path in (path for path in list_folder(FOLDER) if path.name[0].isdigit()):
        values = read_yaml(path)
        rows = tuple(build(System, row, f"{path.name}: systems") for row in values.get("systems", ()))
        pairs = tuple((first, second) for first, second in values.get("paired", ()))
        lists = {"systems": rows, "paired": pairs, "streams": tuple(values.get("streams", ()))}
        experiment = build(Experiment, {**values, **lists}, path.name)
        _check(experiment, path.name)
        found[experiment.id] = experiment
    return found


def _check(experiment: Experiment, where: str) -> None:
    """Check that an experiment is consistent.

    Raises:
        InputError: A stream, budget, metric, layout, figure or system is unknown, or a system name is not unique.
    """
    names = [system.name for system in experiment.systems]
    wanted: list[tuple[str, Any]] = [(stream, streams()) for stream in experiment.streams]
    wanted += [(name, BUDGETS) for name in experiment.budgets]
    wanted += [(name, names) for pair in experiment.paired for name in pair]
    wanted += [(experiment.metric, METRICS), (experiment.layout, LAYOUTS), (experiment.figure, FIGURES)]
    wanted += [
        (name, BUDGETS) for name in (experiment.budget, *(system.budget for system in experiment.systems)) if name
    ]
    for system in experiment.systems:
        wanted += [(stream, experiment.streams) for stream in (*system.by_stream, *system.reported)]
        wanted += [(name, BUDGETS) for name in system.budgets]
        wanted += [(name, (*BUDGETS, "any")) for layers in system.by_stream.values() for name in layers]
    for name, known in wanted:
        if name not in known:
            raise InputError(f"{where} names '{name}', which is unknown.{did_you_mean(name, known)}")
    if len(set(names)) != len(names) or not names:
        raise InputError(f"{where} must name each of its systems once")


def default_budget(experiment: Experiment, system: System) -> str:
    """Return the budget that a row is run with unless another is asked for."""
    return system.budget or experiment.budget


def chosen(names: tuple[str, ...]) -> list[Experiment]:
    """Return the experiments with these ids, in upper or lower case; ``all`` means all of them.

    Raises:
        InputError: An id is unknown.
    """
    known = experiments()
    folded = {name.casefold(): name for name in known}
    picked: dict[str, Experiment] = {}
    for name in names:
        if name.casefold() == "all":
            picked.update(known)
        elif name.casefold() in folded:
            picked[folded[name.casefold()]] = known[folded[name.casefold()]]
        else:
            near = did_you_mean(name.casefold(), folded)
            raise InputError(f"there is no experiment '{name}'.{near} Known: {', '.join(known)}, list, all")
    return list(picked.values())


def on_streams(picked: Sequence[Experiment], names: Sequence[str]) -> list[Experiment]:
    """Restrict experiments to some streams; without names, return them unchanged.

    Raises:
        InputError: None of the experiments uses a stream.
    """
    return _restrict(picked, names, "stream", lambda stream: stream)


def with_systems(picked: Sequence[Experiment], names: Sequence[str]) -> list[Experiment]:
    """Restrict experiments to some systems; without names, return them unchanged.

    Raises:
        InputError: None of the experiments has a system of a name.
    """
    return _restrict(picked, names, "system", lambda system: system.name)


def _restrict(
    picked: Sequence[Experiment], names: Sequence[str], noun: str, name_of: Callable[[Any], str]
) -> list[Experiment]:
    """Keep the streams or systems with these names, and the experiments that have some of them."""
    field = f"{noun}s"
    known = dict.fromkeys(name_of(one) for experiment in picked for one in getattr(experiment, field))
    for name in names:
        if name not in known:
            near = did_you_mean(name, known)
            raise InputError(f"none of these experiments has a {noun} '{name}'.{near} They have {'; '.join(known)}")
    if not names:
        return list(picked)
    kept = [tuple(one for one in getattr(experiment, field) if name_of(one) in names) for experiment in picked]
    narrowed: list[dict[str, Any]] = [{field: few} for few in kept]
    return [dataclasses.replace(one, **few) for one, few in zip(picked, narrowed, strict=True) if few[field]]


@functools.cache
def _defaults(name: str) -> dict[str, Any]:
    return _explicit(dataclasses.asdict(JOINT if name == JOINT_NAME else learners.settings_class(name)()))


def known_settings(name: str) -> dict[str, Any]:
    """Return the default settings of a learner, or of joint training, as JSON values.

    Raises:
        InputError: The learner is unknown.
    """
    return dict(_defaults(name))


def options(experiment: Experiment, system: System, stream: str, budget: str) -> dict[str, Any]:
    """Return ``name`` and all settings of the learner of a system on a stream.

    Raises:
        InputError: A setting is unknown to the learner, or a value is out of range.
    """
    source, plan = streams()[stream], budgets()[budget]
    name = system.learner["name"]
    defaults = known_settings(name)
    if name == JOINT_NAME:  # has a schedule of its own (docs/method.md); only the number of neurons is shared
        general: list[Mapping[str, Any]] = [
            {key: layer[key] for key in ("neurons",) if key in layer}
            for layer in (plan.learner, experiment.learner, experiment.budgets.get(budget, {}))
        ]
    else:
        own = plan.learners.get(name, {})
        general = [plan.learner, own, experiment.learner, experiment.budgets.get(budget, {}), source.learner]
    values = dict(defaults)
    for layer in general:
        values.update({key: value for key, value in layer.items() if key in defaults})
    here = system.by_stream.get(stream, {})
    for layer in (system.learner, system.budgets.get(budget, {}), here.get("any", {}), here.get(budget, {})):
        values.update({key: value for key, value in layer.items() if key != "name"})
    values = _capped(values, plan.most)
    kind = type(JOINT) if name == JOINT_NAME else learners.settings_class(name)
    parsed = dataclasses.asdict(parse_section(kind, values, "learner"))
    return {"name": name, **_explicit(parsed)}


def _capped(values: dict[str, Any], most: Mapping[str, float]) -> dict[str, Any]:
    """Limit settings to the maxima of a budget, and the Top-n table to the remaining neurons."""
    if not most:
        return values
    capped = {key: min(value, most[key]) if key in most else value for key, value in values.items()}
    text = str(capped.get("top_n", ""))
    if text.isdecimal() and "neurons" in capped:
        number = max(min(int(text), capped["neurons"]), capped.get("k", 1), SMALLEST_TOP_N)
        capped["top_n"] = type(values["top_n"])(number)
    return capped


def _explicit(values: dict[str, Any]) -> dict[str, Any]:
    """Replace tuples by lists, and the weight −1 by the method's default, which a later version may change."""
    plain: dict[str, Any] = {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
    if plain.get("penalty", "none") != "none" and plain["penalty_weight"] == -1:
        from ssd_edge.learners.gradient.penalties import DEFAULT_WEIGHT

        plain["penalty_weight"] = float(DEFAULT_WEIGHT[plain["penalty"]])
    return plain


def deviations(learner: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``name`` and the settings that differ from the defaults of the learner."""
    defaults = {**_defaults(learner["name"]), "name": None}
    return {key: value for key, value in learner.items() if key not in defaults or value != defaults[key]}
