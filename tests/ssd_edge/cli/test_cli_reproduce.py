"""`ssd-edge reproduce` as a user meets it: without data (digits stand in), killed, interrupted, and misspelt."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest

from ssd_edge.cli.reproduce import reproduce
from ssd_edge.errors import InputError

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def reproduced(cli, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """T1 at the smoke budget, and what was printed."""
    out = tmp_path_factory.mktemp("reproduced")
    done = cli("reproduce", "t1", "--budget", "smoke", "--workers", "1", "--out", out)
    return out, done.stdout


def here(*words: str | Path) -> None:
    """The command in this process, which has PyTorch already."""
    reproduce.main([str(word) for word in words], standalone_mode=False)


def stored(out: Path) -> dict[str, dict]:
    root = out / "results" / "reproduce"
    return {str(path.relative_to(root)): json.loads(path.read_text()) for path in root.glob("*/*.json")}


def test_without_data_digits_stand_in_and_every_row_says_so(reproduced: tuple[Path, str]) -> None:
    out, told = reproduced
    cells = stored(out)
    assert len(cells) == 3 * (5 + 1)  # five systems and the upper bound on three streams
    for name, cell in cells.items():
        assert cell["stand_in"]
        assert name.split("/")[0] == cell["spec"]["asked"]["stream"]
        assert any(note.startswith("digits in place of") for note in cell["notes"])
        assert cell["state_bytes"] > 0
        assert 0 <= cell["accuracy"] <= 1
        assert cell["environment"]["versions"]["torch"]
    page = (out / "results.md").read_text()
    section = page[page.index("## T1") : page.index("## T2")]
    rows = [line for line in section.splitlines() if line.endswith("| smoke |") and "−" not in line.split("|")[2]]
    assert len(rows) == 15
    notes = {line[2 : line.index("]") + 1]: line for line in section.splitlines() if line.startswith("- [")}
    digits = {number.strip("[]") for number, line in notes.items() if "digits in place of" in line}
    assert len(digits) == 3
    assert all(digits & set(row.split("[")[1].split("]")[0].split(", ")) for row in rows)
    assert "18 cells, 0 of them stored already" in told
    assert "[18/18]" in told
    assert f"page: {out / 'results.md'}" in told


def test_what_is_stored_is_not_run_again(reproduced: tuple[Path, str], capsys) -> None:
    out, _ = reproduced
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    here("T3", "--budget", "smoke", "--workers", "1", "--out", out)
    assert "3 cells, 3 of them stored already" in capsys.readouterr().out  # T3's are among T1's
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    (out / "results.md").unlink()
    here("T1", "--page-only", "--out", out)
    assert (out / "results.md").read_bytes() == before[out / "results.md"]


def test_list_says_what_there_is_and_what_is_stored(reproduced: tuple[Path, str], capsys) -> None:
    here("list", "--out", reproduced[0])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("T1 ")
    assert "10,000 neurons: 5 systems × 3 streams; stored: smoke 15/15, reduced 0/45, full 0/75" in lines[0]
    assert {line.split()[0] for line in lines} >= {"T2", "Ent", "A2", "controls", "panel", "ewc"}


LACKING = "the budget reduced needs cifar10-jpg.tar.xz, cifar100-jpg.tar.xz, mnist.npz, but SSD_EDGE_DATA is not set"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["T9"], "there is no experiment 'T9'. Did you mean 't"),
        (["pannel"], "Did you mean 'panel'?"),
        (["list", "T1"], "list cannot be combined with other arguments"),
        (["T1"], LACKING),
        (["T3", "--budget", "full"], "the budget full needs cifar10-jpg.tar.xz"),
        (["T3", "--tiny-backbone", "/does/not/exist"], "is not a folder"),
    ],
)
def test_bad_input(words: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as raised:
        here(*words, "--out", tmp_path / "out")
    assert message in str(raised.value)
    assert not (tmp_path / "out").exists()  # nothing is left behind


@pytest.mark.parametrize("words", [["T1", "--budget", "tiny"], ["T1", "--orders", "6"], []])
def test_bad_usage(words: list[str]) -> None:
    with pytest.raises(click.UsageError):
        here(*words)


def test_bad_input_ends_in_one_sentence(cli, tmp_path: Path) -> None:
    done = cli("reproduce", "T1", "--out", tmp_path / "out", code=2)
    assert done.stderr == f"error: {LACKING}; put the files there\n"


def start(out: Path) -> subprocess.Popen:
    words = ["reproduce", "T3", "--budget", "smoke", "--workers", "2", "--out", str(out)]
    command = [sys.executable, "-m", "ssd_edge", *words]
    return subprocess.Popen(command, cwd=out.parent, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def workers(process: subprocess.Popen) -> list[int]:
    """The worker processes, as soon as there are any; they need seconds to import PyTorch."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process.poll() is None, process.stdout.read()
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        found = [int(child) for child in children if "spawn_main" in Path(f"/proc/{child}/cmdline").read_text()]
        if found:
            return found
        time.sleep(0.02)
    raise AssertionError("no worker was started in two minutes")


needs_proc = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="NOT RUN: no /proc to find workers in")


@pytest.mark.slow
@needs_proc
def test_a_killed_workers_cells_are_done_again(reproduced: tuple[Path, str], tmp_path: Path) -> None:
    process = start(tmp_path / "out")
    os.kill(workers(process)[0], signal.SIGKILL)
    told, _ = process.communicate(timeout=120)
    assert process.returncode == 0, told
    found, whole = stored(tmp_path / "out"), stored(reproduced[0])
    assert len(found) == 3
    for name, cell in found.items():
        assert cell["matrix"] == whole[name]["matrix"]  # the same from a worker and from the process itself


@needs_proc
def test_an_interrupt_ends_the_workers_and_says_how_to_go_on(tmp_path: Path) -> None:
    process = start(tmp_path / "out")
    children = workers(process)
    process.send_signal(signal.SIGINT)
    told, _ = process.communicate(timeout=120)
    assert process.returncode == 130, told
    assert "Traceback" not in told
    assert "run the same command again to continue" in told
    assert not any(Path(f"/proc/{child}").exists() for child in children)
