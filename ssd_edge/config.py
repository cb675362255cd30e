"""Strict configuration: YAML and ``section.key=value`` → frozen dataclasses.

An unknown key is refused with the most similar known key, a value of the wrong type or out of range with its limit.
Every setting has a description, which `ssd-edge config` prints.
"""

from __future__ import annotations

import contextlib
import dataclasses
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from reprlib import repr as short
from typing import Any, Literal, TypeVar

import yaml

from ssd_edge.errors import InputError, did_you_mean

T = TypeVar("T")

MAX_YAML_BYTES = 50_000  # the largest experiment of the papers has 3,000
SHORT = {"backbone": "backbone.name"}  # on the command line
LARGEST_NUMBER = 1e15  # of any setting: a whole number up to here is exact in float64 and fits into an int64


def setting(
    default: Any,
    why: str,
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
) -> Any:
    """Return a dataclass field with a description and a range.

    Args:
        default: Default value.
        why: Description of the setting, with the reason for its default.
        minimum: Smallest allowed value (for numbers).
        maximum: Largest allowed value.
        above: Exclusive lower bound.
    """
    metadata = {"why": why, "minimum": minimum, "maximum": maximum, "above": above}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Images of a run (`data.*`)."""

    path: str = setting("digits", "folder, archive, CIFAR, MNIST, Tiny-ImageNet, .npz, or 'digits' (scikit-learn)")
    test_fraction: float = setting(
        0.2, "share of each class held out for testing if the data has no test split", above=0.0, maximum=0.9
    )
    classes: tuple[str, ...] = setting(
        (), "classes to use: names, or positions in sorted order such as 0:100; empty: all"
    )
    exclude: tuple[str, ...] = setting((), "classes to leave out: names or positions as for data.classes")
    max_per_class: int = setting(0, "maximum number of training images per class (seeded choice); 0: all", minimum=0)
    skip_bad: bool = setting(False, "go on without files that cannot be used, and list them; false: refuse them")


@dataclasses.dataclass(frozen=True)
class BackboneConfig:
    """Frozen backbone of a run (`backbone.*`)."""

    name: str = setting(
        "lite0", "lite0, lite2, mobilenet-v3-small, timm/…, torchvision/…, hf/…, onnx:FILE, package:FOLDER, or tiny"
    )
    weights: str = setting(
        "", "local file of weights (safetensors or PyTorch) for a network of a library; empty: its own"
    )
    size: int = setting(0, "side of the square input in pixels; 0: the backbone's own", minimum=0, maximum=1024)
    mean: tuple[float, ...] = setting(
        (), "per channel, for pixels in 0..1; empty: the backbone's own, or ImageNet's for onnx:FILE"
    )
    std: tuple[float, ...] = setting((), "as backbone.mean")
    fit: Literal["own", "crop", "squash", "pad"] = setting(
        "own", "how an image becomes a square: centre crop, squashed, or padded; own: as the backbone was trained"
    )
    resize: int = setting(
        0, "crop: shorter side in pixels before the crop; 0: the backbone's own", minimum=0, maximum=4096
    )
    interpolation: Literal["own", "box", "bilinear", "hamming", "bicubic", "lanczos"] = setting(
        "own", "filter; own: as the backbone was trained"
    )
    layout: Literal["nchw", "nhwc"] = setting("nchw", "order of the input axes; only for onnx:FILE")
    levels: Literal["last", "sizes", "auto"] = setting(
        "auto", "features: the network's own (last), joined with a level of each width (auto) or map size (sizes)"
    )
    allow_control_flow: bool = setting(
        False, "accept loops and branches, which may never end, in a file that you trust"
    )
    cache: bool = setting(True, "cache embeddings, keyed by a hash of backbone and data ($SSD_EDGE_CACHE)")


@dataclasses.dataclass(frozen=True)
class StreamConfig:
    """Sequence of tasks of a run (`stream.*`)."""

    tasks: int = setting(0, "number of tasks; 0: two classes per task up to 20 classes, else ten tasks", minimum=0)
    order: str = setting(
        "seeded", "class order: seeded (by run.seed), sorted (by name), sdmlp-0 … -97, or numbers: '3,0,1,…'"
    )
    kind: Literal["class_incremental", "repetition", "blurry"] = setting(
        "class_incremental", "class_incremental: each class occurs in one task only; others: docs/cli.md"
    )
    online: bool = setting(False, "use each sample once: gradient learners train for one epoch")
    experiences: int = setting(0, "repetition: number of experiences; 0: twice the number of tasks", minimum=0)
    repetition: float = setting(
        0.5, "repetition: probability that an earlier class occurs again in an experience", minimum=0, maximum=1
    )
    disjoint: float = setting(0.5, "blurry: N, share of the classes that occur in one task only", minimum=0, maximum=1)
    leakage: float = setting(
        0.1, "blurry: M, share of the samples of the other classes that occur in other tasks", minimum=0, maximum=1
    )


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Execution of a run (`run.*`)."""

    seed: int = setting(0, "seed of the class order, the held-out split and every learner", minimum=0, maximum=2**31)
    out: str = setting("runs", "folder that contains the numbered run folders")
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "auto: CUDA if a CUDA kernel runs, else the CPU")
    threads: int = setting(0, "number of PyTorch threads; 0: one per core", minimum=0, maximum=1024)
    baselines: bool = setting(True, "also run ssd, sdmlp and finetune on the same stream")
    panel: bool = setting(True, "also run NCM, SLDA, ridge, RanPAC, KLDA, FeCAM, FlyModel and joint training")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Configuration of `ssd-edge train`. The settings in `learner` are checked by `learners.settings_class`."""

    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    backbone: BackboneConfig = dataclasses.field(default_factory=BackboneConfig)
    stream: StreamConfig = dataclasses.field(default_factory=StreamConfig)
    run: RunConfig = dataclasses.field(default_factory=RunConfig)
    learner: dict[str, Any] = dataclasses.field(default_factory=lambda: {"name": "slda"})


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
    """Training schedule of a backbone, whatever it is trained towards; the defaults take less than an hour on a CPU."""

    epochs: int = setting(14, "passes over the training set", minimum=1)
    batch: int = setting(512, "images per step", minimum=2)
    optimiser: Literal["auto", "sgd", "adamw"] = setting("auto", "auto: sgd for resnet9, adamw for convmixer")
    lr: float = setting(0.0, "peak of the one-cycle schedule; 0: 0.4 for sgd, 0.01 for adamw", minimum=0.0)
    weight_decay: float = setting(0.0, "0: 5e-4 for sgd, 5e-3 for adamw", minimum=0.0)
    crop: int = setting(3, "pixels of reflection padding for random crops", minimum=0, maximum=32)
    cutout: int = setting(0, "side of the grey square that covers a part of each image; 0: none", minimum=0, maximum=32)
    size: int = setting(32, "side of the square input in pixels", minimum=8, maximum=256)
    seed: int = setting(0, "seed of initialisation, sample order and augmentation", minimum=0, maximum=2**31)
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "auto: CUDA if a CUDA kernel runs, else the CPU")
    threads: int = setting(0, "number of PyTorch threads; 0: one per core", minimum=0, maximum=1024)
    amp: bool = setting(True, "bfloat16 autocast, where the processor has it")


@dataclasses.dataclass(frozen=True)
class PretrainingConfig(ScheduleConfig):
    """Training of a backbone on labels (`train.*` of `ssd-edge pretrain`)."""

    arch: Literal["resnet9", "convmixer"] = setting(
        "resnet9", "network; convmixer (256/8, as in the paper) needs a GPU"
    )
    label_smoothing: float = setting(0.1, "label smoothing of the cross-entropy", minimum=0.0, maximum=0.9)
    terms: str = setting("not stated", "terms of use of the images, for the card")


@dataclasses.dataclass(frozen=True)
class DistillationConfig(ScheduleConfig):
    """Training of a student towards its teachers (`train.*` of `ssd-edge distill`)."""

    epochs: int = setting(12, "passes over the photographs", minimum=1)
    batch: int = setting(32, "images per step", minimum=2)
    optimiser: Literal["auto", "sgd", "adamw"] = setting("adamw", "optimiser; auto: adamw")
    lr: float = setting(1e-3, "peak of the one-cycle schedule", minimum=0.0)
    weight_decay: float = setting(0.0, "0: 5e-4 for sgd, 5e-3 for adamw", minimum=0.0)
    crop: int = setting(6, "pixels of reflection padding for random crops", minimum=0, maximum=32)
    size: int = setting(
        0, "side of the student's square input in pixels; 0: its own, 64 for resnet9", minimum=0, maximum=256
    )
    student: str = setting("resnet9", "network to train: resnet9, lite0, lite2, timm/…, torchvision/…, package:FOLDER")
    weights: str = setting("", "local file of weights that a student of a library starts from; empty: its own")
    minutes: float = setting(
        0.0, "time for the training; the epochs that fit in; 0: as many as epochs says", minimum=0.0
    )
    temperature: float = setting(4.0, "T that softens class scores of runs", above=0.0, maximum=100.0)
    features: float = setting(1.0, "weight of matching the teachers' features", minimum=0.0)
    scores: float = setting(1.0, "weight of matching the class scores of runs", minimum=0.0)


@dataclasses.dataclass(frozen=True)
class StudentConfig:
    """Pretraining of SDMLP keys on embeddings of the backbone's own data (paper: ImageNet32)."""

    neurons: int = setting(1000, "number of neurons, r", minimum=2)
    k: int = setting(10, "number of active neurons", minimum=1)
    shift: float = setting(0.0, "shift s of the input, ReLU(z - s)")
    epochs: int = setting(4, "passes over the pretraining embeddings", minimum=1)
    lr: float = setting(
        3.0, "learning rate of SGD; with the 0.05 of later tasks, 200 classes need hundreds of epochs", above=0.0
    )


