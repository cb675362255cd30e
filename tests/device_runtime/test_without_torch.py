"""A device without PyTorch: everything but learning, with the same answers; and what it says about the rest."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import store_standins
from PIL import Image

from device_runtime import Device
from device_runtime.install.bundle import install
from device_runtime.learning.state import DeviceState
from ssd_edge import bundle as bundles
from ssd_edge.answers import head as heads
from ssd_edge.answers.graph import Operator
from ssd_edge.answers.head import Head
from ssd_edge.errors import BundleRefusedError, GateRefusedError, SSDEdgeError
from ssd_edge.learners import LEARNERS, Learner
from ssd_edge.ort import apart
from ssd_edge.system import MIB

ROOT = Path(__file__).resolve().parents[2]
BIG = ("flymodel", "ranpac", "klda", "finetune")  # by default; tests/exporters/test_head.py has small ones
photos = vars(store_standins)["photos"]
# Runs verbs in a process in which PyTorch cannot be imported; prints the exit code of each, and what it wrote.
BLOCKED = """
import io, json, sys
from contextlib import redirect_stderr, redirect_stdout
sys.modules["torch"] = None
from ssd_edge.cli import run
done = []
for verb in json.loads(sys.argv[1]):
    sys.argv = ["ssd-edge", *verb]
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        code = run()
    done.append([code, out.getvalue(), err.getvalue()])
