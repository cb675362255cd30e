"""MODEL_CARD.md of a bundle: what it is for, what it was measured on, what it cannot do.

Everything in it is taken from the manifest and the class registry. Names and other words of the user are
escaped: a class called ``<script>`` or ``[x](http://…)`` is text, wherever the card is shown.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping
from typing import Any

from ssd_edge import targets
from ssd_edge.classes import ClassRegistry
from ssd_edge.learners import LEARNERS

_ENTITIES = {"<": "&lt;", ">": "&gt;", "&": "&amp;"}  # a backslash would leave them HTML for some readers
# What means something within a line of Markdown; the last two make links of bare addresses.
_MARKUP = re.compile(r"[\\`*_{}\[\]<>&|#~!$]|:(?=//)|(?<=www)\.", re.IGNORECASE)
KINDS = ("test", "brought", "synthetic")  # of images that the export was judged on
_PROVENANCE = {  # key of a backbone's provenance -> what to call it
    "arch": "architecture",
    "file": "file",
    "sha256": "SHA-256 of the file",
    "data": "trained on",
    "accuracy": "accuracy there",
    "command": "made by",
    "seed": "seed",
    "terms": "terms",
}


_NO_CLASS = (
    "## Classes\n\nNone: everything is taught on the device. No accuracy can be told before; `ssd-edge device learn` "
    "measures it on images that it holds out."
)


def escape(text: Any) -> str:
    """Text that Markdown and HTML show as it is, on one line."""
    line = " ".join(str(text).split())
    return _MARKUP.sub(lambda found: _ENTITIES.get(found[0], "\\" + found[0]), line)


def render(manifest: Mapping[str, Any], registry: ClassRegistry) -> str:
    """The card of a bundle.

    Args:
        manifest: as `packing` builds it.
        registry: the classes with the number of training images of each.

    Returns:
        Markdown; the same for the same arguments.
    """
    sections = [
        _purpose(manifest),
        *([_classes(manifest["metrics"], registry), _accuracy(manifest)] if len(registry) else [_NO_CLASS]),
        _backbone(manifest["backbone"]),
        _making(manifest),
        _export(manifest["parity"]),
        _limits(manifest["learner"]),
    ]
    return "\n\n".join(sections) + "\n"


CHANGED = "## Since it was deployed"


def amended(card: str, registry: ClassRegistry, events: Iterable[str]) -> str:
    """A card with what a device did to the bundle's classes, in place of such a section that it has.

    Args:
        card: of the bundle as it was deployed.
        registry: the classes now.
        events: what happened on the device, in sentences, oldest first.
    """
    before = card.split(f"\n{CHANGED}\n")[0].rstrip("\n")
    rows = [(escape(entry.name), f"{entry.images:,}", _ORIGINS.get(entry.origin, "")) for entry in registry.entries]
    told = "".join(f"- {escape(event)}\n" for event in events) or "- nothing\n"
    return (
        f"{before}\n\n{CHANGED}\n\nWhat stands above is about the bundle as it was deployed: its accuracy is not that "
        f"of the classes below. On a device:\n\n{told}\n" + _table(("class now", "images", "taught"), rows) + "\n"
    )


_ORIGINS = {"base": "before it was deployed", "device": "on a device"}


def _table(header: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    header = list(header)
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def _code(command: str) -> str:
    return "    " + " ".join(command.split())  # indented: nothing on one line can end it


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _purpose(manifest: Mapping[str, Any]) -> str:
    target = manifest["target"]
    return (
        f"# {escape(manifest['name'])}\n\n"
        f"Tells images of {len(manifest['classes']) or 'no'} classes apart, and learns further classes on the device "
        "from a few images of each, without the old images.\n\n"
        f"Prepared for `{target}`: {targets.get(target).title}. One image is {manifest['backbone']['size']} × "
        f"{manifest['backbone']['size']} pixels, RGB; others are resized.\n\n"
        "It is meant for sorting images like those it was trained and tested on. It is not meant for decisions on "
        "which somebody's safety, health or rights depend."
    )


def _classes(metrics: Mapping[str, Any], registry: ClassRegistry) -> str:
    accuracy = metrics.get("class_accuracy", {})
    rows = [(escape(entry.name), f"{entry.images:,}", _share(accuracy.get(entry.name))) for entry in registry.entries]
    return "## Classes\n\n" + _table(("class", "training images", "accuracy on test images"), rows)


def _accuracy(manifest: Mapping[str, Any]) -> str:
    metrics, name = manifest["metrics"], manifest["learner"]["name"]
    head = (
        "## Accuracy\n\n"
        f"Data: {escape(metrics['data'])}, {metrics['train_images']:,} training and {metrics['test_images']:,} test "
        f"images ({escape(metrics['split'])}), classes learned in {metrics['tasks']} tasks one after the other. "
        "Average accuracy is the mean over the tasks after the last one, without being told the task.\n\n"
    )
    rows = [(f"**{escape(name)}** (this bundle)", f"**{_share(metrics['average_accuracy'])}**")]
    rows += [(escape(other), _share(value)) for other, value in {**metrics["baselines"], **metrics["panel"]}.items()]
    forgetting = (
        f"\n\nForgetting (mean drop from the best): {_share(metrics['forgetting'])}. "
        f"Backward transfer: {_share(metrics['backward_transfer'])}."
    )
    if not metrics["panel"]:
        forgetting += (
            "\n\n**The run was made without the panel of simple methods (run.panel=false), so there is nothing to "
            "hold this figure against.**"
        )
    return head + _table(("on the same embeddings", "average accuracy"), rows) + forgetting


def _backbone(backbone: Mapping[str, Any]) -> str:
    provenance = {"terms": "", **backbone["provenance"]}
    lines = [f"- identity: `{backbone['id']}`, {backbone['dim']} values an embedding, {escape(backbone['precision'])}"]
    for key, label in _PROVENANCE.items():
        value = provenance.get(key)
        if isinstance(value, Mapping):
            value = ", ".join(f"{inner} {value[inner]}" for inner in sorted(value))
        if key == "terms" and not value:
            value = "not stated; ask whoever made the backbone"
        if value not in (None, ""):
            lines.append(f"- {label}: {escape(value)}")
    return "## Backbone\n\n" + "\n".join(lines)


def _making(manifest: Mapping[str, Any]) -> str:
    run, producer = manifest["run"], manifest["producer"]
    versions = {**run["versions"], **producer["packages"]}
    return (
        f"## How it was made\n\n{_code(shlex.join(map(str, run['argv'])))}\n\n"
        f"Release {manifest['release']}, finished {manifest['created']}, seed {run['seed']}, {run['threads']} threads "
        f"on {escape(run['machine'])}. "
        f"SSD-Edge {escape(producer['ssd_edge'])}, commit {escape(producer['git'])}; "
        + ", ".join(f"{escape(package)} {escape(version)}" for package, version in sorted(versions.items()))
        + "."
    )


def _export(parity: Mapping[str, Any]) -> str:
    header = (
        *("images", "number", "smallest cosine", "largest difference", "drift of a mean"),
        *("same decision", "accuracy before → after"),
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
        f"## Export\n\nThe exported backbone in {escape(parity['precision'])} (ONNX Runtime on a CPU) against the one "
        "that the run used:\n\n" + _table(header, rows)
    )
    if calibration := parity.get("calibration"):
        text += (
            f"\n\nCalibrated with {calibration['images']} images: {escape(calibration['source'])} "
            f"(SHA-256 of their pixels {calibration['sha256'][:16]}…)."
        )
    for precision, reason in parity.get("refused", {}).items():
        text += f"\n\nRefused on the way, {escape(precision)}: {escape(reason)}"
    return text


def _limits(learner: Mapping[str, Any]) -> str:
    if LEARNERS[learner["name"]].replay:
        kept = (
            "- **Replay**: it holds embeddings of training images, one by one, and of images that it is taught with "
            "later. They are no pictures, but they are data of the people or things shown."
        )
    else:
        kept = (
            "- It holds no images, but sums over them: the mean of a class taught with one image is that image's "
            "embedding."
        )
    return (
        "## Limits\n\n"
        "- Speed, memory and energy: not measured on a board.\n"
        "- The accuracy holds for images like the test images. Another camera, light or background was not tested.\n"
        "- It was not tested on images of anything but its classes.\n"
        f"{kept}\n"
        "- The bundle's digest says that it is complete, not who made it; a signature says whose key vouches for it "
        "(`ssd-edge inspect`)."
    )
