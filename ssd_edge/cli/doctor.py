"""``ssd-edge doctor``."""

from __future__ import annotations

import dataclasses
import sys
import textwrap
from pathlib import Path

import click

from ssd_edge.cli.options import JSON, ROOT, echo, print_json
from ssd_edge.errors import EnvironmentUnfitError

WIDTH = 100
COLOURS = {"ok": "green", "note": None, "warning": "yellow", "unfit": "red"}


@click.command()
@click.argument("bundle", required=False, type=click.Path(path_type=Path))
@ROOT
@JSON
def doctor(bundle: Path | None, root: Path | None, as_json: bool) -> None:
    """Check whether this machine is fit.

    Checks it as a device, and for BUNDLE if one is given. Exit code 3 if it is unfit.
    """
    from device_runtime.machine.board import describe
    from device_runtime.machine.doctor import examine, verdict
    from ssd_edge.bundle.format import read

    board = describe()  # before examining packages, which takes memory
    checks = examine(read(bundle, allow_control_flow=True) if bundle else None, root, board)
    result = verdict(checks)
    if as_json:
        print_json(
            {
                "verdict": result,
                "fit": result == "fit",
                "checks": [dataclasses.asdict(check) for check in checks],
                "machine": board.to_dict(),
            }
        )
    else:
        width = max(len(check.name) for check in checks)
        for check in checks:
            first, *rest = _wrapped(check.found, width + 11) or [""]
            echo(f"  {check.name:{width}}  {first}", mark=f"{check.state:7}", colour=COLOURS[check.state])
            for line in rest + (_wrapped(f"-> {check.fix}", width + 11) if check.fix else []):
                echo(f"{'':{width + 11}}{line}")
        echo(result)
    if result != "fit":
        sys.exit(EnvironmentUnfitError.exit_code)  # without an error message: the table shows the reason


def _wrapped(text: str, margin: int) -> list[str]:
    """Wrap text beside a margin; words, which may be paths, are not broken."""
    return textwrap.wrap(" ".join(text.split()), WIDTH - margin, break_long_words=False, break_on_hyphens=False)
