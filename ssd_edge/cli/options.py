"""Options and helpers that several verbs share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

CONFIG = click.option("--config", "config_file", type=click.Path(path_type=Path), help="A YAML file; words win.")
OVERRIDES = click.argument("overrides", nargs=-1, metavar="[SECTION.KEY=VALUE]...")
JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on standard output.")


def read_tree(config_file: Path | None, overrides: tuple[str, ...]) -> dict[str, Any]:
    """The plain values of a YAML file with words over it."""
    from ssd_edge.config import merge, read_yaml

    return merge(read_yaml(config_file) if config_file else {}, overrides)


def print_json(value: Any) -> None:
    """One JSON object on standard output."""
    click.echo(json.dumps(value, ensure_ascii=False, allow_nan=False))
