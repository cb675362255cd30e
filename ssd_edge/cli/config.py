"""``ssd-edge config``."""

from __future__ import annotations

import dataclasses

import click


@click.command()
@click.option("--learner", "name", default="landmark", show_default=True, help="Whose settings to list; or auto.")
def config(name: str) -> None:
    """Print every key of `train` with its default and the reason for it, as YAML.

    \b
    ssd-edge config > my.yaml
    ssd-edge train --config my.yaml
    """
    from ssd_edge.config import TrainConfig
    from ssd_edge.learners import AUTO, LEARNERS, settings_class

    settings = None if name == AUTO else settings_class(name)()
    defaults = TrainConfig()
    sections = {field.name: getattr(defaults, field.name) for field in dataclasses.fields(defaults)}
    for section, values in sections.items():
        click.echo(f"{section}:")
        if section == "learner":
            click.echo(f"  name: {name}".ljust(40) + f"  # one of {', '.join(LEARNERS)}; or {AUTO}")
            values = settings
            if settings is None:
                from ssd_edge.learners.registry import CANDIDATES

                click.echo(f"  # train compares {', '.join(CANDIDATES)} on a held-out part of the training images,")
                click.echo("  # each with its defaults, and takes one of them; no other key may stand here")
                continue
        for field in dataclasses.fields(values):
            value = getattr(values, field.name)
            text = f"[{', '.join(map(str, value))}]" if isinstance(value, tuple) else _scalar(value)
            click.echo(f"  {field.name}: {text}".ljust(40) + f"  # {field.metadata['why']}")


def _scalar(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if value != "" else '""'
