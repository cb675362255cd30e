"""What reaches a terminal: no control codes, whatever files, bundles, devices and libraries are called."""

from __future__ import annotations

import ast
import json
import logging
import resource
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from ssd_edge import cli as commands
from ssd_edge.cli.options import echo, log, print_json
from ssd_edge.errors import (
    BundleRefusedError,
    EnvironmentUnfitError,
    InputError,
    SSDEdgeError,
    meaning_of,
    printable,
    require,
)

ROOT = Path(__file__).resolve().parents[3]
HOSTILE = "a\x1b]0;title\x07\x9b2J\u202e\u200b\udce9\nb\u2028c"
SHOWN = "a?]0;title??2J??? b c"


def is_clean(text: str) -> bool:
    return all(letter.isprintable() or letter == "\n" for letter in text)


def test_one_function_writes_to_the_terminal() -> None:
    """Walk the sources: only `echo` and the progress line of cli/options.py call click.echo, and nothing prints."""
    protocol = {"run/bench.py", "machine/profile.py"}  # JSON from a child process to its parent
    found = []
    for package in ("ssd_edge", "device_runtime", "exporters"):
        for path in (ROOT / package).rglob("*.py"):
            for function in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(function, ast.Call):
                    called = ast.unparse(function.func)
                    if called in ("print", "pprint", "click.echo", "click.secho", "traceback.print_exc") or (
                        called.startswith(("sys.stdout.", "sys.stderr.")) and called.endswith((".write", ".writelines"))
                    ):
                        found.append((path.relative_to(ROOT / package).as_posix(), called))
    assert {call for call in found if call[0] not in protocol} == {("cli/options.py", "click.echo")}
    assert sum(call[0] == "cli/options.py" for call in found) == 3  # in `echo`, `log` and the line of progress
    assert {call[1] for call in found if call[0] in protocol} == {"print"}


def test_a_line_has_no_control_codes(capsys: pytest.CaptureFixture[str]) -> None:
    echo(HOSTILE)
    log(HOSTILE)
    echo(HOSTILE, mark=HOSTILE, colour="red")
    print_json({HOSTILE: HOSTILE})
    out, err = capsys.readouterr()
    line, marked, data = out.splitlines()
    assert (line, marked, err) == (SHOWN, SHOWN * 2, SHOWN + "\n")
    assert data.isascii()
    assert data.isprintable()
    assert json.loads(data) == {HOSTILE: HOSTILE}
    assert printable("日本語 é 🐕") == "日本語 é 🐕"


@pytest.mark.parametrize("kind", [InputError, BundleRefusedError, EnvironmentUnfitError])
def test_errors_of_the_library_are_printable(kind: type[SSDEdgeError]) -> None:
    """Also where Python or a caller's log prints them."""
    assert str(kind(HOSTILE)) == SHOWN


