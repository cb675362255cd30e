"""``ssd-edge device fsck``."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import click

from ssd_edge.cli.options import JSON, ROOT, echo, print_json, root_or_default
from ssd_edge.errors import BundleRefusedError


@click.command()
@click.option("--repair", is_flag=True, help="Remove leftovers, complete the journal, select an intact generation.")
@ROOT
@JSON
def fsck(repair: bool, root: Path | None, as_json: bool) -> None:
    """Check the device's state for damage. Exit code 5 if any remains.

    --repair never deletes an intact generation.
    """
    from device_runtime.store import fsck as checks
    from device_runtime.store.generations import Generations

    root = root_or_default(root)
    found = (checks.repair if repair else checks.check)(Generations(root))
    left = [finding for finding in found if finding.severity == "damage" and not finding.repaired]
    if as_json:
        print_json({"root": str(root), "findings": [{**dataclasses.asdict(f), "path": str(f.path)} for f in found]})
    for finding in [] if as_json else found:
        mark = "repaired" if finding.repaired else finding.severity
        echo(f"{mark:9} {finding.path}: {finding.problem}")
    if left:
        raise BundleRefusedError(f"{len(left)} damaged parts in {root}; the device uses the newest intact generation")
    if not as_json:
        echo(f"{root} is sound")