@dataclasses.dataclass(frozen=True)
class PretrainConfig:
    """Configuration of `ssd-edge pretrain`."""

    data: DataConfig = dataclasses.field(default_factory=lambda: DataConfig(path=""))
    train: PretrainingConfig = dataclasses.field(default_factory=PretrainingConfig)
    student: StudentConfig = dataclasses.field(default_factory=StudentConfig)


@dataclasses.dataclass(frozen=True)
class DistillConfig:
    """Configuration of `ssd-edge distill`."""

    train: DistillationConfig = dataclasses.field(default_factory=DistillationConfig)


_BOOLEANS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}  # as in YAML


def _type_name(kind: Any) -> str:
    if typing.get_origin(kind) is Literal:
        return "one of " + ", ".join(str(choice) for choice in typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        return f"a list of {_type_name(typing.get_args(kind)[0])}"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}.get(kind, str(kind))


def _convert(value: Any, kind: Any, key: str) -> Any:
    """Return a value converted to the type of its setting.

    Integers are accepted for floats. Text is parsed, because command-line arguments are text and so is ``1e-3`` in YAML
    1.1.

    Raises:
        InputError: The value has the wrong type.
    """
    wrong = InputError(f"{key} must be {_type_name(kind)}, but is {value!r}")
    origin = typing.get_origin(kind)
    if origin is Literal:
        choices = {str(choice): choice for choice in typing.get_args(kind)}
        if str(value) not in choices:
            raise InputError(f"{wrong}.{did_you_mean(str(value), choices)}")
        return choices[str(value)]
    if origin in (typing.Union, types.UnionType):
        for option in typing.get_args(kind):
            try:
                return _convert(value, option, key)
            except InputError:
                continue
        wanted = " or ".join(_type_name(option) for option in typing.get_args(kind))
        raise InputError(f"{key} must be {wanted}, but is {value!r}")
    if origin is tuple:
        element = typing.get_args(kind)[0]
        if isinstance(value, str):
            value = [part.strip() for part in value.split(",") if part.strip()]
        if not isinstance(value, list | tuple):
            raise wrong
        return tuple(_convert(item, element, key) for item in value)
    if kind is bool:
        if isinstance(value, str):
            value = _BOOLEANS.get(value.lower())
        if not isinstance(value, bool):
            raise wrong
        return value
    if kind in (int, float):
        if isinstance(value, bool) or not isinstance(value, (int, str) if kind is int else (int, float, str)):
            raise wrong
        try:
            return kind(value)
        except (ValueError, OverflowError):  # OverflowError: an integer of over 300 digits as a float
            raise wrong from None
    if kind is str:
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise wrong
        with contextlib.suppress(UnicodeEncodeError):
            str(value).encode()  # a path from the command line may be any bytes, but a record of the run is UTF-8
            return str(value)
        raise InputError(f"{key} must be valid UTF-8, but is '{value}'; rename the file or folder")
    raise AssertionError(f"{key}: unsupported type {kind}")


