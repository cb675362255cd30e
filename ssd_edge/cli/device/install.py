"""``ssd-edge device install``."""

from __future__ import annotations

from pathlib import Path

import click

from ssd_edge.cli.options import JSON, ROOT, STRICT, listed, print_json, root_or_default


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--allow-downgrade", is_flag=True, help="Take a lower release than the highest that was installed.")
@STRICT
@ROOT
@JSON
def install(bundle: Path, allow_downgrade: bool, strict: bool, root: Path | None, as_json: bool) -> None:
    """Verify BUNDLE, test it on this machine, and make it the current generation."""
    from device_runtime.install.bundle import install as put

    root = root_or_default(root)
    generation = put(
        root, bundle, allow_downgrade=allow_downgrade, strict=strict, say=lambda text: click.echo(text, err=True)
    )
    names = generation.registry.names
    if as_json:
        print_json({"generation": generation.number, "classes": names, "root": str(root), **generation.info})
    else:
        click.echo(f"generation {generation.number} in {root}: {listed(names)}")