print(json.dumps(done))
"""


def without_torch(root: Path, *verbs: list[str]) -> list[tuple[int, str, str]]:
    """Run verbs of the device in one process without PyTorch."""
    calls = json.dumps([["device", *verb, "--root", str(root)] for verb in verbs])
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED, calls], cwd=ROOT, stdout=subprocess.PIPE, check=True, timeout=120
    )
    return [tuple(one) for one in json.loads(done.stdout)]


@pytest.fixture
def root(tmp_path: Path, tiny_bundle) -> Path:
    return installed(tmp_path, tiny_bundle, "ncm")


def installed(tmp_path: Path, tiny_bundle, learner: str) -> Path:
    path = tmp_path / "tiny.ssdedge"
    path.write_bytes(tiny_bundle(learner=learner))
    install(tmp_path / "root", path)
    return tmp_path / "root"


def test_a_device_without_pytorch_does_everything_but_learn(root: Path, tmp_path: Path) -> None:
    device = Device.open(root)
    device.learn("wedge", photos("wedge", 6))
    paths = []
    for number, image in enumerate(photos("cup", 2) + photos("wedge", 2)):
        paths.append(str(tmp_path / f"{number}.png"))
        Image.fromarray(image).save(paths[-1])
    wanted = [dataclasses.asdict(one) for one in device.predict(paths)]
    answers = without_torch(
        root,
        ["predict", *paths, "--json"],
        ["status", "--json"],
        ["rename", "cup", "mug"],
        ["history"],
        ["rollback"],
        ["prune", "--keep", "2"],
        ["fsck"],
        ["status", "--json"],
        ["export", str(tmp_path / "out.ssdedge")],
        ["learn", "--label", "new", *paths],
        ["forget", "cup"],
    )
    assert [code for code, _, _ in answers] == [0] * 9 + [3, 3], answers
    assert json.loads(answers[0][1])["predictions"] == wanted  # bit for bit: one implementation answers
    status = json.loads(answers[1][1])
    assert (status["learner"], status["answers_with"]) == ("ncm", "NumPy")
    assert status == {**device.status().to_dict(), "machine": status["machine"]}
    assert "rename 'cup' to 'mug'" in answers[3][1]
    assert json.loads(answers[7][1])["classes"] == ["cup", "nut", "screw", "wedge"]
    device.refresh()
    device.export(tmp_path / "with.ssdedge")
    one, other = (bundles.read(tmp_path / f"{name}.ssdedge") for name in ("out", "with"))
    assert {**one.entries, "manifest.json": b""} == {**other.entries, "manifest.json": b""}
    for _, _, said in answers[9:]:
        assert "'torch' is needed" in said
        assert "ssd-edge[device]" in said
        assert len(said.splitlines()) == 1


@pytest.mark.parametrize("learner", [name for name in LEARNERS if name not in BIG])
def test_answers_are_those_of_the_learner(tmp_path: Path, tiny_bundle, learner: str) -> None:
    device = Device.open(installed(tmp_path, tiny_bundle, learner))
    seen = device.observe(photos("cup", 8, seed=3) + photos("nut", 8, seed=3) + photos("wedge", 4))
    assert not device.snapshot.whole  # no learner was read
    state, vectors = device.state, torch.from_numpy(seen.embeddings)
    scores = state.learner.scores(vectors)[:, : len(device.classes)]
    rows = scores.argmax(1)
    accepted, margins = state.rejector.accepts(vectors, rows)
    shares = state.record.confidence(scores)
    assert [one.nearest for one in seen.predictions] == [device.classes[row] for row in rows.tolist()]
    assert [one.label == "unknown" for one in seen.predictions] == [not accept for accept in accepted.tolist()]
    np.testing.assert_allclose([one.margin for one in seen.predictions], margins.numpy(), atol=1e-6)
    if shares is not None:
        np.testing.assert_allclose([one.score for one in seen.predictions], shares.numpy(), atol=1e-5)
    assert device.status().learner == learner


def test_a_learner_without_a_graph_answers_with_pytorch(
    tmp_path: Path, tiny_bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = Device.open(installed(tmp_path, tiny_bundle, "ncm")).predict(photos("cup", 3))
    monkeypatch.setattr(heads, "MOST_BYTES", 10)
    monkeypatch.setattr("device_runtime.learning.state.MOST_BYTES", 10)
    root = installed(tmp_path, tiny_bundle, "ncm")
    device = Device.open(root)
    assert "exceeds 10 bytes" in device.status().answers_with
    assert not device.snapshot.whole
    found = device.predict(photos("cup", 3))
    assert [(one.label, one.score) for one in found] == [(one.label, one.score) for one in expected]
    image = tmp_path / "x.png"
    Image.fromarray(photos("cup", 1)[0]).save(image)
    (status, (code, _, said)) = without_torch(root, ["status"], ["predict", str(image)])
    assert status[0] == 0
    assert (code, len(said.splitlines())) == (3, 1)
    assert "'torch' is needed" in said


def test_a_generation_without_a_head_is_answered_as_before(root: Path) -> None:
    """Generations from before heads were kept have none."""
    device = Device.open(root)
    wanted = [(one.label, one.score, one.margin) for one in device.predict(photos("cup", 3))]
    contents = {name: device.generation.read(name) for name in device.generation.files if name != heads.NAME}
    with device.store.writer():
        device.store.commit(contents, {}, parent=1)
    device = Device.open(root)
    assert heads.NAME not in device.generation.files
    assert [(one.label, one.score, one.margin) for one in device.predict(photos("cup", 3))] == wanted


def test_a_head_that_answers_otherwise_is_not_committed(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device.open(root)

    def wrong(self: Learner, graph: Any, x: str) -> str:
        return str(graph.matmul(x, "wrong", -torch.eye(6, graph.classes)))

    monkeypatch.setattr(LEARNERS["ncm"], "write_head", wrong)
    with pytest.raises(GateRefusedError, match="would answer otherwise without PyTorch"):
        device.learn("wedge", photos("wedge", 6))
    assert device.generation.number == 1


def test_a_head_of_other_classes_is_refused(root: Path) -> None:
    device = Device.open(root)
    contents = {name: device.generation.read(name) for name in device.generation.files}
    head = Head.parse(contents[heads.NAME])
    contents[heads.NAME] = dataclasses.replace(head, classes=2).to_bytes()
    with device.store.writer():
        device.store.commit(contents, {}, parent=1)
    with pytest.raises(BundleRefusedError, match="has 3 classes, but the head 2"):
        Device.open(root)


def test_the_state_is_read_while_it_exists(root: Path) -> None:
    """A device that has its learner in memory refreshes it together with the generation."""
    device, other = Device.open(root), Device.open(root)
    assert isinstance(device.state, DeviceState)
    other.rename("cup", "mug")
    assert device.refresh()
    assert device.snapshot.whole
    late = Device.open(root)
    other.rename("nut", "bolt")
    with other.store.writer():
        other.store.keep_only_current()
    assert late.classes[1] == "nut"
    assert late.state.registry.names[1] == "bolt"  # its own generation is gone
    assert late.generation.number == 3


def test_a_bundle_with_a_head_is_installed_without_pytorch(root: Path, tmp_path: Path) -> None:
    device = Device.open(root)
    device.learn("wedge", photos("wedge", 6))
    device.export(tmp_path / "whole.ssdedge")
    image = str(tmp_path / "x.png")
    Image.fromarray(photos("wedge", 1)[0]).save(image)
    (wanted,) = device.predict([image])
    installed, predicted = without_torch(
        tmp_path / "other", ["install", str(tmp_path / "whole.ssdedge")], ["predict", image, "--json"]
    )
    assert installed[0] == 0, installed
    assert "self-test on" in installed[2]
    (found,) = json.loads(predicted[1])["predictions"]
    assert found == {**dataclasses.asdict(wanted), "generation": 1}
    assert Device.open(tmp_path / "other").state.registry.names == device.classes  # and with PyTorch it can learn
    (code, _, said), *_ = without_torch(tmp_path / "third", ["install", str(tmp_path / "tiny.ssdedge")])
    assert (code, len(said.splitlines())) == (3, 1)
    assert "without unknown.safetensors and record.safetensors and head.safetensors; deploy it again" in said


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda head: dataclasses.replace(head, learner="ridge"), "head is of the learner 'ridge', but its manifest"),
        (lambda head: dataclasses.replace(head, classes=2), "has 3 classes, but the head 2"),
        (lambda head: dataclasses.replace(head, scores="nothing"), "the head of the learner is damaged"),
        (
            lambda head: dataclasses.replace(
                head,
                operators=[
                    *head.operators,
                    Operator("Transpose", (head.scores,), ("t0",), {"perm": [1, 0]}),
                    Operator("Concat", ("t0",) * 4000, ("t1",), {"axis": 0}),
                    Operator("Concat", ("t1",) * 4000, ("t2",), {"axis": 0}),
                    Operator("Concat", ("t2",) * 4000, ("t3",), {"axis": 0}),
                ],
            ),
            r"head\.safetensors needs more than .* of memory and was stopped",
        ),
        (
            lambda head: dataclasses.replace(
                head,
                constants={name: -value for name, value in head.constants.items()},
            ),
            "the learner's decisions agree with the bundle on",
        ),
    ],
)
def test_a_head_that_lies_is_refused_without_pytorch(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Head], Head], message: str
) -> None:
    Device.open(root).export(tmp_path / "whole.ssdedge")
    opened = bundles.read(tmp_path / "whole.ssdedge")
    entries = {path: (role, opened.entries[path]) for role, path in opened.roles.items()}
    entries[heads.NAME] = "answers", change(Head.parse(opened.read("answers"))).to_bytes()
    (tmp_path / "lies.ssdedge").write_bytes(bundles.pack(opened.manifest, entries))
    install(tmp_path / "with", tmp_path / "lies.ssdedge")  # with PyTorch, the head follows from the learner
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr(apart, "memory_limit", lambda most=None: 600 * MIB)
    with pytest.raises(SSDEdgeError, match=message):
        install(tmp_path / "without", tmp_path / "lies.ssdedge")
    assert not (tmp_path / "without" / "CURRENT").exists()