def _not_a_mapping(section: str, value: Any) -> InputError:
    return InputError(f"the section '{section}' must be a mapping of keys to values, but is {value!r}")


def parse_section(cls: type[T], values: Mapping[str, Any], section: str) -> T:
    """Build a section from plain values.

    Raises:
        InputError: A key is unknown, or a value has the wrong type or is out of range.
    """
    if not isinstance(values, Mapping):
        raise _not_a_mapping(section, values)
    hints = typing.get_type_hints(cls)
    known = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    converted = {}
    for name, value in values.items():
        key = f"{section}.{name}"
        if name not in known:
            hint = did_you_mean(str(name), known)
            raise InputError(f"unknown key '{key}'.{hint} Known: {', '.join(known)}")
        converted[name] = value = _convert(value, hints[name], key)
        metadata = known[name].metadata
        numbers = value if isinstance(value, tuple) else (value,)
        for number in numbers:
            if isinstance(number, bool) or not isinstance(number, int | float):
                continue
            if number != number or number in (float("inf"), float("-inf")):
                raise InputError(f"{key} must be a finite number, but is {number}")
            if abs(number) > LARGEST_NUMBER:
                raise InputError(f"{key} must be between ±{LARGEST_NUMBER:g}, but is {short(number)}")
            if metadata.get("minimum") is not None and number < metadata["minimum"]:
                raise InputError(f"{key} must be at least {metadata['minimum']}, but is {number}")
            if metadata.get("maximum") is not None and number > metadata["maximum"]:
                raise InputError(f"{key} must be at most {metadata['maximum']}, but is {number}")
            if metadata.get("above") is not None and number <= metadata["above"]:
                raise InputError(f"{key} must be greater than {metadata['above']}, but is {number}")
    return cls(**converted)


