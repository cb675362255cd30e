"""The Python API: train, load, evaluate and deploy a run, and a learner on plain arrays."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import ssd_edge
from ssd_edge import files
from ssd_edge.errors import BundleRefusedError, InputError
from ssd_edge.report.events import Event, Message, TaskLearned
from ssd_edge.run import train as training

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).resolve().parents[2]
QUICK = {"backbone": "tiny", "panel": False, "baselines": False, "progress": False}


def clusters(samples: int = 20, dim: int = 16) -> tuple[np.ndarray, list[str]]:
    """Return three well separated clusters with names."""
    rng = np.random.default_rng(0)
    features = rng.normal(size=(3 * samples, dim)) + np.repeat(np.eye(3, dim) * 8, samples, axis=0)
    return features, ["gear"] * samples + ["bolt"] * samples + ["nut"] * samples


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> ssd_edge.Run:
    """A run on a part of the bundled digits."""
    out = tmp_path_factory.mktemp("runs")
    few = {"stream": {"tasks": 2}, "data.max_per_class": 40}
    return ssd_edge.train("digits", out=out, **few, **QUICK)


def test_the_import_is_light() -> None:
    code = "import sys, ssd_edge; print('torch' in sys.modules, 'numpy' in sys.modules, ssd_edge.__version__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.split() == ["False", "False", ssd_edge.__version__]


def test_names_of_the_package() -> None:
    assert set(ssd_edge.__all__) <= set(dir(ssd_edge))
    assert all(callable(getattr(ssd_edge, name)) for name in ssd_edge.__all__)
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        ssd_edge.trian  # noqa: B018


def test_train(run: ssd_edge.Run) -> None:
    assert run.folder.name == "1"
    assert run.report_path.is_file()
    assert run.accuracy == run.metrics["average_accuracy"] > 0.9
    assert run.metrics == files.read_json(run.folder / "metrics.json")
    assert sorted(run.classes) == [str(digit) for digit in range(10)]
    assert run.learner.name == run.metrics["learner"] == "slda"
    assert run.config.stream.tasks == 2
    record = files.read_json(run.folder / "run.json")
    assert record["argv"][:3] == ["ssd-edge", "train", "data.path=digits"]
    assert "stream.tasks=2" in record["argv"]


def test_the_recorded_command_gives_the_same_run(run: ssd_edge.Run, cli, tmp_path: Path) -> None:
    argv = files.read_json(run.folder / "run.json")["argv"]
    cli(*argv[1:], f"run.out={tmp_path}")
    assert ssd_edge.load_run(tmp_path / "1").metrics["accuracy_matrix"] == run.metrics["accuracy_matrix"]


def test_load_run(run: ssd_edge.Run, tmp_path: Path) -> None:
    loaded = ssd_edge.load_run(str(run.folder))
    assert loaded.metrics == run.metrics
    assert loaded.classes == run.classes
    with pytest.raises(InputError, match="does not exist"):
        ssd_edge.load_run(tmp_path / "1")


def test_resume_continues_an_interrupted_run(shapes: Path, tmp_path: Path) -> None:
    received: list[Event] = []

    def interrupt(event: Event) -> None:
        received.append(event)
        if isinstance(event, TaskLearned):
            raise KeyboardInterrupt

    options = {"learner": "ncm", "backbone": "tiny", "out": tmp_path, "panel": False, "baselines": False}
    with pytest.raises(KeyboardInterrupt, match=r"continue with: ssd_edge\.resume\('.*1'\)"):
        ssd_edge.train(shapes, progress=interrupt, **options)
    assert Message(f"{tmp_path / '1'}: started") in received
    with pytest.raises(InputError, match="is not finished"):
        ssd_edge.load_run(tmp_path / "1")
    resumed = ssd_edge.resume(tmp_path / "1", progress=False)
    whole = ssd_edge.train(shapes, progress=False, **options)
    assert resumed.metrics["accuracy_matrix"] == whole.metrics["accuracy_matrix"]


def test_compare_adds_others_later(shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "BASELINES", ())
    monkeypatch.setattr(training, "PANEL", ("ncm", "slda"))
    monkeypatch.setattr(training, "JOINT", dataclasses.replace(training.JOINT, **training.ONE_PASS))
    options = {"learner": "ncm", "backbone": "tiny", "out": tmp_path, "panel": False, "baselines": False}
    alone = ssd_edge.train(shapes, progress=False, **options)
    assert alone.metrics["panel"] == {}
    compared = alone.compare(progress=False)
    assert set(compared.metrics["panel"]) == {"slda", "joint"}
    assert compared.accuracy == alone.accuracy


def test_evaluate(run: ssd_edge.Run) -> None:
    own = run.evaluate()
    assert own.class_accuracy == run.metrics["class_accuracy"]
    assert own.images == run.metrics["test_images"]
    some = run.evaluate({"path": "digits", "classes": ["0", "1"]})
    assert set(some.class_accuracy) == {"0", "1"}
    with pytest.raises(InputError, match=r"unknown key 'data\.pth'"):
        run.evaluate({"pth": "digits"})


def test_predict_accepts_files_images_and_arrays(shapes: Path, tmp_path: Path) -> None:
    run = ssd_edge.train(shapes, learner="ncm", out=tmp_path, **QUICK)
    folder = shapes / "test" / "circle"
    paths = sorted(folder.iterdir())
    expected = run.predict(paths)
    assert len(expected) == len(paths)
    assert set(expected) <= set(run.classes)
    assert run.predict(folder) == run.predict(str(folder)) == run.predict([folder]) == expected
    pictures = [Image.open(path) for path in paths]
    assert run.predict(pictures) == expected
    pixels = np.stack([np.asarray(picture.convert("RGB")) for picture in pictures])
    assert run.predict(pixels) == run.predict(list(pixels)) == expected
    assert run.predict(paths[0]) == run.predict(pictures[0]) == run.predict(pixels[0]) == expected[:1]
    assert run.predict([]) == []
    assert run.embed(paths[:3]).shape == (3, run.learner.dim)
    correct = [run.predict(shapes / "test" / name).count(name) for name in run.classes]
    assert sum(correct) == pytest.approx(run.evaluate().accuracy * run.metrics["test_images"])
    with pytest.raises(InputError, match="uint8"):
        run.predict(np.zeros((2, 8, 8, 3)))
    with pytest.raises(InputError, match="does not exist"):
        run.predict("missing.jpg")


@pytest.mark.usefixtures("exported_once")
def test_deploy(run: ssd_edge.Run, tmp_path: Path) -> None:
    received: list[Event] = []
    result = run.deploy(tmp_path / "robot.ssdedge", target="cpu", empty=True, progress=received.append)
    assert (tmp_path / "robot.ssdedge").stat().st_size == result.bytes
    assert result.target == "cpu"
    assert any(isinstance(event, Message) and "exporting the backbone" in event.text for event in received)
    with pytest.raises(InputError, match="Did you mean 'jetson'"):
        run.deploy(tmp_path / "x.ssdedge", target="jetsn")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"learner": "slad"}, "unknown learner.name 'slad'"),
        ({"learner": {"name": "ncm", "epochs": 3}}, "unknown key 'learner.epochs'"),
        ({"epochs": 3}, "unknown section 'epochs'"),
        ({"stream": 3}, "the section 'stream' must be a mapping"),
        ({"stream.tsks": 3}, "Did you mean 'tasks'"),
        ({"seed": -1}, "run.seed must be at least 0"),
    ],
)
def test_wrong_settings(arguments: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        ssd_edge.train("digits", out=tmp_path / "runs", backbone="tiny", progress=False, **arguments)
    assert not (tmp_path / "runs").exists()


def test_configurations_of_every_kind(tmp_path: Path) -> None:
    (tmp_path / "small.yaml").write_text("data:\n  path: digits\n  max_per_class: 5\nlearner:\n  name: ncm\n")
    tree = {"data": {"path": "digits", "max_per_class": 5}, "learner": {"name": "ncm"}}
    first = ssd_edge.train(tmp_path / "small.yaml", out=tmp_path / "runs", **QUICK)
    for source in (tree, first.config):
        again = ssd_edge.train(source, out=tmp_path / "runs", **QUICK)
        assert again.config == first.config
        assert again.metrics["accuracy_matrix"] == first.metrics["accuracy_matrix"]
    other = ssd_edge.train(first.config, learner="slda", out=tmp_path / "runs", **QUICK)
    assert other.config.learner == {"name": "slda"}
    assert tree == {"data": {"path": "digits", "max_per_class": 5}, "learner": {"name": "ncm"}}


def test_a_run_shows_as_a_table(run: ssd_edge.Run, trained: Path) -> None:
    lines = repr(run).splitlines()
    assert lines[0] == f"Run('{run.folder}'): SLDA on digits, 10 classes in 2 tasks, class-incremental"
    assert lines[1].split() == ["role", "average", "accuracy", "forgetting", "time", "state"]
    assert len(lines) == 3
    compared = ssd_edge.load_run(trained)
    assert len(repr(compared).splitlines()) == 2 + 11
    page = compared._repr_html_()
    assert page.count("<tr>") == 1 + 11
    assert f"{100 * compared.accuracy:.1f} %" in page


@pytest.mark.parametrize("name", ["slda", "ncm", "ridge", "ssd"])
def test_classifier(name: str, tmp_path: Path) -> None:
    features, labels = clusters()
    model = ssd_edge.Classifier(name).learn(features[:40], labels[:40])
    assert model.classes == ["gear", "bolt"]
    assert model.learn(features[40:], labels[40:]) is model
    assert model.classes == ["gear", "bolt", "nut"]
    assert model.score(features, labels) > 0.9
    predicted = model.predict(features)
    assert predicted.shape == (60,)
    scores = model.decision_function(features)
    assert scores.shape == (60, 3)
    assert [model.classes[row] for row in scores.argmax(1)] == predicted.tolist()
    model.save(tmp_path / "parts.safetensors")
    loaded = ssd_edge.Classifier.load(tmp_path / "parts.safetensors")
    assert np.array_equal(loaded.decision_function(features), scores)
    assert repr(loaded) == f"Classifier('{name}', classes=['gear', 'bolt', 'nut'])"


def test_classifier_forgets_and_relearns() -> None:
    features, labels = clusters()
    model = ssd_edge.Classifier("ncm").learn(features, labels)
    before = model.predict(features)
    assert model.forget("bolt").classes == ["gear", "nut"]
    assert "bolt" not in model.predict(features)
    assert model.decision_function(features).shape == (60, 2)
    with pytest.raises(InputError, match="'bolt' has not been learned; known: gear, nut"):
        model.forget("bolt")
    model.learn(features[20:40], labels[20:40])
    assert np.array_equal(model.predict(features), before)


def test_classifier_forgets_approximately_only_if_asked() -> None:
    features, labels = clusters()
    model = ssd_edge.Classifier("slda").learn(features, labels)
    with pytest.raises(InputError, match="approximately"):
        model.forget("bolt")
    assert model.classes == ["gear", "bolt", "nut"]
    assert model.forget("bolt", approximate=True).classes == ["gear", "nut"]


def test_classifier_with_integers_and_without_standardisation(tmp_path: Path) -> None:
    features, _ = clusters()
    numbers = np.repeat([7, 3, 5], 20)
    model = ssd_edge.Classifier("ncm", standardise=False).learn(features, numbers)
    assert model.classes == [7, 3, 5]
    assert model.predict(features).dtype.kind == "i"
    model.save(tmp_path / "numbers.safetensors")
    loaded = ssd_edge.Classifier.load(tmp_path / "numbers.safetensors")
    assert loaded.classes == [7, 3, 5]
    assert np.array_equal(loaded.predict(features), model.predict(features))


def test_classifier_settings_are_saved(tmp_path: Path) -> None:
    features, labels = clusters()
    model = ssd_edge.Classifier("finetune", seed=3, epochs=2, neurons=8).learn(features, labels)
    model.save(tmp_path / "x.safetensors")
    loaded = ssd_edge.Classifier.load(tmp_path / "x.safetensors")
    assert (loaded.learner.settings, loaded.learner.seed) == (model.learner.settings, 3)
    for classifier in (model, loaded):
        classifier.learn(features[:20], labels[:20])
    assert np.array_equal(loaded.decision_function(features), model.decision_function(features))


def test_classifier_refuses_bad_input(tmp_path: Path) -> None:
    features, labels = clusters()
    with pytest.raises(InputError, match=r"unknown learner\.name"):
        ssd_edge.Classifier("ncmm")
    with pytest.raises(InputError, match=r"unknown key 'learner\.epochs'"):
        ssd_edge.Classifier("ncm", epochs=3)
    model = ssd_edge.Classifier("ncm")
    with pytest.raises(InputError, match="has not learned anything yet"):
        model.predict(features)
    with pytest.raises(InputError, match="at least two samples"):
        model.learn(features[:1], labels[:1])
    for bad, message in (
        (features[:, 0], r"shape \(N, D\)"),
        (features * np.nan, "NaN"),
        (features[:10], "a task needs"),
        ([["a"]], "an array of numbers"),
    ):
        with pytest.raises(InputError, match=message):
            ssd_edge.Classifier("ncm", standardise=False).learn(bad, labels)
    model.learn(features, labels)
    for wrong in (1.5, None, True):
        with pytest.raises(InputError, match="must be a string or an integer"):
            model.learn(features[:2], [wrong, wrong])
    with pytest.raises(InputError, match="all strings or all integers"):
        model.learn(features[:2], [1, 2])
    with pytest.raises(InputError, match="X has 3 features, but the classifier learned with 16"):
        model.predict(features[:, :3])
    assert model.classes == ["gear", "bolt", "nut"]
    files.write_tensors(tmp_path / "other.safetensors", {"x": np.zeros(2)}, {})
    with pytest.raises(BundleRefusedError, match="is not a saved classifier"):
        ssd_edge.Classifier.load(tmp_path / "other.safetensors")
    with pytest.raises(InputError):
        ssd_edge.Classifier.load(tmp_path / "missing.safetensors")


@pytest.mark.usefixtures("exported_once")
def test_the_examples_of_the_documentation_run(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 5
    monkeypatch.chdir(tmp_path)
    os.symlink(shapes, "photos")
    namespace: dict[str, object] = {}
    for block in blocks:
        tiny = block.replace('"photos",', '"photos", backbone="tiny",')  # the default takes longer to export
        exec(compile(tiny, "docs/python.md", "exec"), namespace)
    assert (tmp_path / "robot.ssdedge").is_file()
    assert "Did you mean 'slda'?" in capsys.readouterr().out


def test_every_public_function_has_an_example() -> None:
    for owner in (ssd_edge.Run, ssd_edge.Classifier):
        for name, member in vars(owner).items():
            if not name.startswith("_") and not isinstance(member, property):
                assert "Example:" in member.__doc__, f"{owner.__name__}.{name}"
    for name in set(ssd_edge.__all__) - {"Run"}:
        assert "Example:" in getattr(ssd_edge, name).__doc__, name


def test_an_image_without_an_embedding_is_named(tmp_path: Path) -> None:
    """A backbone of the user that divides by its norm gives NaN for a black image."""
    onnx = pytest.importorskip("onnx")
    helper, kind = onnx.helper, onnx.TensorProto
    nodes = [
        helper.make_node("GlobalAveragePool", ["image"], ["colour"]),
        helper.make_node("Flatten", ["colour"], ["flat"]),
        helper.make_node("ReduceL2", ["flat", "axis"], ["norm"]),
        helper.make_node("Div", ["flat", "norm"], ["features"]),
    ]
    graph = helper.make_graph(
        nodes,
        "unit",
        [helper.make_tensor_value_info("image", kind.FLOAT, ["n", 3, 8, 8])],
        [helper.make_tensor_value_info("features", kind.FLOAT, ["n", 3])],
        [onnx.numpy_helper.from_array(np.array([1]), "axis")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    (tmp_path / "unit.onnx").write_bytes(model.SerializeToString())
    for name, channel in (("red", 0), ("green", 1)):
        (tmp_path / "data" / name).mkdir(parents=True)
        for number in range(10):
            colour = [20 + number] * 3
            colour[channel] = 200
            Image.new("RGB", (8, 8), tuple(colour)).save(tmp_path / "data" / name / f"{number}.png")
    black = tmp_path / "data" / "red" / "night.png"
    Image.new("RGB", (8, 8)).save(black)
    backbone = {"name": f"onnx:{tmp_path / 'unit.onnx'}", "std": [1, 1, 1], "mean": [0, 0, 0], "cache": False}

    def train() -> ssd_edge.Run:
        data = {"path": str(tmp_path / "data")}
        return ssd_edge.train(learner="ncm", out=tmp_path / "runs", data=data, **{**QUICK, "backbone": backbone})

    with pytest.raises(
        InputError, match=r"gives NaN or infinity for \S+night\.png; leave it out, or use a backbone that"
    ):
        train()
    black.unlink()
    run = train()
    Image.new("RGB", (8, 8)).save(black)
    with pytest.raises(InputError, match=r"gives NaN or infinity for \S+night\.png; leave it out"):
        run.predict(sorted(black.parent.iterdir()))
    with pytest.raises(InputError, match=r"gives NaN or infinity for image 1; leave it out"):
        run.embed([np.full((8, 8, 3), 9, np.uint8), np.zeros((8, 8, 3), np.uint8)])
    with pytest.raises(InputError, match=r"gives NaN or infinity for \S+night\.png; leave it out"):
        run.evaluate()
