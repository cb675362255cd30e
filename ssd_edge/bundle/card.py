"""The model card of a bundle, MODEL_CARD.md: intended use, evaluation data, accuracy and limitations.

The card is generated from the manifest and the class registry. Class names and other user-supplied text are escaped,
so a class named ``<script>`` or ``[x](http://…)`` is rendered as plain text.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping
from typing import Any

from ssd_edge import targets
from ssd_edge.classes import ClassRegistry
from ssd_edge.images import Pixels

_ENTITIES = {"<": "&lt;", ">": "&gt;", "&": "&amp;"}  # some renderers treat a backslash-escaped tag as HTML
# Characters with a meaning in Markdown; the last two alternatives turn bare URLs into links.
_MARKUP = re.compile(r"[\\`*_{}\[\]<>&|#~!$]|:(?=//)|(?<=www)\.", re.IGNORECASE)
KINDS = ("test", "brought", "synthetic")  # kinds of images that the export was checked on, in the order of the table
_PROVENANCE = {  # key in a backbone's provenance -> label in the card
    "name": "name",
    "source": "source",
    "arch": "architecture",
    "file": "file",
    "sha256": "SHA-256 of the weights",
    "data": "trained on",
    "accuracy": "accuracy on that data",
    "command": "created with",
    "seed": "seed",
    "versions": "exported with",
    "levels": "levels, as channels@side, and features",
    "terms": "licence and terms",
}
_NO_CLASSES = (
    "## Classes\n\nNone: all classes are taught on the device. Their accuracy is therefore unknown; "
    "`ssd-edge device learn` measures it on held-out images."
)
_ORIGINS = {"base": "before deployment", "device": "on a device"}


def escape(text: Any) -> str:
    """Escape a value so that Markdown and HTML show it literally, on one line."""
    line = " ".join(str(text).split())
    return _MARKUP.sub(lambda match: _ENTITIES.get(match[0], "\\" + match[0]), line)


def render(manifest: Mapping[str, Any], registry: ClassRegistry) -> str:
    """Return the model card of a bundle as Markdown.

    Args:
        manifest: The manifest of the bundle, as `exporters.deploy` builds it.
        registry: The classes, with the number of training images per class.

    Returns:
        The Markdown text, which depends on the arguments only.
    """
    sections = [
        _purpose(manifest),
        *([_classes(manifest["metrics"], registry), _accuracy(manifest)] if len(registry) else [_NO_CLASSES]),
        _backbone(manifest["backbone"]),
        _reproduction(manifest),
        _export(manifest["parity"]),
        _limits(manifest["learner"]),
    ]
    return "\n\n".join(sections) + "\n"


CHANGED = "## Since it was deployed"


def amend(card: str, registry: ClassRegistry, events: Iterable[str]) -> str:
    """Return a card with a section on the changes made on a device, replacing an earlier such section.

    Args:
        card: The card of the bundle, with or without such a section.
        registry: The current classes.
        events: Descriptions of the changes, oldest first.
    """
    original = card.split(f"\n{CHANGED}\n")[0].rstrip("\n")
    rows = [(escape(entry.name), f"{entry.images:,}", _ORIGINS.get(entry.origin, "")) for entry in registry.entries]
    changes = "".join(f"- {escape(event)}\n" for event in events) or "- none\n"
    return (
        f"{original}\n\n{CHANGED}\n\nThe sections above describe the bundle as it was deployed; the accuracy given "
        "there does not apply to the classes below. Changes on the device:\n\n"
        f"{changes}\n" + _table(("current class", "images", "taught"), rows) + "\n"
    )


def _table(header: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    header = list(header)
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def _code(command: str) -> str:
    return "    " + " ".join(command.split())  # an indented code block needs no escaping on its line


def _fraction(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _purpose(manifest: Mapping[str, Any]) -> str:
    target = manifest["target"]
    return (
        f"# {escape(manifest['name'])}\n\n"
        f"Classifies images into {len(manifest['classes']) or 'no'} classes and learns new classes on the device "
        "from a few images per class, without the old images.\n\n"
        f"Built for `{target}`: {targets.get(target).title}. The input is an RGB image of "
        f"{Pixels.from_dict(manifest['backbone']).describe()}.\n\n"
        "Intended use: classification of images similar to those it was trained and tested on. It is not intended for "
        "decisions that affect a person's safety, health or rights."
    )


def _classes(metrics: Mapping[str, Any], registry: ClassRegistry) -> str:
    accuracy = metrics.get("class_accuracy", {})
    rows = [
        (escape(entry.name), f"{entry.images:,}", _fraction(accuracy.get(entry.name))) for entry in registry.entries
    ]
    return "## Classes\n\n" + _table(("class", "training images", "accuracy on test images"), rows)


def _accuracy(manifest: Mapping[str, Any]) -> str:
    metrics, name = manifest["metrics"], manifest["learner"]["name"]
    head = (
        "## Accuracy\n\n"
        f"Data: {escape(metrics['data'])}, {metrics['train_images']:,} training and {metrics['test_images']:,} test "
        f"images ({escape(metrics['split'])}), classes learned in {metrics['tasks']} consecutive tasks. "
        "Average accuracy is the mean accuracy over all tasks after the last one, without task ids at test time.\n\n"
    )
    rows = [(f"**{escape(name)}** (this bundle)", f"**{_fraction(metrics['average_accuracy'])}**")]
    rows += [(escape(other), _fraction(value)) for other, value in {**metrics["baselines"], **metrics["panel"]}.items()]
    forgetting = (
        f"\n\nForgetting (mean drop from the best accuracy per task): {_fraction(metrics['forgetting'])}. "
        f"Backward transfer: {_fraction(metrics['backward_transfer'])}."
    )
    if not metrics["panel"]:
        forgetting += (
            "\n\n**The run did not include the panel of simple baselines (run.panel=false), so there is nothing to "
            "compare this accuracy with.**"
        )
    return head + _table(("method, on the same embeddings", "average accuracy"), rows) + forgetting


def _backbone(backbone: Mapping[str, Any]) -> str:
    provenance = {"terms": "", **backbone["provenance"]}
    lines = [
        f"- identity: `{backbone['id']}`, embeddings of dimension {backbone['dim']}, {escape(backbone['precision'])}"
    ]
    for key, label in _PROVENANCE.items():
        value = provenance.get(key)
        if isinstance(value, Mapping):
            value = ", ".join(f"{inner} {value[inner]}" for inner in sorted(value))
        if key == "terms" and not value:
            value = "not stated; ask the author of the backbone"
        if value not in (None, ""):
            lines.append(f"- {label}: {escape(value)}")
    return "## Backbone\n\n" + "\n".join(lines)


def _reproduction(manifest: Mapping[str, Any]) -> str:
    run, producer = manifest["run"], manifest["producer"]
    versions = {**run["versions"], **producer["packages"]}
    return (
        f"## Reproduction\n\n{_code(shlex.join(map(str, run['argv'])))}\n\n"
        f"Release {manifest['release']}, finished {manifest['created']}, seed {run['seed']}, {run['threads']} threads "
        f"on {escape(run['machine'])}. "
        f"SSD-Edge {escape(producer['ssd_edge'])}, commit {escape(producer['git'])}; "
        + ", ".join(f"{escape(package)} {escape(version)}" for package, version in sorted(versions.items()))
        + "."
    )


def _export(parity: Mapping[str, Any]) -> str:
    header = (
        *("images", "count", "smallest cosine", "largest difference", "shift of the mean"),
        *("same prediction", "accuracy before → after"),
    )
    rows = []
    for kind in KINDS:
        if kind not in parity:
            continue
        values = parity[kind]
        accuracy = values.get("accuracy")
        rows.append(
            (
                kind,
                values["images"],
                f"{values['min_cosine']:.6f}",
                f"{values['max_difference']:.1e} σ",
                f"{values['drift']['mean_shift']:.1e} σ",
                f"{values['agreement']:.1%}" if "agreement" in values else "–",
                f"{accuracy['reference']:.3f} → {accuracy['exported']:.3f}" if accuracy else "–",
            )
        )
    text = (
        f"## Export\n\nThe exported backbone in {escape(parity['precision'])} (ONNX Runtime on a CPU) compared with "
        "the backbone of the run:\n\n" + _table(header, rows)
    )
    if calibration := parity.get("calibration"):
        text += (
            f"\n\nCalibrated with {calibration['images']} images: {escape(calibration['source'])} "
            f"(SHA-256 of the pixels {calibration['sha256'][:16]}…)."
        )
    for precision, reason in parity.get("refused", {}).items():
        text += f"\n\nRejected precision, {escape(precision)}: {escape(reason)}"
    return text


def _limits(learner: Mapping[str, Any]) -> str:
    from ssd_edge.learners import LEARNERS  # imports PyTorch

    if LEARNERS[learner["name"]].replay:
        stored = (
            "- **Replay**: it stores embeddings of individual training images, and of images that it is taught later. "
            "They are not images, but they are data about the people or objects shown."
        )
    else:
        stored = (
            "- It stores no images, only sums over their embeddings. These are data about the people or objects shown: "
            "the difference of two states gives back the embeddings of one or two images that were learned in between, "
            "and a state shows whether a given image is among the few that a class was taught with."
        )
    return (
        "## Limits\n\n"
        "- Speed, memory and energy: not measured on a board.\n"
        "- The accuracy applies to images like the test images. Other cameras, lighting or backgrounds are untested.\n"
        "- It was not tested on images of other classes.\n"
        "- The `score` of an answer is a probability, calibrated on held-out images; it says nothing about images of "
        "other classes.\n"
        f"{stored}\n"
        "- The digest of the bundle shows that it is intact, not who created it; check its signature with "
        "`ssd-edge verify --key FILE.pub`."
    )