class _Loader(yaml.SafeLoader):
    """Loader that refuses aliases: ten lines of aliases to aliases make a value of a billion parts."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.composer.ComposerError(None, None, "an alias (*) is not supported: repeat it", mark)
        return super().compose_node(parent, index)


class _TextLoader(_Loader):
    """Loader that constructs only texts, lists and mappings, as `yaml.BaseLoader` does."""

    yaml_implicit_resolvers = yaml.BaseLoader.yaml_implicit_resolvers
    yaml_constructors = yaml.BaseLoader.yaml_constructors


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a configuration file.

    Raises:
        InputError: The file does not exist, is too large, is not valid YAML, contains an alias, or is not a mapping.
    """
    try:
        with open(path, "rb") as stream:
            data = stream.read(MAX_YAML_BYTES + 1)
        if len(data) > MAX_YAML_BYTES:
            raise InputError(f"the configuration {path} has more than {MAX_YAML_BYTES:,} bytes; is it the right file?")
        value = yaml.load(data.decode("utf-8"), Loader=_Loader)
    except OSError as error:
        raise InputError(f"the configuration {path} cannot be read ({error.strerror})") from error
    except (InputError, MemoryError):
        raise
    except (
        Exception
    ) as error:  # YAMLError; ValueError, e.g. for a date such as 2024-13-40; AttributeError for !!timestamp
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"the configuration {path} is not valid YAML: {reason}") from error
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise InputError(f"{path} must contain sections (data:, learner:, …), but contains {value!r:.100}")
    return value


def merge(tree: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Return a tree read from YAML with ``section.key=value`` overrides applied.

    Values stay text, which `parse_section` converts to the type of the setting: YAML would change folder names such as
    ``007``, ``1.10`` or ``no``. ``[a, b]`` is a list of texts. ``backbone=NAME`` is short for ``backbone.name=NAME``.

    Raises:
        InputError: An override has another form.
    """
    merged = {section: dict(values) if isinstance(values, Mapping) else values for section, values in tree.items()}
    for override in overrides:
        key, equals, text = override.partition("=")
        key = SHORT.get(key, key)
        section, dot, name = key.partition(".")
        if not (equals and dot and section and name):
            raise InputError(f"'{override}' is not of the form section.key=value, e.g. data.path=FOLDER")
        target = merged.get(section)
        if target is None:
            target = merged[section] = {}
        if not isinstance(target, dict):
            raise _not_a_mapping(section, target)
        target[name] = _list_or_text(text)
    return merged


def _list_or_text(text: str) -> list[Any] | str:
    """Parse ``[a, b]`` as a list of texts; return any other text, such as one with an unclosed bracket, unchanged."""
    if text.startswith("["):
        with contextlib.suppress(yaml.YAMLError, RecursionError):
            value = yaml.load(text, Loader=_TextLoader)
            if isinstance(value, list):
                return value
    return text


def parse(cls: type[T], tree: Mapping[str, Any]) -> T:
    """Build a `TrainConfig` or `PretrainConfig` from a tree of plain values.

    Raises:
        InputError: A section or key is unknown, or a value has the wrong type or is out of range.
    """
    sections = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls)
    default = cls()
    built = {}
    for name, values in tree.items():
        if name not in sections:
            hint = did_you_mean(str(name), sections)
            raise InputError(f"unknown section '{name}'.{hint} Known: {', '.join(sections)}")
        if values is None:
            continue  # a section with every key commented out
        if not isinstance(values, Mapping):
            raise _not_a_mapping(name, values)
        if dataclasses.is_dataclass(hints[name]):
            given = dataclasses.asdict(getattr(default, name))
            built[name] = parse_section(hints[name], {**given, **values}, name)
        else:
            built[name] = {**getattr(default, name), **values}
    return cls(**built)


def to_tree(config: Any) -> dict[str, Any]:
    """Return the plain values of a configuration, as saved with a run; `parse` restores an equal configuration."""
    tree = dataclasses.asdict(config)
    return {
        section: {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
        for section, values in tree.items()
    }
