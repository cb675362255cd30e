"""``ssd-edge config``."""

from __future__ import annotations

import dataclasses

import click

from ssd_edge.cli.options import echo


@click.command()
@click.option(
    "--learner", "name", default="slda", show_default=True, help="Learner whose settings are listed, or auto."
)
def config(name: str) -> None:
    """Print every setting of `train` as YAML.

    Each setting is printed with its default and a description.

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
        echo(f"{section}:")
        if section == "learner":
            echo(f"  name: {name}".ljust(40) + f"  # one of {', '.join(LEARNERS)}; or {AUTO}")
            values = settings
            if settings is None:
                from ssd_edge.learners.registry import CANDIDATES

                echo(f"  # train compares {', '.join(CANDIDATES)} with default settings on held-out training images")
                echo("  # and selects one of them; no other key is allowed in this section")
                continue
        for field in dataclasses.fields(values):
            value = getattr(values, field.name)
            text = f"[{', '.join(map(str, value))}]" if isinstance(value, tuple) else _scalar(value)
            echo(f"  {field.name}: {text}".ljust(40) + f"  # {field.metadata['why']}")


def _scalar(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if value != "" else '""'
