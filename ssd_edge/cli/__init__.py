"""The command line, with one module per verb. Verbs import PyTorch inside, so that ``--help`` is fast.

Results go to standard output, everything else to standard error. Exit codes: docs/cli.md.
"""

from __future__ import annotations

import signal
import sys
import traceback
from typing import Any, NoReturn

import click

from ssd_edge.cli.bench import bench
from ssd_edge.cli.config import config
from ssd_edge.cli.deploy import deploy
from ssd_edge.cli.device import device
from ssd_edge.cli.doctor import doctor
from ssd_edge.cli.evaluate import evaluate
from ssd_edge.cli.inspect import inspect
from ssd_edge.cli.keys import keys
from ssd_edge.cli.pretrain import pretrain
from ssd_edge.cli.profile import profile
from ssd_edge.cli.push import push
from ssd_edge.cli.reproduce import reproduce
from ssd_edge.cli.train import train
from ssd_edge.cli.verify import verify
from ssd_edge.errors import EnvironmentUnfitError, SSDEdgeError, printable
from ssd_edge.system import VERSION

INTERRUPTED = 130
OPTIONAL = {
    **dict.fromkeys(("torch", "onnxruntime", "cryptography"), "device"),
    "onnx": "export",
    "sklearn": "train",
    "rich": "train",
}


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(VERSION, prog_name="ssd-edge")
def cli() -> None:
    """Continual learning for edge devices: train, deploy, learn on the device, undo.

    \b
    On a workstation:  ssd-edge train data.path=FOLDER
                       ssd-edge deploy --target jetson runs/1 -o robot.ssdedge
                       ssd-edge push robot.ssdedge user@camera-3
    On the device:     ssd-edge device install robot.ssdedge
                       ssd-edge device learn --label gear photos/
                       ssd-edge device predict frame.jpg
                       ssd-edge device rollback
    """


for command in (
    *(train, evaluate, deploy, push, device, inspect, verify, profile, bench, doctor, keys),
    *(pretrain, reproduce, config),
):
    cli.add_command(command)


def _interrupt(number: int, frame: Any) -> NoReturn:
    raise KeyboardInterrupt


def _comes_from_interrupt(error: BaseException | None) -> bool:
    """Return True if an interrupt caused an exception: while a library is imported, it may become an ImportError."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def main() -> NoReturn:
    """Run the command line and exit; only a bug ends in a traceback."""
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        try:
            cli.main(standalone_mode=False)
        except Exception as error:
            if not isinstance(error, click.Abort) and _comes_from_interrupt(error):
                raise KeyboardInterrupt from None
            raise
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except SSDEdgeError as error:
        # names in it may come from an untrusted file: no escape codes to the terminal
        click.echo("\n".join(map(printable, f"error: {error}".split("\n"))), err=True)
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort) as error:
        hint = str(error.__cause__ or error)  # click replaces KeyboardInterrupt by Abort without its text
        click.echo(f"interrupted{': ' + hint if hint else ''}", err=True)
        sys.exit(INTERRUPTED)
    except BrokenPipeError:  # `ssd-edge … | head`
        sys.stderr.close()
        sys.exit(1)
    except ModuleNotFoundError as error:
        if error.name not in OPTIONAL:
            raise
        click.echo(
            f"error: the package '{error.name}' is needed and not installed; on a PC: pip install "
            f"'ssd-edge[{OPTIONAL[error.name]}]', on a Jetson use the one from JetPack",
            err=True,
        )
        sys.exit(EnvironmentUnfitError.exit_code)
    except Exception:
        traceback.print_exc()
        click.echo("internal error: this is a bug in ssd-edge; please report it with the lines above", err=True)
        sys.exit(1)
    sys.exit(0)
