"""``ssd-edge inspect``."""

from __future__ import annotations

import dataclasses
import json
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ssd_edge.cli.options import JSON, echo, print_json

if TYPE_CHECKING:
    from ssd_edge.bundle.format import Bundle
    from ssd_edge.bundle.onnx_scan import Facts, Value

WIDTH, MARGIN = 100, 12  # of the output, in characters
MAX_CLASSES = 20
MAX_TEXT = 300  # characters per value


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@JSON
def inspect(bundle: Path, as_json: bool) -> None:
    """Show the contents of BUNDLE.

    Its format is checked, its signature is not: see ssd-edge verify.
    """
    from ssd_edge import bundle as bundles
    from ssd_edge.bundle import onnx_scan

    opened = bundles.read(bundle, allow_control_flow=True)
    graphs: dict[str, onnx_scan.Facts] = {
        role: onnx_scan.scan(opened.read(role), opened.roles[role], allow_control_flow=True)
        for role in ("backbone", "head")
        if role in opened.roles
    }
    if as_json:
        print_json(_facts(bundle, opened, graphs))
        return
    for label, text in _lines(bundle, opened, graphs):
        for line in _wrapped(label, text):
            echo(line)
    echo("entries")
    roles = {path: role for role, path in opened.roles.items()}
    for path in sorted(opened.entries):
        echo(f"{len(opened.entries[path]):>14,}  {path}  {shown(roles.get(path, ''))}".rstrip())


def shown(value: Any) -> str:
    """Format a value from an untrusted bundle as one line of limited length."""
    text = value if isinstance(value, str) else f"{value:.6g}" if isinstance(value, float) else json.dumps(value)
    line = " ".join(text.split())
    return line if len(line) <= MAX_TEXT else line[:MAX_TEXT] + "…"


def signed_with(opened: Bundle) -> str | None:
    """Return the id of the key named in the signature of a bundle, without verifying the signature."""
    return opened.signature.key if opened.signature else None


def _facts(path: Path, opened: Bundle, graphs: Mapping[str, Facts]) -> dict[str, Any]:
    return {
        **opened.manifest,
        "bundle": str(path),
        "bytes": path.stat().st_size,
        "sha256": opened.sha256,
        "signature": signed_with(opened),
        "graphs": {role: dataclasses.asdict(facts) for role, facts in graphs.items()},
    }


def _wrapped(label: str, text: str) -> list[str]:
    indent = " " * MARGIN
    return textwrap.wrap(text, WIDTH, initial_indent=f"{label:{MARGIN}}", subsequent_indent=indent) or [label]


def _lines(path: Path, opened: Bundle, graphs: Mapping[str, Facts]) -> Iterator[tuple[str, str]]:
    from ssd_edge.images import Pixels

    manifest = opened.manifest
    learner, backbone, metrics, names = (manifest[key] for key in ("learner", "backbone", "metrics", "classes"))
    yield "name", shown(manifest["name"])
    yield "file", f"{shown(str(path))}, {path.stat().st_size:,} bytes"
    yield "sha256", opened.sha256
    yield "release", str(manifest["release"])
    yield "created", manifest["created"]
    yield "target", shown(manifest["target"])
    key = signed_with(opened)
    yield "signature", f"names the key {key}; not checked here, see ssd-edge verify" if key else "unsigned"
    yield "learner", f"{shown(learner['name'])}: {_pairs(learner['settings'])}"
    more = f" … and {len(names) - MAX_CLASSES} more" if len(names) > MAX_CLASSES else ""
    yield "classes", f"{len(names)}: {', '.join(names[:MAX_CLASSES])}{more}"
    yield (
        "backbone",
        f"{shown(backbone['id'])}: {backbone['size']} x {backbone['size']} pixels to {backbone['dim']} values, "
        f"{shown(backbone['precision'])}, opset {backbone['opset']}",
    )
    yield "  images", Pixels.from_dict(backbone).describe()
    for role, facts in graphs.items():
        if role != "backbone":
            yield role, f"opset {facts.opset}"
        yield "  takes", ", ".join(map(_value, facts.inputs))
        yield "  gives", ", ".join(map(_value, facts.outputs))
        yield "  operators", f"{facts.nodes} nodes: {' '.join(facts.op_types)}"
    yield "accuracy", _accuracy(metrics)
    for name in ("baselines", "panel"):
        if isinstance(metrics.get(name), dict):
            yield f"  {name}", _pairs(metrics[name])
    parts = {key: value for key, value in manifest["parity"].items() if isinstance(value, dict)}
    yield "parity", _pairs({key: value for key, value in manifest["parity"].items() if key not in parts})
    for key, part in parts.items():
        yield f"  {shown(key)[: MARGIN - 3]}", _pairs(dict(_flat(part)))


def _value(value: Value) -> str:
    sides = ["?" if side is None else str(side) for side in value.shape or ()]
    shape = f"({', '.join(sides)})" if value.shape is not None else "of any shape"
    return shown(f"{value.name} {value.dtype} {shape}")


def _accuracy(metrics: Mapping[str, Any]) -> str:
    average = metrics.get("average_accuracy")
    rest = [f"{key} {shown(metrics[key])}" for key in ("forgetting", "test_images", "data") if key in metrics]
    return ", ".join([f"{shown(average)} on average" if average is not None else "not stated", *rest])


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{shown(key)} {shown(value)}" for key, value in values.items()) or "none"


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the items of nested objects as ``outer.inner``; objects below the second level are one value."""
    for key, value in values.items():
        if isinstance(value, dict) and not prefix:
            yield from _flat(value, f"{key}.")
        else:
            yield f"{prefix}{key}", value
