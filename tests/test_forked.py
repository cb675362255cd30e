"""The tests' forked processes of the command line do what real processes do."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from helpers.forked import Launcher, run_real


@pytest.mark.parametrize(
    ("args", "code"),
    [
        (["--help"], 0),
        (["train", "--nonsense"], 2),
        (["train", "data.path=none", "run.out=out"], 2),
        (["keys", "new", "key"], 0),
        (["inspect", "random.ssdedge"], 5),
    ],
)
def test_forked_and_real_processes_agree(args: list[str], code: int, launcher: Launcher, tmp_path: Path) -> None:
    found = []
    for run in (launcher.run, run_real):
        folder = tmp_path / "work"
        folder.mkdir()
        (folder / "random.ssdedge").write_bytes(bytes(range(200)))
        before = os.umask(0o027)
        try:
            done = run(args, folder, {**os.environ, "SSD_EDGE_CACHE": "cache"}, 60)
        finally:
            os.umask(before)
        files = {str(path.relative_to(folder)): path.stat().st_mode for path in folder.rglob("*")}
        stdout = re.sub("[0-9a-f]{16}", "id of the key", done.stdout)
        found.append((done.returncode, stdout, done.stderr, files))
        shutil.rmtree(folder)
    assert found[0] == found[1]
    assert found[0][0] == code


def test_a_forked_process_is_killed_when_it_takes_too_long(launcher: Launcher, tmp_path: Path) -> None:
    with pytest.raises(subprocess.TimeoutExpired):
        launcher.run(["device", "watch", "-"], tmp_path, os.environ, 0.0)
    assert launcher.run(["--version"], tmp_path, os.environ, 60).returncode == 0
