"""``ssd-edge device install``."""

from __future__ import annotations

from pathlib import Path

import click

from ssd_edge.cli.options import (
    ALLOW_CONTROL_FLOW,
    CLASSES,
    JSON,
    ROOT,
    STRICT,
    describe_classes,
    echo,
    log,
    print_classes,
    print_json,
    root_or_default,
)


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--allow-downgrade", is_flag=True, help="Allow a lower release than the highest that was installed.")
@ALLOW_CONTROL_FLOW
@STRICT
@CLASSES
@ROOT
@JSON
def install(
    bundle: Path,
    allow_downgrade: bool,
    allow_control_flow: bool,
    strict: bool,
    list_classes: bool,
    root: Path | None,
    as_json: bool,
) -> None:
    """Verify and test BUNDLE, and switch to it."""
    from device_runtime.install.bundle import install as run

    root = root_or_default(root)
    generation = run(
        root, bundle, allow_downgrade=allow_downgrade, allow_control_flow=allow_control_flow, strict=strict, say=log
    )
    names = generation.registry.names
    if as_json:
        print_json({"generation": generation.number, "classes": names, "root": str(root), **generation.info})
    else:
        echo(f"generation {generation.number} in {root}: {describe_classes(names)}")
        print_classes(names if list_classes else [])
