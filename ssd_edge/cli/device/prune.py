"""``ssd-edge device prune``."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import click

from ssd_edge.cli.options import JSON, ROOT, echo, print_json, root_or_default
from ssd_edge.system import size


@click.command()
@click.option("--keep", type=click.IntRange(1), help="Number of the newest generations to keep.")
@click.option(
    "--all-but-current",
    is_flag=True,
    help="Keep only the current generation; also delete the journal's changes, uploads and drift counts.",
)
@click.option("--keep-installed", is_flag=True, help="With --all-but-current: keep the installed generation as well.")
@ROOT
@JSON
def prune(keep: int | None, all_but_current: bool, keep_installed: bool, root: Path | None, as_json: bool) -> None:
    """Delete old generations.

    With --keep, the current generation, its replacement if it were damaged, and the installed one stay as well. With
    --all-but-current nothing is left to compare the current generation with, but there is no rollback any more and,
    unless --keep-installed is given, no merge.
    """
    from device_runtime.store.generations import Generations

    if all_but_current == (keep is not None) or (keep_installed and not all_but_current):
        raise click.UsageError("give either --keep N or --all-but-current; --keep-installed needs the latter")
    store = Generations(root_or_default(root))
    with store.writer():
        pruned = store.prune(keep) if keep is not None else store.keep_only_current(keep_installed)
        store.reserve()
        left = store.numbers()
    if as_json:
        print_json({**dataclasses.asdict(pruned), "left": list(left)})
        return
    what = ", ".join(map(str, pruned.generations)) or "none"
    kept = ", ".join(map(str, left))
    echo(f"deleted generations: {what} ({size(pruned.freed_bytes)}); left: {kept} ({size(pruned.left_bytes)})")
    if all_but_current:
        merges = "" if keep_installed else " and merge"
        echo(f"no longer possible: rollback{merges}. Deleted data may stay on the medium until it is overwritten.")
