"""Python API of the workstation: `train`, `resume`, `load_run`, and `Classifier` for plain arrays."""

from __future__ import annotations

import functools
from collections.abc import Hashable, Iterable, Iterator, Mapping
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from ssd_edge import files, images, learners
from ssd_edge.backbones.embedder import Embedder, standardisation
from ssd_edge.config import SHORT, TrainConfig, parse, read_yaml, to_tree
from ssd_edge.errors import BundleRefusedError, InputError
from ssd_edge.images import Pixels, check_embedded
from ssd_edge.learners.priors import Priors
from ssd_edge.report import events
from ssd_edge.report.compare import ROLES, lead_note, ranked
from ssd_edge.report.events import Listener, Message
from ssd_edge.report.wording import describe_stream, percent, points
from ssd_edge.run import evaluate as evaluation
from ssd_edge.run import finished
from ssd_edge.run import train as training
from ssd_edge.run.embed import EMBED_BATCH
from ssd_edge.run.finished import FinishedRun
from ssd_edge.run.results import Evaluation
from ssd_edge.system import duration, size

if TYPE_CHECKING:
    from exporters.deploy import DeployResult

ImageLike: TypeAlias = "str | Path | Image.Image | np.ndarray"
Label: TypeAlias = "str | int"


def train(
    source: str | Path | Mapping[str, Any] | TrainConfig = "digits",
    /,
    *,
    learner: str | Mapping[str, Any] | None = None,
    panel: bool | None = None,
    baselines: bool | None = None,
    out: str | Path | None = None,
    seed: int | None = None,
    progress: bool | Listener = True,
    **overrides: Any,
) -> Run:
    """Train a learner on a data set, task by task, and compare it with others on the same embeddings.

    Args:
        source: A data set (a folder with one subfolder per class, an archive, or ``digits``), a YAML file, or a
            configuration.
        learner: Name of the learner, ``auto``, or a mapping with ``name`` and its settings; ``slda`` by default.
        panel: Train the panel of other learners and joint training too; True by default.
        baselines: Train the SDMLP baselines too; True by default.
        out: Folder in which the run's numbered folder is created; ``runs`` by default.
        seed: Seed of everything random; 0 by default.
        progress: True prints progress, False prints nothing; a function receives `ssd_edge.report.events`.
        **overrides: Further settings, as sections (``stream={"tasks": 5}``) or single keys
            (``**{"stream.tasks": 5}``); ``backbone="lite2"`` names a backbone. `ssd-edge config` lists them.

    Returns:
        The finished run.

    Raises:
        InputError: If a setting or the data cannot be used.
        EnvironmentUnfitError: If a package is missing or a file cannot be written.

    Example:
        >>> import ssd_edge
        >>> run = ssd_edge.train("digits", panel=False, stream={"tasks": 5})
        >>> run.accuracy > 0.9
        True
    """
    run_keys = {"panel": panel, "baselines": baselines, "out": out and str(out), "seed": seed}
    tree = _tree(source, learner, {key: value for key, value in run_keys.items() if value is not None}, overrides)
    listener = _listener(progress)
    run = training.start(parse(TrainConfig, tree), ["ssd-edge", "train", *_words(tree)], listener)
    return _execute(run, "started", listener)


def resume(folder: str | Path, *, progress: bool | Listener = True) -> Run:
    """Continue an interrupted run after its last finished task.

    Args:
        folder: Folder of the run, e.g. ``runs/1``.
        progress: As in `train`.

    Returns:
        The finished run.

    Raises:
        InputError: If the folder is not a run, or if its data or backbone have changed.

    Example:
        >>> run = ssd_edge.resume("runs/1")
    """
    listener = _listener(progress)
    return _execute(training.resume(Path(folder), listener), "resumed", listener)


