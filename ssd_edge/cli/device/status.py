"""``ssd-edge device status``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ssd_edge.cli.options import CLASSES, JSON, ROOT, describe_classes, echo, open_device, print_json
from ssd_edge.system import size

if TYPE_CHECKING:
    from device_runtime.machine.vitals import Vitals
    from device_runtime.results import Status


@click.command()
@CLASSES
@ROOT
@JSON
def status(list_classes: bool, root: Path | None, as_json: bool) -> None:
    """Show the classes, the backbone and the machine."""
    found = open_device(root).status()
    if as_json:
        print_json(found.to_dict())
        return
    signed = f"signed by {found.signed_by}" if found.signed_by else "not signed"
    stores = ", stores samples" if found.replay else ""
    rows: dict[str, Sequence[str]] = {
        "generation": [str(found.generation), *[found.warning] * bool(found.warning)],
        "classes": _classes(found),
        "learner": [f"{found.learner} ({size(found.state_bytes)}{stores})", f"answers with {found.answers_with}"],
        "backbone": [found.precision, found.provider or "not started yet", *[found.note] * bool(found.note)],
        "bundle": [found.bundle, f"release {found.release}", signed],
        "installed": [found.installation, f"in {found.root}"],
        "machine": _machine(found.machine),
        "watched": _watched(found.watched),
    }
    for key, values in rows.items():
        echo(f"{key:11} {', '.join(values)}")
    for name, images in found.images.items() if list_classes else ():
        here = ", learned here" if name in found.learned_here else ""
        echo(f"  {name}: {images:,} images{here}")


def _classes(found: Status) -> list[str]:
    """Format the number of classes and of their images."""
    counts = list(found.images.values())
    if not counts:
        return [describe_classes(())]
    each = f"{min(counts):,} to {max(counts):,} each" if min(counts) < max(counts) else f"{counts[0]:,} each"
    here = [f"{len(found.learned_here):,} of them learned here"] if found.learned_here else []
    return [describe_classes(found.classes), *here, f"{sum(counts):,} images ({each})"]


def _machine(vitals: Vitals) -> list[str]:
    """Format memory, disk, temperature and power mode; values that are not available are left out."""
    told = [f"{vitals.available_mb:,} MiB of memory free"]
    if vitals.disk_free_mb is not None:
        told.append(f"{vitals.disk_free_mb:,} MiB of disk free")
    if vitals.hottest is not None:
        told.append(f"{vitals.hottest:.0f} °C at most")
    return told + [f"power mode {vitals.power_mode}"] * bool(vitals.power_mode)


def _watched(seen: Mapping[str, Any] | None) -> list[str]:
    """Format the last record of `device watch`."""
    if seen is None:
        return ["nothing yet; start with: ssd-edge device watch"]
    index = "" if seen["psi"] is None else f" (PSI {seen['psi']:.3f})"
    rejected = "" if seen["reject_rate"] is None else f", {seen['reject_rate']:.1%} of them unknown"
    age = "before this boot" if seen["age"] is None else f"{seen['age']:.0f} s ago"
    skipped = [f"{seen['skipped']} images without a prediction"] if seen.get("skipped") else []
    return [f"drift {seen['level']}{index}", f"{seen['images']} recent images{rejected}", *skipped, f"recorded {age}"]