class _Failing:
    """Runs `main` with a command that calls a function."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str]) -> None:
        self._monkeypatch, self._refused = monkeypatch, refused

    def __call__(self, work: Callable[[], object], code: int) -> str:
        self._monkeypatch.setitem(commands.cli.commands, "work", click.Command("work", callback=work))
        return self._refused("work", code=code)


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str]) -> _Failing:
    return _Failing(monkeypatch, refused)


def raising(error: BaseException) -> Callable[[], object]:
    def work() -> object:
        raise error

    return work


@pytest.mark.parametrize(
    ("error", "code"),
    [(InputError(HOSTILE), 2), (click.UsageError(HOSTILE), 2), (KeyboardInterrupt(HOSTILE), 130)],
)
def test_messages_of_errors_are_clean(failing: _Failing, error: BaseException, code: int) -> None:
    assert is_clean(failing(raising(error), code))


def test_logs_and_warnings_are_clean(failing: _Failing) -> None:
    def work() -> None:
        record = logging.LogRecord("x", logging.WARNING, "x.py", 1, "%s is slow", (HOSTILE,), None)
        assert logging.lastResort is not None
        logging.lastResort.handle(record)  # the handler of a process without others; pytest adds some
        warnings.warn(HOSTILE, UserWarning, stacklevel=1)
        raise InputError("done")

    assert failing(work, 2) == f"{SHOWN} is slow\nwarning: {SHOWN} (UserWarning)\nerror: done\n"


def test_a_traceback_is_clean(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], failing: _Failing
) -> None:
    with pytest.raises(AssertionError, match="Traceback"):
        failing(raising(ValueError(HOSTILE)), 1)
    monkeypatch.setattr(sys, "argv", ["ssd-edge", "work"])
    with pytest.raises(SystemExit):
        commands.main()
    told = capfd.readouterr().err
    assert is_clean(told)
    assert told.endswith("internal error: this is a bug in ssd-edge; please report it with the lines above\n")


def _nested() -> object:
    return _nested()


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError("Unable to allocate 5. GiB"), "MemoryError"),
        (ImportError("libtorch_cpu.so: failed to map segment from shared object"), "libtorch_cpu"),
        (ImportError("NumPy\n\nOriginal error was: libf.so: failed to map segment from shared object"), "Original"),
        (OSError(12, "Cannot allocate memory"), "[Errno 12] Cannot allocate memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), "DefaultCPU"),
        (RuntimeError("CUDA out of memory. Tried to allocate 20 MiB"), "CUDA out of memory"),
        (RuntimeError("std::bad_alloc"), "std::bad_alloc"),
    ],
)
def test_lack_of_memory_in_any_form(error: Exception, message: str) -> None:
    found = meaning_of(error)
    assert isinstance(found, EnvironmentUnfitError)
    assert str(found).startswith(f"there is not enough memory ({message}")


def test_bugs_have_no_meaning() -> None:
    for error in (ValueError("x"), RuntimeError("shape"), KeyError("a"), UnicodeEncodeError("ascii", "é", 0, 1, "no")):
        assert meaning_of(error) is None


def test_too_little_memory_is_one_sentence(failing: _Failing) -> None:
    assert failing(raising(MemoryError()), 3).startswith("error: there is not enough memory (MemoryError); ")
    assert failing(_nested, 2) == "error: an input is nested too deeply to be read; simplify it\n"


def test_too_little_memory_to_load_a_library_is_no_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise OSError("libnvinfer.so: failed to map segment from shared object")

    monkeypatch.setattr("importlib.import_module", fail)
    with pytest.raises(EnvironmentUnfitError, match=r"not enough memory \(libnvinfer.*raise the limit"):
        require("tensorrt", "tensorrt", "run the backbone")


def test_too_little_memory_for_pytorch(tmp_path: Path) -> None:
    limit = 300 << 20
    done = subprocess.run(
        [sys.executable, "-m", "ssd_edge", "device", "forget", "x", "--root", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
    )
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr.startswith("error: there is not enough memory (")
    assert done.stderr.count("\n") == 1


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Folder with three images with control codes and bytes that are not UTF-8 in their names."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, name in enumerate((b"caf\xe9.png", b"a\x1b[2Jb.png", b"\xc2\x9b1m\xe2\x80\xae.png")):
        Image.fromarray(np.full((40, 40, 3), 40 * number, np.uint8)).save(folder / "x.png")
        (folder / "x.png").rename(folder / name.decode("utf-8", "surrogateescape"))
    return folder


def test_file_names_that_are_not_utf_8(installed: Path, bundle: Path, photos: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(installed, tmp_path / "root"))

    def run(*args: str | Path, code: int = 0) -> str:
        done = CliRunner().invoke(commands.device, [*map(str, args), "--root", str(root)])
        assert done.exit_code == code, done.exception
        assert is_clean(done.output)
        return done.stdout

    assert len(run("predict", photos).splitlines()) == 3
    shown = run("predict", photos, "--json")
    assert shown.isascii()
    named = [Path(one["image"]).name for one in json.loads(shown)["predictions"]]
    assert named == sorted(path.name for path in photos.iterdir())
    run("learn", "--label", "new", photos, "--max-forgetting", "1")
    odd = tmp_path / "r\udcff\x1b[2J\u202e.ssdedge"
    shutil.copy(bundle, odd)
    run("install", odd)
    assert "install r??[2J?.ssdedge" in run("history")
    assert run("history", "--json").isascii()
    run("status")
    run("export", tmp_path / "x\udcff.ssdedge", code=1)  # an exception, of which `main` makes exit code 5


def test_class_folders_that_are_not_utf_8(refused: Callable[..., str], photos: Path, tmp_path: Path) -> None:
    for number in range(2):
        shutil.copytree(photos, tmp_path / "data" / f"caf{number}\udce9")
    told = refused("train", f"data.path={tmp_path / 'data'}", code=2)
    assert told == "error: the class name 'caf0\\udce9' is not valid UTF-8; rename the folder\n"


def test_paths_of_a_run_that_are_not_utf_8(
    refused: Callable[..., str], photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "usb\udce9"
    for name in ("one", "two"):
        shutil.copytree(photos, home / name)
    for value in (home, "."):
        monkeypatch.setattr("os.getcwd", lambda: str(home))
        told = refused("train", f"data.path={value}", f"run.out={tmp_path / 'runs'}", code=2)
        assert told.startswith(f"error: data.path must be valid UTF-8, but is '{tmp_path}/usb?'; rename the")
    assert not (tmp_path / "runs").exists()
    (tmp_path / "link").symlink_to(home)
    (tmp_path / "c\udce9.yaml").write_text("run: {panel: false, baselines: false}")
    quick = ("backbone=tiny", "learner.name=ncm", "stream.tasks=1", f"run.out={tmp_path / 'runs'}")
    refused("train", "--config", tmp_path / "c\udce9.yaml", f"data.path={tmp_path / 'link'}", *quick, code=0)
    assert (tmp_path / "runs" / "1" / "report.html").is_file()
