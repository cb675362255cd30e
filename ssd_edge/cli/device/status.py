"""``ssd-edge device status``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ssd_edge.cli.options import JSON, ROOT, echo, open_device, print_json


@click.command()
@ROOT
@JSON
def status(root: Path | None, as_json: bool) -> None:
    """Show the classes, the backbone and the machine."""
    result = open_device(root).status().to_dict()
    if as_json:
        print_json(result)
        return
    result["images"] = [f"{name} ({count})" for name, count in result["images"].items()]
    result |= {"machine": _machine(result["machine"]), "watched": _watched(result["watched"])}
    for key, value in result.items():
        if value not in ("", None, []):
            echo(f"{key:13} {', '.join(value) if isinstance(value, list) else value}")


def _machine(vitals: dict[str, Any]) -> list[str]:
    """Format memory, disk, temperature and power mode; values that are not available are left out."""
    told = [f"{vitals['available_mb']:,} MiB of memory free"]
    if vitals["disk_free_mb"] is not None:
        told.append(f"{vitals['disk_free_mb']:,} MiB of disk free")
    if vitals["hottest"] is not None:
        told.append(f"{vitals['hottest']:.0f} °C at most")
    return told + [f"power mode {vitals['power_mode']}"] * bool(vitals["power_mode"])


def _watched(seen: dict[str, Any] | None) -> list[str]:
    """Format the last record of `device watch`."""
    if seen is None:
        return ["nothing yet; start with: ssd-edge device watch"]
    index = "" if seen["psi"] is None else f" (PSI {seen['psi']:.3f})"
    rejected = "" if seen["reject_rate"] is None else f", {seen['reject_rate']:.1%} of them unknown"
    age = "before this boot" if seen["age"] is None else f"{seen['age']:.0f} s ago"
    skipped = [f"{seen['skipped']} images without a prediction"] if seen.get("skipped") else []
    return [f"drift {seen['level']}{index}", f"{seen['images']} recent images{rejected}", *skipped, f"recorded {age}"]
