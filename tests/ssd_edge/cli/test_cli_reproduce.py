"""`ssd-edge reproduce` through the command line: without data (digits stand in), killed, interrupted, bad input."""

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
    """Run T1 at the smoke budget; return its folder and output."""
    out = tmp_path_factory.mktemp("reproduced")
    done = cli("reproduce", "t1", "--budget", "smoke", "--workers", "1", "--out", out)
    return out, done.stdout


def run_in_process(*args: str | Path) -> None:
    """Run the command in this process, where PyTorch is already imported."""
    reproduce.main([str(arg) for arg in args], standalone_mode=False)


def stored(out: Path) -> dict[str, dict]:
    root = out / "results" / "reproduce"
    return {str(path.relative_to(root)): json.loads(path.read_text()) for path in root.glob("*/*.json")}


def test_without_data_digits_stand_in_and_every_row_is_marked(reproduced: tuple[Path, str]) -> None:
    out, output = reproduced
    cells = stored(out)
    assert len(cells) == 3 * (6 + 1)  # six systems and the upper bound on three streams
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
    assert len(rows) == 18
    notes = {line[2 : line.index("]") + 1]: line for line in section.splitlines() if line.startswith("- [")}
    digits = {number.strip("[]") for number, line in notes.items() if "digits in place of" in line}
    assert len(digits) == 3
    assert all(digits & set(row.split("[")[1].split("]")[0].split(", ")) for row in rows)
    assert "21 cells, 0 of them stored already" in output
    assert "[21/21]" in output
    assert f"page: {out / 'results.md'}" in output


def test_stored_cells_are_not_run_again(reproduced: tuple[Path, str], capsys) -> None:
    out, _ = reproduced
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    run_in_process("T3", "--budget", "smoke", "--workers", "1", "--out", out)
    assert "3 cells, 3 of them stored already" in capsys.readouterr().out  # the cells of T3 are among those of T1
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    (out / "results.md").unlink()
    run_in_process("T1", "--page-only", "--out", out)
    assert (out / "results.md").read_bytes() == before[out / "results.md"]


def test_list_shows_the_experiments_and_their_stored_cells(reproduced: tuple[Path, str], capsys) -> None:
    run_in_process("list", "--out", reproduced[0])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("T1 ")
    assert "10,000 neurons: 6 systems × 3 streams; stored: smoke 18/18, reduced 0/54, full 0/90" in lines[0]
    assert {line.split()[0] for line in lines} >= {"T2", "Ent", "A2", "controls", "panel", "ewc"}


LACKING = "it needs cifar10-jpg.tar.xz, cifar100-jpg.tar.xz, mnist.npz, but SSD_EDGE_DATA is not set"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["T9"], "there is no experiment 'T9'. Did you mean 't"),
        (["pannel"], "Did you mean 'panel'?"),
        (["T3", "--system", "SSD, k = 1"], "Did you mean 'SSD, k = 10'?"),
        (["list", "T1"], "list cannot be combined with other arguments"),
        (["T1"], LACKING),
        (["T3", "--budget", "full"], "the budget full needs cifar10-jpg.tar.xz"),
        (["T3", "--tiny-backbone", "/does/not/exist"], "is not a folder"),
    ],
)
def test_bad_input(args: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as raised:
        run_in_process(*args, "--out", tmp_path / "out")
    assert message in str(raised.value)
    assert not (tmp_path / "out").exists()  # no folder is created


@pytest.mark.parametrize("args", [["T1", "--budget", "tiny"], ["T1", "--orders", "6"], []])
def test_bad_usage(args: list[str]) -> None:
    with pytest.raises(click.UsageError):
        run_in_process(*args)


def test_bad_input_is_reported_in_one_sentence(cli, tmp_path: Path) -> None:
    done = cli("reproduce", "T1", "--out", tmp_path / "out", code=2)
    assert done.stderr == f"error: {LACKING}; put the files there\n"


def start(out: Path) -> subprocess.Popen:
    args = ["reproduce", "T3", "--budget", "smoke", "--workers", "2", "--out", str(out)]
    command = [sys.executable, "-m", "ssd_edge", *args]
    return subprocess.Popen(command, cwd=out.parent, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def workers(process: subprocess.Popen) -> list[int]:
    """Return the worker processes once they exist; importing PyTorch takes them seconds."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process.poll() is None, process.stdout.read()
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        pids = [int(child) for child in children if "spawn_main" in Path(f"/proc/{child}/cmdline").read_text()]
        if pids:
            return pids
        time.sleep(0.02)
    raise AssertionError("no worker was started in two minutes")


needs_proc = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="NOT RUN: no /proc to find workers in")


@pytest.mark.slow
@needs_proc
def test_cells_of_a_killed_worker_are_run_again(reproduced: tuple[Path, str], tmp_path: Path) -> None:
    process = start(tmp_path / "out")
    os.kill(workers(process)[0], signal.SIGKILL)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    results, expected = stored(tmp_path / "out"), stored(reproduced[0])
    assert len(results) == 3
    for name, cell in results.items():
        assert cell["matrix"] == expected[name]["matrix"]  # workers and the main process compute the same


@needs_proc
def test_an_interrupt_ends_the_workers_and_explains_how_to_continue(tmp_path: Path) -> None:
    process = start(tmp_path / "out")
    children = workers(process)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130, output
    assert "Traceback" not in output
    assert "run the same command again to continue" in output
    assert not any(Path(f"/proc/{child}").exists() for child in children)


@pytest.mark.slow
def test_a_ray_cluster_stores_the_same_results(cli, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    words = ("reproduce", "lambda", "--budget", "smoke", "--system", "λ = 0")
    cli(*words, "--workers", "1", "--out", tmp_path / "local", real=True)
    cli(*words, "--workers", "2", "--engine", "ray", "--out", "ray", cwd=tmp_path, real=True)
    stored = {}
    for folder in ("local", "ray"):
        results = (tmp_path / folder / "results" / "reproduce").rglob("*.json")
        stored[folder] = {path.name: json.loads(path.read_text()) for path in results}
    assert stored["local"].keys() == stored["ray"].keys()
    assert len(stored["ray"]) == 2  # joint training is run with it
    for name, result in stored["local"].items():
        for key in ("accuracy", "matrix", "learned"):
            assert result[key] == stored["ray"][name][key]
