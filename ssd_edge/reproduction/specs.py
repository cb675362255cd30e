"""What is to be run: streams, budgets and experiments from YAML, and the settings that they come to.

An experiment is a table of systems (a learner with settings) on streams. A budget says how long they are trained.
Settings come from general to particular: budget, experiment, stream (each only where the learner knows the key),
then the system's own; the smoke budget caps all of them at the end.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from ssd_edge import learners
from ssd_edge.config import StreamConfig, parse_section, read_yaml
from ssd_edge.errors import InputError, did_you_mean
from ssd_edge.learners.gradient.finetune import JOINT
from ssd_edge.run.train import JOINT_NAME

FOLDER = Path(__file__).resolve().parent / "experiments"
BUDGETS = ("smoke", "reduced", "full")
ORDERS = (0, 3, 15, 27, 97)  # of SDMLP's code: the ordinal order, and four seeds of legacy NumPy
METRICS = ("accuracy", "backward_transfer", "entropy", "trace")
LAYOUTS = ("rows", "grid")
FIGURES = ("", "neurons", "similarity", "training", "tasks", "values", "surface")  # see `drawings`
SMALLEST_TOP_N = 2  # a softmax over one neuron teaches nothing


@dataclasses.dataclass(frozen=True)
class Budget:
    """How long systems are trained.

    Attributes:
        name: smoke, reduced or full.
        why: one sentence for the page.
        orders: how many class orders are run by default.
        learner: settings of every learner that knows them.
        learners: more settings, by learner name.
        images: training and test images a class at most; () all.
        most: caps of settings, applied last.
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
    """A data set cut into tasks.

    Attributes:
        name: key in streams.yaml.
        title: for the page.
        data: file under ``$SSD_EDGE_DATA``.
        classes: ``data.classes``; empty: all.
        stream: keys of `StreamConfig`, without the order.
        pixels: the learner sees the 784 pixels of a 28 × 28 image, in 0..1, instead of embeddings.
        backbone: ``shipped``, or ``tiny-100``: one that was pretrained on other classes than the stream's.
        learner: settings that belong to this stream.
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
        name: as printed.
        learner: ``name`` and any settings.
        budgets: more settings, by budget.
        by_stream: more settings, by stream and then by budget (``any``: every budget).
        reported: the paper's number by stream; None where it gives none.
        note: printed under the table.
    """

    name: str
    learner: Mapping[str, Any]
    budgets: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    by_stream: Mapping[str, Mapping[str, Mapping[str, Any]]] = dataclasses.field(default_factory=dict)
    reported: Mapping[str, float | None] = dataclasses.field(default_factory=dict)
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One table of the page.

    Attributes:
        id: as typed, e.g. T1.
        title: its heading.
        place: where the paper reports it; empty: not in the paper.
        text: what is asked, one or two sentences.
        streams: names in streams.yaml.
        systems: its rows.
        metric: which number ``reported`` is.
        learner: settings of every system.
        budgets: more settings of every system, by budget.
        orders: at most so many class orders; 0: the budget's.
        layout: ``rows``: one a system and stream; ``grid``: one a system, one column a stream.
        figure: what is drawn of it; empty: nothing.
        trace: points a task at which training is looked into; 0: none.
        paired: pairs of system names whose differences are tested, order by order.
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
    orders: int = 0
    layout: str = "rows"
    figure: str = ""
    trace: int = 0
    paired: tuple[tuple[str, str], ...] = ()


def _build(kind: type, values: Any, where: str) -> Any:
    """A dataclass from a mapping of YAML.

    Raises:
        InputError: an unknown or a missing key.
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
        raise InputError(f"{where} is not complete: {error}") from error


@functools.cache
def budgets() -> dict[str, Budget]:
    """All budgets by name."""
    found = {}
    for name, values in read_yaml(FOLDER / "budgets.yaml").items():
        found[name] = _build(Budget, {**values, "name": name, "images": tuple(values.get("images", ()))}, name)
    return found


@functools.cache
def streams() -> dict[str, StreamSource]:
    """All streams by name."""
    found = {}
    for name, values in read_yaml(FOLDER / "streams.yaml").items():
        found[name] = _build(StreamSource, {**values, "name": name, "classes": tuple(values.get("classes", ()))}, name)
    return found


@functools.cache
def experiments() -> dict[str, Experiment]:
    """All experiments by id, in the order of their files' numbers."""
    found = {}
    for path in sorted(FOLDER.glob("[0-9]*.yaml")):
        values = read_yaml(path)
        rows = tuple(_build(System, row, f"{path.name}: systems") for row in values.get("systems", ()))
        pairs = tuple((first, second) for first, second in values.get("paired", ()))
        lists = {"systems": rows, "paired": pairs, "streams": tuple(values.get("streams", ()))}
        experiment = _build(Experiment, {**values, **lists}, path.name)
        _check(experiment, path.name)
        found[experiment.id] = experiment
    return found