def load_run(folder: str | Path) -> Run:
    """Load a finished run.

    Args:
        folder: Folder of the run, e.g. ``runs/1``.

    Raises:
        InputError: If the folder is not a run, or the run is not finished.
        BundleRefusedError: If a file of the run is damaged.

    Example:
        >>> run = ssd_edge.load_run("runs/1")
        >>> run.predict("frame.jpg")
        ['gear']
    """
    return Run(finished.read(Path(folder)))


class Run:
    """A finished training run. `train`, `resume` and `load_run` return one."""

    def __init__(self, state: FinishedRun) -> None:
        self._state = state

    @property
    def folder(self) -> Path:
        """Folder of the run."""
        return self._state.folder

    @property
    def config(self) -> TrainConfig:
        """Resolved configuration."""
        return self._state.config

    @property
    def metrics(self) -> dict[str, Any]:
        """Content of ``metrics.json``."""
        return self._state.metrics

    @property
    def accuracy(self) -> float:
        """Mean test accuracy over all tasks after the last one."""
        return float(self.metrics["average_accuracy"])

    @property
    def report_path(self) -> Path:
        """HTML report."""
        return self.folder / "report.html"

    @property
    def classes(self) -> list[str]:
        """Class names in the order in which they were learned."""
        return list(self._state.registry.names)

    @property
    def learner(self) -> learners.Learner:
        """The learner after the last task. It takes standardised embeddings as tensors."""
        return self._state.learner

    def compare(self, progress: bool | Listener = True) -> Run:
        """Train the baselines, the panel and joint training on the stream of this run, as ``ssd-edge compare`` does.

        Args:
            progress: As in `train`.

        Returns:
            The run with their results in its metrics and report; those that were trained before are kept.

        Raises:
            InputError: If the data has changed or is gone.

        Example:
            >>> run.compare().metrics["panel"]["ridge"]
            0.859
        """
        training.resume(self.folder, _listener(progress)).compare()
        return load_run(self.folder)

    @functools.cached_property
    def _embedder(self) -> Embedder:
        return evaluation.open_embedder(self.folder, self.config)

    def embed(self, images: ImageLike | Iterable[ImageLike]) -> np.ndarray:
        """Return the standardised embeddings of images, float32 ``(N, D)``.

        Args:
            images: As in `predict`.

        Raises:
            InputError: If an image cannot be read or embedded, or the backbone is not the one of the run.

        Example:
            >>> run.embed(["a.jpg", "b.jpg"]).shape
            (2, 256)
        """
        parts, names = [], []
        for pixels, named in _batches(images, self._embedder.pixels):
            parts.append(evaluation.standardise(self.folder, self._embedder, self._embedder.embed(pixels)))
            names += named
        embeddings = np.concatenate(parts) if parts else np.zeros((0, self._embedder.dim), np.float32)
        check_embedded(embeddings, names)
        return embeddings

    def predict(self, images: ImageLike | Iterable[ImageLike]) -> list[str]:
        """Classify images.

        Args:
            images: Files, folders, PIL images or uint8 arrays ``(H, W, 3)``; one or several, also as one array
                ``(N, H, W, 3)``. Folders are searched for images.

        Returns:
            One class name per image.

        Raises:
            InputError: If an image cannot be read or embedded, or the backbone is not the one of the run.

        Example:
            >>> run.predict(["a.jpg", "b.jpg"])
            ['circle', 'square']
        """
        embeddings = self.embed(images)
        rows = self.learner.predict(torch.from_numpy(embeddings)).tolist() if len(embeddings) else []
        return [self.classes[row] for row in rows]

    def evaluate(
        self, data: str | Path | Mapping[str, Any] | None = None, *, progress: bool | Listener = False
    ) -> Evaluation:
        """Measure the accuracy on images.

        Args:
            data: A data set, or a mapping of ``data`` settings such as ``{"path": "photos", "exclude": ["gear"]}``;
                None for the test images of the run.
            progress: As in `train`.

        Returns:
            Accuracy over all images and by class.

        Raises:
            InputError: If the data cannot be read or has a class that the run did not learn.

        Example:
            >>> run.evaluate("photos").accuracy
            0.93
        """
        config = self.config
        if data is not None:
            selection = data if isinstance(data, Mapping) else {"path": str(data)}
            config = evaluation.with_data(config, selection)
        return evaluation.evaluate(self.folder, config, _listener(progress))

    def deploy(
        self,
        output: str | Path,
        target: str = "jetson",
        *,
        precision: str | None = None,
        calibration: str | Path | None = None,
        head: bool = False,
        sign: str | Path | None = None,
        empty: bool = False,
        release: int | None = None,
        progress: bool | Listener = True,
    ) -> DeployResult:
        """Export the backbone, check it, and write a bundle for a device.

        Args:
            output: File to write, e.g. ``robot.ssdedge``.
            target: Board to prepare for, e.g. ``jetson``, ``jetson-orin-nano`` or ``cpu``.
            precision: ``fp32``, ``fp16``, ``int8`` or ``auto``; None for the default of the target.
            calibration: Folder of images for int8; None for training images of the run.
            head: Add the learner as ``head.onnx`` for hosts that only predict.
            sign: File of a private key.
            empty: Leave out what was learned; every class is learned on the device.
            release: Release number; None for the finish time of the run.
            progress: As in `train`.

        Returns:
            The facts that ``ssd-edge deploy --json`` prints, as attributes such as ``sha256`` and ``precision``.

        Raises:
            InputError: If an option cannot be used.
            GateRefusedError: If the exported backbone does not compute what the run computed.

        Example:
            >>> run.deploy("robot.ssdedge", target="jetson-orin-nano").precision
            'fp16'
        """
        from exporters.deploy import Options, deploy

        listener = _listener(progress)
        options = Options(
            target=target,
            precision=precision or "",
            calibration=None if calibration is None else Path(calibration),
            head=head,
            sign=None if sign is None else Path(sign),
            empty=empty,
            release=release,
        )
        return deploy(self.folder, options, Path(output), lambda text: listener(Message(text)))

    def __repr__(self) -> str:
        """Return a short table."""
        rows = [("", *_COLUMNS), *_comparison(self.metrics)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
        return "\n".join([f"Run({str(self.folder)!r}): {_describe(self.metrics)}", *map(str.rstrip, lines)])

    def _repr_html_(self) -> str:
        """Return a short table for notebooks."""
        heading = "".join(f"<th>{escape(name)}</th>" for name in ("", *_COLUMNS))
        body = "".join(
            f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in _comparison(self.metrics)
        )
        note = lead_note(self.metrics)
        return (
            f"<p><b>{escape(_describe(self.metrics))}</b><br><code>{escape(str(self.report_path))}</code></p>"
            f"<table><thead><tr>{heading}</tr></thead><tbody>{body}</tbody></table>"
            + (f"<p>{escape(note)}</p>" if note else "")
        )


_COLUMNS = ("role", "average accuracy", "forgetting", "time", "state")


def _describe(metrics: Mapping[str, Any]) -> str:
    """Return one phrase on what a run trained and on what."""
    return f"{metrics['display']} on {metrics['data']}, {describe_stream(metrics)}"


def _comparison(metrics: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return one row per method, the most accurate first."""
    return [
        (
            method.display,
            ROLES[method.role],
            percent(method.values["average_accuracy"]),
            points(method.values.get("forgetting")),
            duration(method.values.get("seconds")),
            size(method.values.get("state_bytes")),
        )
        for method in ranked(metrics)
    ]


class Classifier:
    """Continual classifier for plain arrays, in the style of scikit-learn.

    It learns new classes, or more samples of known ones, with every call of `learn`, and keeps no samples.

    Args:
        learner: Name of a learner, e.g. ``slda``, ``ncm``, ``ridge`` or ``ssd``.
        standardise: Standardise features with the mean and deviation of the first call of `learn`; leave it on unless
            the features are standardised already.
        seed: Seed of everything random.
        **settings: Settings of the learner, e.g. ``epochs=20``.

    Raises:
        InputError: If there is no such learner or setting.

    Example:
        >>> import numpy as np
        >>> X = np.random.default_rng(0).normal(size=(60, 16)) + np.repeat(np.eye(3, 16) * 8, 20, axis=0)
        >>> y = ["gear"] * 20 + ["bolt"] * 20 + ["nut"] * 20
        >>> model = ssd_edge.Classifier("ncm").learn(X[:40], y[:40])
        >>> model.learn(X[40:], y[40:]).classes
        ['gear', 'bolt', 'nut']
        >>> model.predict(X[[0, 59]])
        array(['gear', 'nut'], dtype='<U4')
    """

    def __init__(self, learner: str = "slda", *, standardise: bool = True, seed: int = 0, **settings: Any) -> None:
        self._options = {"name": learner, **settings}
        if learners.wants_second_view(self._options):  # raises for a wrong name or setting
            raise InputError(
                "learner.second_view looks at images, but a Classifier gets features; leave it out, or use train()"
            )
        self._standardise, self._seed = standardise, seed
        self._learner: learners.Learner | None = None
        self._moments: tuple[np.ndarray, np.ndarray] | None = None  # mean and deviation (D,), float32
        self._labels: list[Label] = []  # by row

    @property
    def classes(self) -> list[Label]:
        """Labels in the order in which they were first learned."""
        return [self._labels[row] for row in self._rows()]

    @property
    def learner(self) -> learners.Learner:
        """The underlying learner.

        Raises:
            InputError: If nothing has been learned yet.
        """
        if self._learner is None:
            raise InputError("the classifier has not learned anything yet; call learn(X, y) first")
        return self._learner

    def learn(self, X: npt.ArrayLike, y: Iterable[Label]) -> Classifier:
        """Learn samples of new or known classes.

        Args:
            X: Features ``(N, D)``.
            y: One label per sample, all strings or all integers.

        Returns:
            This classifier.

        Raises:
            InputError: If shapes disagree, a value is NaN or infinite, or labels mix types.

        Example:
            >>> model.learn(X_new, ["washer"] * len(X_new))
            Classifier('ncm', classes=['gear', 'bolt', 'nut', 'washer'])
        """
        features, labels = _features(X), [_plain(label) for label in y]
        moments, learner = self._moments, self._learner
        if learner is None:
            if self._standardise:
                if len(features) < 2:
                    raise InputError(
                        f"standardisation needs at least two samples in the first call of learn, but X has "
                        f"{len(features)}; pass more, or use standardise=False"
                    )
                mean, deviation = standardisation(features)
                moments = mean.astype(np.float32), deviation.astype(np.float32)
            learner = learners.build(self._options, features.shape[1], Priors(), self._seed)
        known = list(dict.fromkeys([*self._labels, *labels]))
        if len({type(label) for label in known}) > 1:
            raise InputError("labels must be all strings or all integers, but both were given; convert one kind")
        row_of = {label: row for row, label in enumerate(known)}
        rows = torch.tensor([row_of[label] for label in labels], dtype=torch.int64)
        learner.learn(learners.Task(_standardised(features, moments), rows))
        self._learner, self._moments, self._labels = learner, moments, known
        return self

    partial_fit = learn

    def predict(self, X: npt.ArrayLike) -> np.ndarray:
        """Return the label of each sample, ``(N,)``.

        Args:
            X: Features ``(N, D)``.

        Raises:
            InputError: If nothing has been learned, or X has another D.

        Example:
            >>> model.predict(X[:2])
            array(['gear', 'gear'], dtype='<U6')
        """
        labels: np.ndarray = np.asarray(self._labels)[self.learner.predict(self._embeddings(X)).numpy()]
        return labels

    def decision_function(self, X: npt.ArrayLike) -> np.ndarray:
        """Return the scores of the classes, float32 ``(N, len(classes))``; higher is more likely.

        Args:
            X: Features ``(N, D)``.

        Example:
            >>> model.decision_function(X).argmax(1)
        """
        scores: np.ndarray = self.learner.scores(self._embeddings(X)).numpy()
        return scores[:, self._rows()]

    def score(self, X: npt.ArrayLike, y: Iterable[Label]) -> float:
        """Return the accuracy on labelled samples.

        Args:
            X: Features ``(N, D)``.
            y: One label per sample.

        Example:
            >>> model.score(X, y)
            1.0
        """
        return float(np.mean(self.predict(X) == np.asarray([_plain(label) for label in y])))

    def forget(self, label: Label, *, approximate: bool = False) -> Classifier:
        """Remove a class, as if it had never been learned.

        Args:
            label: Label of the class.
            approximate: Accept that traces of the class stay where the learner cannot remove it exactly.

        Raises:
            InputError: If the class is unknown, or the learner cannot remove it exactly and `approximate` is False.

        Example:
            >>> model.forget("bolt").classes
            ['gear', 'nut']
        """
        if _plain(label) not in self.classes:
            raise InputError(f"the class {label!r} has not been learned; known: {', '.join(map(str, self.classes))}")
        self.learner.remove(self._labels.index(_plain(label)), approximate)
        return self

    def save(self, path: str | Path) -> None:
        """Save to a safetensors file; `load` restores a classifier with equal predictions.

        Args:
            path: File to write, e.g. ``parts.safetensors``.

        Example:
            >>> model.save("parts.safetensors")
        """
        arrays, metadata = learners.pack(self.learner)
        if self._moments is not None:
            arrays = {**arrays, _MEAN: self._moments[0], _DEVIATION: self._moments[1]}
        files.write_tensors(Path(path), arrays, {"classifier": metadata, "classes": self._labels})

    @classmethod
    def load(cls, path: str | Path) -> Classifier:
        """Load a classifier that `save` wrote.

        Args:
            path: File to read.

        Raises:
            InputError: If there is no such file.
            BundleRefusedError: If it is damaged or not a classifier.

        Example:
            >>> ssd_edge.Classifier.load("parts.safetensors").predict(X[:1])
            array(['gear'], dtype='<U4')
        """
        arrays, metadata = files.read_tensors(Path(path))
        try:
            stored, labels = metadata["classifier"], list(metadata["classes"])
            options = {**stored["settings"], "learner": stored["learner"], "seed": stored["seed"]}
        except (KeyError, TypeError) as error:
            raise BundleRefusedError(f"{path} is not a saved classifier; write one with Classifier.save") from error
        arrays, moments = dict(arrays), None
        if _MEAN in arrays and _DEVIATION in arrays:
            moments = arrays.pop(_MEAN), arrays.pop(_DEVIATION)
        model = cls(standardise=moments is not None, **options)
        model._learner, model._moments, model._labels = learners.restore(arrays, stored), moments, labels
        return model

    def _rows(self) -> list[int]:
        return [] if self._learner is None else [int(row) for row in self._learner.seen.nonzero().flatten()]

    def _embeddings(self, X: npt.ArrayLike) -> torch.Tensor:
        dim, features = self.learner.dim, _features(X)
        if features.shape[1] != dim:
            raise InputError(f"X has {features.shape[1]} features, but the classifier learned with {dim}; pass {dim}")
        return _standardised(features, self._moments)

    def __repr__(self) -> str:
        """Return name and classes."""
        return f"Classifier({self._options['name']!r}, classes={self.classes!r})"


_MEAN, _DEVIATION = "standardise.mean", "standardise.deviation"


def _features(X: npt.ArrayLike) -> np.ndarray:
    try:
        features = np.ascontiguousarray(X, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise InputError(f"X must be an array of numbers of shape (N, D) ({error})") from error
    if features.ndim != 2 or not features.shape[1]:
        raise InputError(f"X must have the shape (N, D), but has {features.shape}")
    return features


def _standardised(features: np.ndarray, moments: tuple[np.ndarray, np.ndarray] | None) -> torch.Tensor:
    return torch.from_numpy(features if moments is None else (features - moments[0]) / moments[1])


def _plain(label: Hashable) -> Label:
    """Return a label as a Python string or integer."""
    value = label.item() if isinstance(label, np.generic) else label
    if not isinstance(value, str | int) or isinstance(value, bool):
        raise InputError(f"a label must be a string or an integer, but is {value!r}")
    return value


def _execute(run: training.Run, verb: str, listener: Listener) -> Run:
    listener(Message(f"{run.folder}: {verb}"))
    try:
        run.execute()
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"continue with: ssd_edge.resume({str(run.folder)!r})") from None
    return load_run(run.folder)


def _listener(progress: bool | Listener) -> Listener:
    if callable(progress):
        return progress
    if not progress:
        return events.ignore
    from ssd_edge.report.terminal import Console

    return Console()


def _tree(
    source: str | Path | Mapping[str, Any] | TrainConfig,
    learner: str | Mapping[str, Any] | None,
    run_keys: Mapping[str, Any],
    overrides: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the plain values of a configuration; later arguments win."""
    tree: dict[str, Any] = {}
    if isinstance(source, TrainConfig):
        tree = to_tree(source)
    elif isinstance(source, Mapping):
        tree = dict(source)
    elif Path(source).suffix in (".yaml", ".yml"):
        tree = read_yaml(Path(source))
    else:
        tree = {"data": {"path": str(source)}}
    if learner is not None:
        section = dict(learner) if isinstance(learner, Mapping) else {"name": learner}
        given = tree.get("learner") or {}
        same = "name" not in section or section["name"] == given.get("name")
        tree["learner"] = {**given, **section} if same else section
    if run_keys:
        tree["run"] = {**(tree.get("run") or {}), **run_keys}
    for key, value in overrides.items():
        section_name, dot, name = SHORT.get(key, key).partition(".") if isinstance(value, str) else key.partition(".")
        if dot:
            value = {name: value}
        if isinstance(value, Mapping) and isinstance(tree.get(section_name) or {}, Mapping):
            value = {**(tree.get(section_name) or {}), **value}
        tree[section_name] = value
    return tree


def _words(tree: Mapping[str, Any]) -> list[str]:
    """Return the arguments with which ``ssd-edge train`` gives the same run."""
    return [
        f"{section}.{key}={','.join(map(str, value)) if isinstance(value, list | tuple) else value}"
        for section, values in tree.items()
        for key, value in (values or {}).items()
    ]


def _batches(sources: ImageLike | Iterable[ImageLike], form: Pixels) -> Iterator[tuple[np.ndarray, list[str]]]:
    """Yield images as uint8 arrays ``(N, size, size, 3)``, with their names."""
    items: list[Any] = []
    for item in images.listed(sources):
        items += images.image_files([Path(item)]) if isinstance(item, str | Path) else [item]
    problems = images.Problems()
    for start in range(0, len(items), EMBED_BATCH):
        batch = items[start : start + EMBED_BATCH]
        names = [str(item) if isinstance(item, Path) else f"image {start + n}" for n, item in enumerate(batch)]
        pixels = []
        for item, name in zip(batch, names, strict=True):
            with problems.collect():
                pixels.append(_decode(item, name, form))
        if not problems:  # behind a bad one, only others are looked for
            yield np.stack(pixels), names
    problems.check(len(items), "leave them out")


def _decode(item: Path | Image.Image | np.ndarray, name: str, form: Pixels) -> np.ndarray:
    if isinstance(item, Path):
        return images.decode(images.read(item), name, form)
    if isinstance(item, Image.Image):
        return images.to_array(item, name, form)
    return images.from_array(item, form, name)
