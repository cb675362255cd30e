"""``ssd-edge device …``: the verbs that change what a device knows without images, and those between devices."""

from __future__ import annotations

from pathlib import Path

import click

from ssd_edge.cli.options import JSON, MAX_FORGETTING, ROOT, listed, open_device, print_json, tell_cost, warn


@click.command()
@click.argument("label")
@click.argument("new")
@ROOT
@JSON
def rename(label: str, new: str, root: Path | None, as_json: bool) -> None:
    """Give the class LABEL the name NEW; what was learned stays as it is."""
    result = open_device(root).rename(label, new)
    if as_json:
        print_json(result)
    else:
        was, now = result["renamed"]
        click.echo(f"generation {result['generation']}: '{was}' is called '{now}'")


@click.command()
@click.argument("label")
@click.option("--exactly", is_flag=True, help="Refuse where it cannot be as if it had never been taught.")
@MAX_FORGETTING
@ROOT
@JSON
def forget(label: str, exactly: bool, max_forgetting: float, root: Path | None, as_json: bool) -> None:
    """Take the class LABEL out; says whether something of it stays.

    Older generations still know it, so that `rollback` can undo this, until ten newer ones have been made.
    """
    from device_runtime.learning.guard import Limits

    result = open_device(root).forget(label, exactly, Limits(max_forgetting))
    if as_json:
        warn(result)
        print_json(result)
        return
    how = "as if it had never been taught" if result["exact"] else f"not exactly: {result['left']}"
    click.echo(f"generation {result['generation']}: forgot '{result['forgot']}', {how}")
    warn(result)
    tell_cost(result, "classes that stay")


@click.command("merge-labels")
@click.argument("labels", nargs=-1, required=True, metavar="LABEL...")
@click.option("--into", required=True, metavar="NAME", help="Name of the one class: one of theirs, or a new name.")
@MAX_FORGETTING
@ROOT
@JSON
def merge_labels(labels: tuple[str, ...], into: str, max_forgetting: float, root: Path | None, as_json: bool) -> None:
    """Make one class of several LABELs, as if they had been taught under one name."""
    from device_runtime.learning.guard import Limits

    result = open_device(root).merge_labels(labels, into, Limits(max_forgetting))
    if as_json:
        warn(result)
        print_json(result)
        return
    click.echo(f"generation {result['generation']}: {', '.join(result['merged_labels'])} are '{result['into']}' now")
    warn(result)
    tell_cost(result, "classes that stay")


@click.command()
@click.argument("output", type=click.Path(path_type=Path), metavar="FILE")
@click.option("--sign", "key", type=click.Path(path_type=Path), help="A private key, see ssd-edge keys.")
@ROOT
@JSON
def export(output: Path, key: Path | None, root: Path | None, as_json: bool) -> None:
    """Write what this device knows as a bundle: for another device, for merging, or as a backup."""
    result = open_device(root).export(output, key)
    if as_json:
        print_json(result)
        return
    signed = f"signed by {result['signed_by']}" if result["signed_by"] else "not signed"
    click.echo(f"{output}: {result['bytes'] / 1e6:.1f} MB, {listed(result['classes'])}; {signed}")


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@MAX_FORGETTING
@ROOT
@JSON
def merge(bundle: Path, max_forgetting: float, root: Path | None, as_json: bool) -> None:
    """Also learn what another device has learned, from the BUNDLE that it has exported.

    Both must have started from one bundle. Classes of one name become one. To go on from the merged state on both
    devices, export it here and install it on both.
    """
    from device_runtime.learning.guard import Limits

    result = open_device(root).merge(bundle, Limits(max_forgetting))
    if as_json:
        warn(result)
        print_json(result)
        return
    click.echo(f"generation {result['generation']}: merged with installation {result['merged']}")
    for one in result["taught"]:
        click.echo(f"  {one['label']}: {one['images']} images, {'new' if one['new'] else 'known before'}")
    warn(result)
    tell_cost(result, "classes that stay")
