"""Tests of the model card: accuracy table, terms, limitations and escaping of user-supplied text."""

from __future__ import annotations

import pytest

from ssd_edge.bundle.card import escape, render
from ssd_edge.classes import ClassRegistry

REGISTRY = ClassRegistry().add("cup", images=1200).add("<script>alert(1)</script>", images=3)


def manifest(**changes) -> dict:
    """Return a manifest with the given top-level keys replaced."""
    value = {
        "name": "robot",
        "created": "2026-11-21T04:33:00Z",
        "producer": {"ssd_edge": "0.1.0", "git": "unknown", "packages": {"onnx": "1.23.2"}},
        "backbone": {
            "size": 32,
            "dim": 256,
            "precision": "fp32",
            "id": "c006d4cfd3644a84",
            "provenance": {"arch": "resnet9", "data": "tiny-imagenet32", "terms": "research use only", "seed": 0},
        },
        "learner": {"name": "slda", "settings": {}},
        "classes": REGISTRY.names,
        "metrics": {
            "data": "shapes",
            "split": "official train/test split",
            "train_images": 1203,
            "test_images": 40,
            "tasks": 2,
            "class_accuracy": {"cup": 0.9},
            "average_accuracy": 0.75,
            "average_incremental_accuracy": 0.8,
            "backward_transfer": -0.1,
            "forgetting": 0.1,
            "panel": {"ncm": 0.71, "joint": None},
            "baselines": {"finetune": 0.35},
        },
        "parity": {
            "precision": "int8",
            "calibration": {"images": 64, "sha256": "0" * 64, "source": "a folder of the user"},
            "refused": {"fp16": "<b>too</b> far"},
            "synthetic": {
                "images": 32,
                "max_difference": 3e-6,
                "min_cosine": 1.0,
                "agreement": 1.0,
                "drift": {"mean_shift": 1e-6, "spread": 1.0},
            },
        },
        "release": 7,
        "target": "jetson",
        "run": {
            "argv": ["ssd-edge", "train", "data.path=my shapes"],
            "seed": 7,
            "threads": 2,
            "machine": "Linux x86_64",
            "versions": {"torch": "2.13.0"},
        },
    }
    return {**value, **changes}


def test_accuracy_table_includes_the_panel():
    card = render(manifest(), REGISTRY)
    rows = [line for line in card.splitlines() if line.startswith("| ")]
    index = rows.index("| **slda** (this bundle) | **0.750** |")
    assert rows[index + 1 : index + 4] == ["| finetune | 0.350 |", "| ncm | 0.710 |", "| joint | – |"]


def test_missing_panel_is_stated():
    metrics = {**manifest()["metrics"], "panel": {}}
    assert "nothing to compare this accuracy with" in render(manifest(metrics=metrics), REGISTRY)
    assert "nothing to compare" not in render(manifest(), REGISTRY)


def test_backbone_section_gives_provenance_and_terms():
    card = render(manifest(), REGISTRY)
    assert "- trained on: tiny-imagenet32" in card
    assert "- licence and terms: research use only" in card
    backbone = {**manifest()["backbone"], "provenance": {"file": "own.onnx"}}
    assert "- licence and terms: not stated; ask the author of the backbone" in render(
        manifest(backbone=backbone), REGISTRY
    )


def test_command_seed_and_limitations_are_given():
    card = render(manifest(), REGISTRY)
    assert "\n    ssd-edge train 'data.path=my shapes'\n" in card
    assert "seed 7, 2 threads" in card
    assert "not measured on a board" in card


def test_export_section_gives_precision_and_calibration():
    card = render(manifest(), REGISTRY)
    assert "in int8 (ONNX Runtime on a CPU)" in card
    assert "Calibrated with 64 images: a folder of the user" in card
    assert "Rejected precision, fp16: &lt;b&gt;too&lt;/b&gt; far" in card
    assert "Release 7, finished 2026-11-21" in card


def test_markup_in_user_text_is_escaped():
    hostile = "x\n\n# big\n<img src=x> | [y](http://z) `c`"
    run = {**manifest()["run"], "argv": ["ssd-edge", f"data.path={hostile}"], "machine": hostile}
    metrics = {**manifest()["metrics"], "data": hostile, "split": hostile}
    card = render(manifest(name=hostile, metrics=metrics, run=run), REGISTRY)
    code, text = [], []
    for line in card.splitlines():
        (code if line.startswith("    ") else text).append(line)
    assert len(code) == 1
    assert "<" not in "\n".join(text)
    assert not [line for line in text if line.startswith("# big")]
    assert "](" not in "\n".join(text).replace("\\](", "")
    assert "://" not in "\n".join(text).replace("\\://", "")


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("cup", "cup"),
        ("a|b", "a\\|b"),
        ("<b>&", "&lt;b&gt;&amp;"),
        ("*_`#\\", "\\*\\_\\`\\#\\\\"),
        ("[x](http://z)", "\\[x\\](http\\://z)"),
        ("www.z.org", "www\\.z.org"),
        ("1,000 (of 5.5 %): a-b", "1,000 (of 5.5 %): a-b"),
        ("two\nlines", "two lines"),
        ("schraube ß", "schraube ß"),
    ],
)
def test_escape(text, escaped):
    assert escape(text) == escaped


def test_learner_that_stores_samples_is_labelled_replay():
    card = render(manifest(learner={"name": "icarl", "settings": {}}), REGISTRY)
    assert "**Replay**: it stores embeddings of individual training images" in card
    assert "It stores no images" not in card
    assert "Replay" not in render(manifest(), REGISTRY)