def _check(experiment: Experiment, where: str) -> None:
    """What one part of an experiment says against another.

    Raises:
        InputError: an unknown stream, budget, metric, layout, figure or system is named.
    """
    names = [system.name for system in experiment.systems]
    wanted: list[tuple[str, Any]] = [(stream, streams()) for stream in experiment.streams]
    wanted += [(name, BUDGETS) for name in experiment.budgets]
    wanted += [(name, names) for pair in experiment.paired for name in pair]
    wanted += [(experiment.metric, METRICS), (experiment.layout, LAYOUTS), (experiment.figure, FIGURES)]
    for system in experiment.systems:
        wanted += [(stream, experiment.streams) for stream in (*system.by_stream, *system.reported)]
        wanted += [(name, BUDGETS) for name in system.budgets]
        wanted += [(name, (*BUDGETS, "any")) for layers in system.by_stream.values() for name in layers]
    for word, known in wanted:
        if word not in known:
            raise InputError(f"{where} names '{word}', which is unknown.{did_you_mean(word, known)}")
    if len(set(names)) != len(names) or not names:
        raise InputError(f"{where} must name each of its systems once")


def chosen(words: tuple[str, ...]) -> list[Experiment]:
    """The experiments that a user names, in any case; ``all`` is every one.

    Raises:
        InputError: an unknown id.
    """
    known = experiments()
    by_word = {name.casefold(): name for name in known}
    found: dict[str, Experiment] = {}
    for word in words:
        if word.casefold() == "all":
            found.update(known)
        elif word.casefold() in by_word:
            found[by_word[word.casefold()]] = known[by_word[word.casefold()]]
        else:
            near = did_you_mean(word.casefold(), by_word)
            raise InputError(f"there is no experiment '{word}'.{near} Known: {', '.join(known)}, list, all")
    return list(found.values())


def on_streams(picked: Sequence[Experiment], names: Sequence[str]) -> list[Experiment]:
    """The experiments on some of their streams; all of them if no stream is named.

    Raises:
        InputError: an unknown stream, or one that none of the experiments has.
    """
    for name in names:
        if not any(name in experiment.streams for experiment in picked):
            known = dict.fromkeys(stream for experiment in picked for stream in experiment.streams)
            near = did_you_mean(name, known)
            raise InputError(f"none of these experiments has a stream '{name}'.{near} They have {', '.join(known)}")
    if not names:
        return list(picked)
    cut = [dataclasses.replace(one, streams=tuple(name for name in one.streams if name in names)) for one in picked]
    return [experiment for experiment in cut if experiment.streams]


@functools.cache
def _defaults(name: str) -> dict[str, Any]:
    return _explicit(dataclasses.asdict(JOINT if name == JOINT_NAME else learners.settings_class(name)()))


def known_settings(name: str) -> dict[str, Any]:
    """The settings of a learner, or of joint training, with their defaults as JSON values.

    Raises:
        InputError: unknown learner.
    """
    return dict(_defaults(name))


def options(experiment: Experiment, system: System, stream: str, budget: str) -> dict[str, Any]:
    """``name`` and every setting of a system's learner on a stream.

    Raises:
        InputError: a setting that the learner does not know, or a value out of range.
    """
    source, plan = streams()[stream], budgets()[budget]
    name = system.learner["name"]
    defaults = known_settings(name)
    if name == JOINT_NAME:  # its schedule is its own (docs/method.md); only the size is the others'
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
    """Settings cut down to what a budget allows at most; a Top-n table must fit the neurons that are left."""
    if not most:
        return values
    cut = {key: min(value, most[key]) if key in most else value for key, value in values.items()}
    text = str(cut.get("top_n", ""))
    if text.isdecimal() and "neurons" in cut:
        number = max(min(int(text), cut["neurons"]), cut.get("k", 1), SMALLEST_TOP_N)
        cut["top_n"] = type(values["top_n"])(number)
    return cut


def _explicit(values: dict[str, Any]) -> dict[str, Any]:
    """Lists for tuples, and the weight that stands for "the method's own" by its value: it may change some day."""
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
    if plain.get("penalty", "none") != "none" and plain["penalty_weight"] == -1:
        from ssd_edge.learners.gradient.penalties import DEFAULT_WEIGHT

        plain["penalty_weight"] = float(DEFAULT_WEIGHT[plain["penalty"]])
    return plain


def deviations(learner: Mapping[str, Any]) -> dict[str, Any]:
    """``name`` and those settings that are not the learner's defaults."""
    defaults = {**_defaults(learner["name"]), "name": None}
    return {key: value for key, value in learner.items() if key not in defaults or value != defaults[key]}
