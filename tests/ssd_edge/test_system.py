"""Version, process, disk, clock, locks."""

from __future__ import annotations

import multiprocessing
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest

import ssd_edge
from ssd_edge import system
from ssd_edge.errors import EnvironmentUnfitError


def test_one_version() -> None:
    assert ssd_edge.__version__ == system.VERSION


def test_usable_cores_follow_the_affinity_of_the_process() -> None:
    assert system.usable_cores() == len(os.sched_getaffinity(0))


def test_resident_memory_of_this_process() -> None:
    assert 10 < system.resident() // system.MIB < 100_000
    assert system.resident("VmHWM") >= system.resident("VmRSS") // 2


def test_what_threads_have_freed_is_given_back() -> None:
    """Blocks of the size of a decoder's, freed below one that is kept: the system does not get them back by itself."""
    script = """
import threading
from ssd_edge.system import MIB, resident, return_memory
def work():
    blocks = [bytearray(MIB // 16) for _ in range(1600)]
    kept.append(blocks[-1])
kept, threads = [], [threading.Thread(target=work)]
for thread in threads:
    thread.start()
    thread.join()
before = resident()
return_memory()
print((before - resident()) // MIB)
"""
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(found.stdout) >= (50 if platform.libc_ver()[0] == "glibc" else 0), found.stdout


def test_nearest_folder_and_disk_free_of_a_path_that_does_not_exist(tmp_path: Path) -> None:
    assert system.nearest_folder(tmp_path / "a" / "b") == tmp_path
    assert system.disk_free(tmp_path / "a" / "b") == pytest.approx(system.disk_free(tmp_path), abs=64 << 20)


def test_utc_now() -> None:
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", system.utc_now())


def _try_lock(path: Path) -> tuple[bool, str]:
    with system.file_lock(path) as locked:
        return locked, system.lock_holder(path)


def test_a_lock_excludes_other_processes_until_it_is_released(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        with system.file_lock(path) as locked:
            assert locked
            assert pool.apply(_try_lock, [path]) == (False, str(os.getpid()))
        locked_there, holder = pool.apply(_try_lock, [path])
    assert locked_there
    assert holder != str(os.getpid())


def test_a_lock_excludes_a_second_holder_in_the_same_process(tmp_path: Path) -> None:
    with system.file_lock(tmp_path / ".lock") as first, system.file_lock(tmp_path / ".lock") as second:
        assert (first, second) == (True, False)


def test_a_lock_is_released_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="inside"), system.file_lock(tmp_path / ".lock"):
        raise RuntimeError("inside")
    assert _try_lock(tmp_path / ".lock")[0]


@pytest.mark.parametrize("kind", ["missing folder", "symbolic link"])
def test_a_file_that_cannot_be_locked_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "missing" / ".lock"
    if kind == "symbolic link":
        path = tmp_path / ".lock"
        path.symlink_to(tmp_path / "other")
    reason = r"cannot lock .*\.lock: it (is a symbolic link|does not exist)"
    with pytest.raises(EnvironmentUnfitError, match=reason), system.file_lock(path):
        pass


def test_the_holder_of_a_lock_file_without_a_process_id_is_unknown(tmp_path: Path) -> None:
    assert system.lock_holder(tmp_path / "missing") == "unknown"
    (tmp_path / "empty").touch()
    assert system.lock_holder(tmp_path / "empty") == "unknown"
