"""Tests of `deploy`: contents of the bundle, agreement with the run, and refused inputs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from exporters import deploy as packing
from exporters.deploy import DeployResult, Options, deploy
from ssd_edge import bundle, data, files, learners
from ssd_edge.backbones import graph
from ssd_edge.backbones import package as packages
from ssd_edge.backbones.embedder import TorchEmbedder
from ssd_edge.backbones.onnx import OnnxEmbedder, open_session, run
from ssd_edge.bundle import signing
from ssd_edge.errors import BundleRefusedError, GateRefusedError, InputError
from ssd_edge.images import Pixels
from ssd_edge.learners.closed_form.sums import ClassStatistics
from ssd_edge.run import storage


@pytest.fixture(scope="module")
def deployed(package_run, export_once, tmp_path_factory) -> tuple[Path, DeployResult, list[str]]:
    """Return the path of a bundle, the result of `deploy` and its log lines.

    Deployments of this module share their exports; test_export.py repeats one.
    """
    path, lines = tmp_path_factory.mktemp("bundle") / "robot.ssdedge", []
    return path, deploy(package_run, Options("jetson"), path, lines.append), lines


@pytest.fixture
def own_run(onnx_run, tmp_path) -> Path:
    """Return a copy of the run with an ONNX backbone, for tests that modify it."""
    return shutil.copytree(onnx_run, tmp_path / "run")


def edit(path: Path, **changes) -> None:
    files.write_json(path, {**json.loads(path.read_bytes()), **changes})


def deploy_silently(run_folder: Path, output: Path, target: str = "cpu", **options) -> DeployResult:
    return deploy(run_folder, Options(target, **options), output, lambda line: None)


def digits(run_folder: Path, size: int) -> np.ndarray:
    config = storage.open_folder(run_folder)
    return data.load(config.data, config.run.seed).test.load(range(20), Pixels(size))


# Contents


def test_result_matches_the_bundle(deployed):
    path, result, _ = deployed
    read = bundle.read(path)
    assert result.bundle == str(path)
    assert (result.bytes, result.sha256) == (path.stat().st_size, read.sha256)
    assert (result.target, result.classes) == ("jetson", ["4", "3", "1"])
    assert result.parity == read.manifest["parity"]
    assert list(result.to_dict()) == [
        *("bundle", "bytes", "sha256", "precision", "parity", "target", "classes", "release", "signed_by", "tensorrt"),
        "seconds",
    ]


def test_manifest_describes_the_run(deployed, package):
    manifest = bundle.read(deployed[0]).manifest
    assert (manifest["name"], manifest["created"]) == ("robot", "2026-11-21T04:33:00Z")
    assert (manifest["target"], manifest["classes"]) == ("jetson", ["4", "3", "1"])
    assert manifest["learner"]["name"] == "slda"
    assert manifest["learner"]["settings"]["budget_mb"] == 16
    assert manifest["run"]["argv"] == ["ssd-edge", "train", "data.path=digits"]
    assert manifest["metrics"]["panel"] == {"ncm": 0.71, "joint": 0.93}
    described = {key: manifest["backbone"][key] for key in ("id", "size", "dim", "precision", "opset")}
    assert described == {"id": package.identity, "size": 32, "dim": 256, "precision": "fp16", "opset": 18}
    assert manifest["release"] == 1795235580  # when the run finished: 2026-11-21T04:33:00Z


def test_bundle_and_run_give_the_same_predictions(deployed, package_run, package):
    read = bundle.read(deployed[0])
    images = digits(package_run, 32)
    embeddings = run(open_session(read.read("backbone")), images)
    expected = TorchEmbedder(package, torch.device("cpu")).embed(images)
    np.testing.assert_allclose(embeddings, expected, atol=0.05)  # standard deviations; the bundle is fp16
    exported = learners.restore(*read.tensors("learner"))
    original = learners.restore(*files.read_tensors(package_run / "learner.safetensors"))
    predicted = exported.predict(torch.from_numpy(embeddings))
    assert predicted.tolist() == original.predict(torch.from_numpy(expected)).tolist()
    assert {read.registry.names[row] for row in predicted.tolist()} == {"1", "3", "4"}


def test_learner_and_statistics_are_copied_unchanged(deployed, package_run):
    read = bundle.read(deployed[0])
    copied = {role for role in ("learner", "statistics") if (package_run / bundle.ROLES[role]).is_file()}
    assert set(read.roles) == set(bundle.ROLES) - {"head", "statistics"} | copied
    assert ("statistics" in copied) == (learners.restore(*read.tensors("learner")).class_statistics() is None)
    for role in copied:
        assert read.read(role) == (package_run / bundle.ROLES[role]).read_bytes()


def test_parity_is_measured_on_synthetic_and_test_images(deployed):
    parity = deployed[1].parity
    assert parity["precision"] == "fp16"
    assert parity["synthetic"]["images"] == 32
    assert parity["test"]["agreement"] >= 0.99
    assert parity["test"]["accuracy"]["reference"] > 0.8  # at chance if rows were taken for labels
    assert abs(parity["test"]["accuracy"]["exported"] - parity["test"]["accuracy"]["reference"]) <= 0.01


def test_deploy_is_reproducible(deployed, package_run, tmp_path):
    path = tmp_path / "robot.ssdedge"
    deploy_silently(package_run, path, "jetson")
    assert path.read_bytes() == deployed[0].read_bytes()


def test_bundle_contains_no_local_paths(deployed, package_run, package_folder):
    content = deployed[0].read_bytes()
    for folder in (package_run, package_folder, Path.cwd()):
        assert str(folder).encode() not in content


# ONNX backbones


def test_onnx_backbone_is_standardised_in_the_graph(onnx_run, tmp_path):
    path = tmp_path / "own.ssdedge"
    result = deploy_silently(onnx_run, path)
    read = bundle.read(path)
    images = digits(onnx_run, 8)
    arrays, _ = files.read_tensors(onnx_run / "standardisation.safetensors")
    expected = (OnnxEmbedder(graph.load(onnx_run)).embed(images) - arrays["mu"]) / arrays["sigma"]
    np.testing.assert_allclose(run(open_session(read.read("backbone")), images), expected, atol=1e-5)
    assert read.manifest["backbone"]["provenance"]["file"] == "tiny.onnx"
    assert result.parity["test"]["accuracy"]["exported"] > 0.6


def test_existing_bundle_is_replaced(onnx_run, tmp_path):
    path = tmp_path / "own.ssdedge"
    path.write_bytes(b"old")
    deploy_silently(onnx_run, path)
    assert bundle.read(path).manifest["name"] == "own"


# Missing data


@pytest.mark.parametrize("reason", ["does not exist any more", "has changed"])
def test_without_data_parity_is_measured_on_synthetic_images(own_run, tmp_path, reason):
    if reason == "has changed":
        edit(own_run / "run.json", identity={"data": "another"})
    else:
        config = (own_run / "config.yaml").read_text()
        (own_run / "config.yaml").write_text(config.replace("path: digits", "path: gone"))
    lines = []
    measured = deploy(own_run, Options("cpu"), tmp_path / "own.ssdedge", lines.append).parity
    assert set(measured) == {"precision", "synthetic"}
    expected = "digits has changed since the run" if reason == "has changed" else "there is no data set at"
    assert any(line.startswith("parity on synthetic images only") and expected in line for line in lines)


# Refused runs


def refused(run_folder: Path, output: Path, sentence: str, error: type = InputError, target: str = "cpu") -> None:
    """Check that `deploy` raises an error and writes nothing."""
    with pytest.raises(error, match=sentence):
        deploy_silently(run_folder, output, target)
    assert not output.exists() or output.is_dir()


def test_unknown_target_suggests_the_nearest(own_run, tmp_path):
    refused(own_run, tmp_path / "b", "unknown target 'jetson-orin'.* Did you mean 'jetson-", target="jetson-orin")


def test_missing_folder_or_not_a_run_is_refused(tmp_path):
    refused(
        tmp_path / "none",
        tmp_path / "b",
        "none does not exist; give one of the numbered folders that `ssd-edge train` creates",
    )
    refused(tmp_path, tmp_path / "b", "is not a run: config.yaml and run.json missing")


def test_unfinished_run_names_the_resume_command(own_run, tmp_path):
    edit(own_run / "run.json", status="running")
    refused(own_run, tmp_path / "b", f"is not finished.*ssd-edge train --resume {own_run}")


@pytest.mark.parametrize(
    "name", ["metrics.json", "backbone.json", "classes.json", "learner.safetensors", "statistics.safetensors"]
)
def test_missing_file_of_a_run_is_named(own_run, tmp_path, name):
    (own_run / name).unlink()
    refused(own_run, tmp_path / "b", f"is not a complete run: {name} missing")


def test_missing_standardisation_is_refused(own_run, tmp_path):
    (own_run / "standardisation.safetensors").unlink()
    refused(own_run, tmp_path / "b", r"standardisation\.safetensors does not exist")


def test_invalid_output_path_is_refused(own_run, tmp_path):
    refused(own_run, tmp_path / "none" / "b", r"the folder of .*none/b does not exist; create it first")
    refused(own_run, tmp_path, "is a folder, but a file is needed")


def test_changed_onnx_backbone_is_refused(own_run, onnx_run, tmp_path):
    identity = json.loads((onnx_run / "backbone.json").read_bytes())["identity"]
    edit(own_run / "backbone.json", identity="another")
    refused(own_run, tmp_path / "b", f"tiny.onnx is {identity}, but .* was made with another; restore")


def test_a_run_needs_neither_the_file_nor_the_library_of_its_backbone(own_run, tmp_path):
    config = (own_run / "config.yaml").read_text()
    old = storage.open_folder(own_run).backbone.name
    (own_run / "config.yaml").write_text(config.replace(old, "onnx:/gone/tiny.onnx"))
    deploy_silently(own_run, tmp_path / "own.ssdedge")
    (own_run / "backbone.onnx").write_bytes(b"other")
    refused(own_run, tmp_path / "b", "backbone.onnx is not the network that the run was made with", BundleRefusedError)
    (own_run / "backbone.onnx").unlink()
    refused(own_run, tmp_path / "b", "backbone.onnx does not exist")


@pytest.mark.parametrize("change", [{"mean": ["x"] * 3}, {"std": 5}, {"layout": 3, "more": 1}])
def test_a_damaged_description_of_the_backbone_is_refused(own_run, tmp_path, change):
    stored = json.loads((own_run / "backbone.json").read_bytes())["graph"]
    edit(own_run / "backbone.json", graph={**stored, **change})
    refused(own_run, tmp_path / "b", "backbone.json is damaged", BundleRefusedError)


def test_changed_package_is_refused(package_run, package, tmp_path):
    other = tmp_path / "other"
    packages.save(
        packages.BackbonePackage(package.weights, package.mu + 1, package.sigma, package.priors, package.card), other
    )
    copy = shutil.copytree(package_run, tmp_path / "run")
    text = (copy / "config.yaml").read_text()
    old = storage.open_folder(package_run).backbone.name.removeprefix("package:")
    (copy / "config.yaml").write_text(text.replace(old, str(other)))
    refused(copy, tmp_path / "b", f"but .* was made with {package.identity}")


def test_missing_backbone_is_refused(package_run, tmp_path):
    copy = shutil.copytree(package_run, tmp_path / "run")
    old = storage.open_folder(package_run).backbone.name.removeprefix("package:")
    text = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(text.replace(old, str(tmp_path / "gone")))
    refused(copy, tmp_path / "b", "gone is not a backbone package")


def test_damaged_files_are_refused(own_run, tmp_path):
    edit(own_run / "metrics.json", panel="none")
    refused(own_run, tmp_path / "b", "metrics.json is damaged: 'panel' is 'none', not dict", BundleRefusedError)
    (own_run / "metrics.json").write_text("[]")
    refused(own_run, tmp_path / "b", "metrics.json is damaged: 'data' is None", BundleRefusedError)
    (own_run / "metrics.json").write_text("{")
    refused(own_run, tmp_path / "b", "metrics.json is not valid JSON", BundleRefusedError)


def test_mixed_files_of_two_runs_are_refused(own_run, package_run, tmp_path):
    others = {name: tensor.numpy() for name, tensor in ClassStatistics(256).state().items()}
    files.write_tensors(own_run / "statistics.safetensors", others)
    refused(own_run, tmp_path / "b", r"'sums' .* must have the shape \(0, 6\), but has", BundleRefusedError)
    shutil.copy(package_run / "learner.safetensors", own_run)
    refused(own_run, tmp_path / "b", "dim is 256, but the embeddings have 6 features", BundleRefusedError)


def test_invalid_learner_state_is_refused(own_run, tmp_path):
    files.write_tensors(own_run / "learner.safetensors", {"sums": np.zeros(3)}, {"learner": "ncm"})
    refused(own_run, tmp_path / "b", "metadata of the learner's state is invalid", BundleRefusedError)


def test_failed_parity_keeps_the_existing_bundle(own_run, tmp_path, monkeypatch):
    path = tmp_path / "own.ssdedge"
    path.write_bytes(b"old")

    def wrong(*args, **options) -> bytes:
        *others, mu, sigma = args
        return original(*others, mu + sigma, sigma, **options)

    original = packing.compose
    monkeypatch.setattr(packing, "compose", wrong)
    with pytest.raises(GateRefusedError, match=r"differs by .* standard deviations.*nothing was written"):
        deploy_silently(own_run, path)
    assert path.read_bytes() == b"old"


# Options


def test_head_predicts_like_the_learner(onnx_run, tmp_path):
    path = tmp_path / "own.ssdedge"
    deploy_silently(onnx_run, path, head=True)
    read = bundle.read(path)
    arrays, _ = read.tensors("probe")
    (scores,) = open_session(read.read("head")).run(None, {"embeddings": arrays["embeddings"]})
    assert scores.argmax(1).tolist() == arrays["rows"].tolist()


def test_sign_and_release_options(onnx_run, tmp_path):
    private, public = signing.new_key(tmp_path, "ours")
    path = tmp_path / "own.ssdedge"
    result = deploy_silently(onnx_run, path, sign=private, release=12)
    read = bundle.read(path)
    keys = {signing.key_id(signing.load_public(public)): signing.load_public(public)}
    assert signing.check(read, keys) == result.signed_by
    assert read.manifest["release"] == result.release == 12


def test_probe_contains_embeddings_and_limits(deployed):
    read = bundle.read(deployed[0])
    arrays, limits = read.tensors("probe")
    assert arrays["images"].shape == (8, 32, 32, 3)
    np.testing.assert_array_equal(arrays["embeddings"], run(open_session(read.read("backbone")), arrays["images"]))
    synthetic = read.manifest["parity"]["synthetic"]
    assert limits["max_difference"] >= max(0.05, synthetic["max_difference"])
    assert 0.9 < limits["min_cosine"] <= 0.9995


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"precision": "fp8"}, "unknown precision 'fp8'; known: auto, fp32, fp16, int8"),
        ({"precision": "fp16"}, "the target cpu does not support fp16"),
        ({"calibration": Path("photos")}, "--calibration is for int8, but the precision is fp32"),
        ({"release": -1}, "--release must be 0 or more, but is -1"),
        ({"sign": Path("none.key")}, "none.key does not exist"),
    ],
)
def test_invalid_options_are_refused_before_the_export(onnx_run, tmp_path, monkeypatch, options, sentence):
    monkeypatch.setattr(packing, "_export", None)
    with pytest.raises(InputError, match=sentence):
        deploy_silently(onnx_run, tmp_path / "b", **options)


def test_memory_estimate_above_the_target_is_refused_or_warned_about(onnx_run, tmp_path, monkeypatch):
    path, lines = tmp_path / "own.ssdedge", []
    monkeypatch.setattr(packing.profile, "estimate", lambda opened: SimpleNamespace(total=2049.0))
    with pytest.raises(InputError, match="roughly 2,049 MiB, but the smallest cpu has 2,048; choose a smaller"):
        deploy_silently(onnx_run, path)
    assert not path.exists()
    monkeypatch.setattr(packing.profile, "estimate", lambda opened: SimpleNamespace(total=1025.0))
    deploy(onnx_run, Options("cpu"), path, lines.append)
    assert lines[-1].startswith("warning: learning on the device takes roughly 1,025 MiB, over half of the 2,048")


def test_graph_rejected_by_tensorrt_is_refused(onnx_run, tmp_path, monkeypatch):
    def refuse(onnx):
        raise GateRefusedError("TensorRT-RTX cannot parse the graph")

    pytest.importorskip("tensorrt_rtx", reason="NOT TESTED: pip install tensorrt-rtx")
    monkeypatch.setattr("device_runtime.backbone.tensorrt.engines.check_graph", refuse)
    with pytest.raises(GateRefusedError, match="cannot parse"):
        deploy_silently(onnx_run, tmp_path / "b", "jetson", precision="fp32")
    assert not (tmp_path / "b").exists()
    deploy_silently(onnx_run, tmp_path / "b")  # not checked with TensorRT for a CPU


def test_missing_tensorrt_rtx_is_reported(onnx_run, tmp_path, monkeypatch):
    monkeypatch.setattr(packing.importlib.util, "find_spec", lambda name: None)
    lines = []
    result = deploy(onnx_run, Options("jetson", precision="fp32"), tmp_path / "b", lines.append)
    assert result.tensorrt is None
    assert any(line.startswith("not checked with TensorRT's parser") for line in lines)


def test_empty_bundle_contains_nothing_learned(package_run, deployed, tmp_path):
    path = tmp_path / "blank.ssdedge"
    result = deploy_silently(package_run, path, empty=True)
    read = bundle.read(path)
    assert read.manifest["classes"] == result.classes == read.registry.names == []
    assert read.manifest["metrics"] == {}
    arrays, metadata = read.tensors("learner")
    full, _ = bundle.read(deployed[0]).tensors("learner")
    assert arrays.keys() == full.keys()
    assert metadata["settings"] == bundle.read(deployed[0]).manifest["learner"]["settings"]
    assert arrays["values"].shape[1] == 0
    assert "statistics" not in read.roles or not read.tensors("statistics")[0]["second"].any()
    assert "agreement" not in read.manifest["parity"]["test"]
    card = read.read("card").decode()
    assert "None: all classes are taught on the device" in card
    assert "## Accuracy" not in card
    with pytest.raises(InputError, match="--head is a learner that only predicts"):
        deploy_silently(package_run, path, empty=True, head=True)
