"""Standard output on a full disk, and errors of the system that no verb expects: one sentence, no traceback."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import pytest

from ssd_edge.cli import cli as group
from ssd_edge.cli import main


def verbs(command: click.Command, name: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yield every command as words."""
    if isinstance(command, click.Group):
        for word, inner in command.commands.items():
            yield from verbs(inner, (*name, word))
    yield name


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Function that runs the command line in this process and returns the exit code and standard error."""

    def call(*args: str | Path, stdout: str = "/dev/full") -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["ssd-edge", *map(str, args)])
        with open(stdout, "w", encoding="utf-8") as stream, pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "stdout", stream)
            patch.setattr("signal.signal", lambda *a: None)
            with pytest.raises(SystemExit) as ended:
                main()
        assert isinstance(ended.value.code, int)
        return ended.value.code, capfd.readouterr().err

    return call


def refuses(answer: tuple[int, str]) -> bool:
    code, told = answer
    return code == 3 and told.splitlines()[-1].startswith(
        "error: cannot write the result to standard output: the disk is full: free some space; what was changed"
    )


@pytest.mark.parametrize("verb", list(verbs(group)), ids=" ".join)
def test_help_on_a_full_disk(run: Callable[..., tuple[int, str]], verb: tuple[str, ...]) -> None:
    assert refuses(run(*verb, "--help"))


def test_every_quick_verb_on_a_full_disk(
    run: Callable[..., tuple[int, str]], installed: Path, bundle: Path, shapes: Path, tmp_path: Path
) -> None:
    import shutil

    root = ("--root", shutil.copytree(installed, tmp_path / "root"))
    photo = next((shapes / "test" / "circle").iterdir())
    plain = [("config",), ("--version",), ("keys", "new", "a", "--folder", tmp_path)]
    both: list[tuple[str | Path, ...]] = [
        ("inspect", bundle),
        ("verify", bundle),
        ("doctor", *root),
        *(("device", verb, *root) for verb in ("status", "history", "fsck", "trust")),
        ("device", "predict", photo, *root),
        ("device", "export", tmp_path / "out.ssdedge", *root),
        ("device", "rename", "circle", "ring", *root),
        ("device", "rollback", *root),
    ]
    for words in [*plain, *both, *((*words, "--json") for words in both)]:
        assert refuses(run(*words)), words


@pytest.mark.parametrize(
    ("words", "to", "code"),
    [
        (["--version"], "stdout", 3),
        (["--version"], "stderr", 0),
        (["inspect", "nothing"], "stderr", 2),
    ],
)
def test_the_exit_code_of_the_process(words: list[str], to: str, code: int) -> None:
    """Python would write what is left in its buffers once more, and end with exit code 120."""
    with open("/dev/full", "w", encoding="utf-8") as full:
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, to: full}
        done = subprocess.run([sys.executable, "-m", "ssd_edge", *words], check=False, text=True, **streams)
    assert done.returncode == code
    assert "Traceback" not in f"{done.stdout}{done.stderr}"


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EMFILE, errno.EFBIG, errno.EOPNOTSUPP, 9999])
def test_an_error_that_no_verb_expects(
    run: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, number: int
) -> None:
    def fail(*args: object) -> None:
        raise OSError(number, os.strerror(number), "some/file")

    monkeypatch.setattr("device_runtime.install.trust.trusted", fail)
    code, told = run("device", "trust", "--root", tmp_path, stdout=os.devnull)
    assert code == 3
    assert told.startswith("error: some/file: ")
    assert told.count("\n") == 1
