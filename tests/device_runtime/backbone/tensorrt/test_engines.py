"""The engine cache and the building process; real builds use TensorRT-RTX, which needs no GPU for this."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import stat
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import tensorrt_standins

from device_runtime.backbone.tensorrt import build as build_engine
from device_runtime.backbone.tensorrt import engines
from device_runtime.backbone.tensorrt.engines import EngineCache, check_graph, engine_facts, fingerprint
from ssd_edge import files
from ssd_edge.errors import BundleRefusedError, EnvironmentUnfitError, GateRefusedError, InputError

STANDINS = vars(tensorrt_standins)
GPU = engines.GpuFacts("Orin", "8.7", 8, "12.6", "12.6")

# A stand-in for the building process: the plan contains its process id.
CHILD = """
import hashlib, json, os, sys, time
request = json.loads(sys.stdin.read())
plan = b"plan of %d" % os.getpid()
def finish():
    open(request["plan"], "wb").write(plan)
    digest = hashlib.sha256(plan).hexdigest()
    print(json.dumps({"ok": True, "bytes": len(plan), "sha256": digest, "seconds": 0.1, "layers": {}}), flush=True)
"""


@pytest.fixture
def facts():
    return engine_facts("a" * 64, "fp16", GPU, "10.3.0")


@pytest.fixture
def cache(tmp_path):
    """Return ``cache("finish()")``, which returns a cache whose engines are built by `CHILD` and that line."""

    def make(last: str = "finish()") -> EngineCache:
        return EngineCache(tmp_path / "engines", [sys.executable, "-S", "-E", "-c", CHILD + last])

    return make


def remaining(cache: EngineCache) -> list[str]:
    return sorted(path.name for path in cache.folder.iterdir() if path.name != ".lock")


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def dies(pid: int, seconds: float = 5.0) -> bool:
    end = time.monotonic() + seconds
    while lives(pid) and time.monotonic() < end:
        time.sleep(0.02)
    return not lives(pid)


# --- fingerprint


@pytest.mark.parametrize(
    "change",
    [
        {"onnx_sha256": "b" * 64},
        {"precision": "fp32"},
        {"batches": [1, 8, 64]},
        {"module": "tensorrt_rtx"},
        {"tensorrt": "10.3.1"},
        {"gpu": replace(GPU, name="Thor")},
        {"gpu": replace(GPU, capability="11.0")},
        {"gpu": replace(GPU, multiprocessors=16)},
        {"gpu": replace(GPU, driver="13.0")},
        {"gpu": replace(GPU, cuda="13.0")},
        {"gpu": None},
        {"l4t": "# R39 (release), REVISION: 2.0"},
        {"builder": engines.BuilderSettings(workspace=1)},
    ],
    ids=lambda change: str(change)[:40],
)
def test_fingerprint_depends_on_every_fact(facts, change):
    assert fingerprint(replace(facts, **change)) != fingerprint(facts)


def test_fingerprint_ignores_sequence_types_and_depends_on_the_cache_version(facts, monkeypatch):
    assert fingerprint(replace(facts, batches=list(facts.batches))) == fingerprint(facts)
    before = fingerprint(facts)
    monkeypatch.setattr(engines, "CACHE_VERSION", engines.CACHE_VERSION + 1)
    assert fingerprint(facts) != before


def test_engine_facts_have_the_jetson_release(tmp_path):
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/nv_tegra_release").write_text("# R36 (release), REVISION: 4.3, BOARD: generic\n")
    assert engine_facts("a", "fp32", GPU, "10.3.0", root=tmp_path).l4t.startswith("# R36 (release), REVISION: 4.3")
    assert engine_facts("a", "fp32", GPU, "10.3.0", root=tmp_path / "none").l4t is None


def test_gpu_facts_without_a_usable_gpu(monkeypatch, caplog):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert engines.gpu_facts() is None

    def no_kernels(*args, **kwargs):
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nmore")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "zeros", no_kernels)
    assert engines.gpu_facts() is None
    assert "cannot use the GPU: CUDA error: no kernel image is available" in caplog.text


# --- cache


def test_engine_is_built_once(cache, facts, tmp_path):
    builder = cache()
    assert builder.get(facts) is None
    assert not builder.folder.exists()  # get creates nothing
    plan = builder.build(tmp_path / "x.onnx", facts)
    assert plan == builder.get(facts)
    assert plan.name == f"{fingerprint(facts)}.plan"
    made = plan.read_bytes()
    assert made.startswith(b"plan of ")
    assert builder.build(tmp_path / "x.onnx", facts).read_bytes() == made
    assert stat.S_IMODE(builder.folder.stat().st_mode) == 0o700
    record = builder.record(facts)
    assert record.facts == facts.to_dict()
    assert (record.sha256, record.bytes) == (files.sha256(made), len(made))
    assert "ok" not in json.loads(plan.with_suffix(".json").read_text())
    with pytest.raises(InputError):
        builder.record(replace(facts, precision="int8"))


def test_get_with_other_facts_returns_none(cache, facts, tmp_path):
    builder = cache()
    builder.build(tmp_path / "x.onnx", facts)
    assert builder.get(replace(facts, tensorrt="10.16.2.10")) is None
    assert builder.get(facts) is not None


def flip(plan: Path) -> None:
    data = bytearray(plan.read_bytes())
    data[3] ^= 1
    plan.write_bytes(data)


def edit_record(plan: Path, **changes: object) -> None:
    record = plan.with_suffix(".json")
    record.write_text(json.dumps({**json.loads(record.read_text()), **changes}))


@pytest.mark.parametrize(
    "harm",
    [
        flip,
        lambda plan: plan.write_bytes(plan.read_bytes()[:-1]),
        lambda plan: plan.unlink(),
        lambda plan: plan.with_suffix(".json").unlink(),
        lambda plan: plan.with_suffix(".json").write_text("{"),
        lambda plan: plan.with_suffix(".json").write_text("[]"),
        lambda plan: edit_record(plan, facts={}),
        lambda plan: edit_record(plan, sha256="0" * 64),
    ],
    ids=["bit", "cut", "no plan", "no record", "no json", "no object", "other facts", "other hash"],
)
def test_damaged_engine_is_removed_and_rebuilt(cache, facts, tmp_path, caplog, harm):
    builder = cache()
    plan = builder.build(tmp_path / "x.onnx", facts)
    first = plan.read_bytes()
    harm(plan)
    with caplog.at_level(logging.WARNING):
        assert builder.get(facts) is None
    assert "removed the TensorRT engine" in caplog.text
    assert remaining(builder) == []
    assert builder.build(tmp_path / "x.onnx", facts).read_bytes() != first
    assert builder.get(facts) == plan


def test_get_keeps_an_unfinished_build(cache, facts):
    builder = cache()
    builder.make_folder()
    plan = builder._path(facts)
    plan.write_bytes(b"plan without a record")
    with builder._try_lock() as locked:
        assert locked
        assert builder.get(facts) is None
        assert plan.exists()


@pytest.mark.parametrize("mode", [0o777, 0o720, 0o702])
def test_folder_writable_by_others_is_refused(cache, facts, tmp_path, mode):
    builder = cache()
    builder.build(tmp_path / "x.onnx", facts)
    builder.folder.chmod(mode)
    for action in (lambda: builder.get(facts), lambda: builder.build(tmp_path / "x.onnx", facts)):
        with pytest.raises(
            EnvironmentUnfitError, match=f"is writable by other users .mode {mode:o}, but 700 is required"
        ):
            action()


def test_folder_of_another_user_or_symlink_is_refused(cache, facts, tmp_path, monkeypatch):
    builder = cache()
    builder.build(tmp_path / "x.onnx", facts)
    linked = EngineCache(tmp_path / "link")
    linked.folder.symlink_to(builder.folder)
    with pytest.raises(EnvironmentUnfitError, match="is not a folder"):
        linked.get(facts)
    monkeypatch.setattr(os, "geteuid", lambda: builder.folder.stat().st_uid + 1)
    with pytest.raises(EnvironmentUnfitError, match="belongs to user"):
        builder.get(facts)


def test_old_engines_are_removed(cache, facts, tmp_path):
    builder = cache()
    same = builder.build(tmp_path / "x.onnx", replace(facts, tensorrt="10.2.0"))
    now = builder.build(tmp_path / "x.onnx", facts)
    assert now.exists()
    assert not same.exists()  # same backbone, built with an earlier TensorRT
    assert not same.with_suffix(".json").exists()
    plans = [now]
    for number in range(engines.KEEP):
        plans.append(builder.build(tmp_path / "x.onnx", replace(facts, onnx_sha256=f"{number:064d}")))
        for age, plan in enumerate(reversed(plans)):
            if plan.exists():
                os.utime(plan, (1e9 - age, 1e9 - age))
    assert [plan.exists() for plan in plans] == [False] + [True] * engines.KEEP


# --- process


def test_request_matches_the_facts(cache, facts, tmp_path):
    builder = cache(f"open({str(tmp_path / 'request')!r}, 'w').write(json.dumps(request)); finish()")
    builder.build(tmp_path / "x.onnx", facts)
    request = json.loads((tmp_path / "request").read_text())
    assert request["onnx"] == str(tmp_path / "x.onnx")
    assert (request["onnx_sha256"], request["module"], request["batches"]) == ("a" * 64, "tensorrt", [1, 8, 32])
    assert request["workspace"] == facts.builder.workspace
    assert request["parent"] == os.getpid()


def test_progress_is_reported(cache, facts, tmp_path, monkeypatch):
    monkeypatch.setattr(build_engine, "HEARTBEAT", 0.05)
    slow = "print(json.dumps({'phase': 'Tactics', 'step': 3, 'of': 9}), flush=True); time.sleep(0.4); finish()"
    messages: list[str] = []
    cache(slow).build(tmp_path / "x.onnx", facts, messages.append)
    pattern = (
        r"building the TensorRT engine, \d+ s so far: Tactics, step 3 of 9 \(once per board and model; takes minutes"
    )
    assert re.match(pattern, messages[-1])


def test_build_that_times_out_is_killed(cache, facts, tmp_path):
    hangs = f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    builder = cache(hangs)
    with pytest.raises(EnvironmentUnfitError, match="took longer than 1 s and was stopped"):
        builder.build(tmp_path / "x.onnx", facts, timeout=1)
    assert dies(int((tmp_path / "pid").read_text()))
    assert remaining(builder) == []


@pytest.mark.parametrize("name", ["SIGKILL", "SIGSEGV"])
def test_killed_build_suggests_lack_of_memory_and_leaves_nothing(cache, facts, tmp_path, name):
    partly = "open(os.path.join(os.path.dirname(request['plan']), '.tmp-half'), 'wb').write(plan)"
    timings = "open(request['timing_cache'], 'wb').write(b'bad')"
    ends = f"print('no room', file=sys.stderr, flush=True); os.kill(os.getpid(), signal.{name})"
    builder = cache(f"import signal; {partly}; {timings}; {ends}")
    with pytest.raises(
        EnvironmentUnfitError, match=rf"stopped by {name} \(last output: no room\), possibly for lack of memory"
    ):
        builder.build(tmp_path / "x.onnx", facts)
    assert remaining(builder) == []
    assert builder.get(facts) is None


def test_build_killed_after_writing_the_plan_leaves_nothing(cache, facts, tmp_path):
    builder = cache("open(request['plan'], 'wb').write(plan); os.kill(os.getpid(), 9)")
    with pytest.raises(EnvironmentUnfitError, match="stopped by SIGKILL, possibly for lack of memory"):
        builder.build(tmp_path / "x.onnx", facts)
    assert builder.get(facts) is None
    assert remaining(builder) == []


def test_build_without_a_result_has_its_last_output(cache, facts, tmp_path):
    with pytest.raises(
        EnvironmentUnfitError, match=r"ended with code 1 and no result \(last output: .*ValueError: why\)"
    ):
        cache("raise ValueError('why')").build(tmp_path / "x.onnx", facts)


def test_plan_changed_after_the_build_is_refused(cache, facts, tmp_path):
    builder = cache("finish(); open(request['plan'], 'ab').write(b'!')")
    with pytest.raises(EnvironmentUnfitError, match=r"was built, but it has .* bytes and sha256"):
        builder.build(tmp_path / "x.onnx", facts)
    assert remaining(builder) == []


@pytest.mark.parametrize("kind", [GateRefusedError, EnvironmentUnfitError, BundleRefusedError, InputError])
def test_errors_of_the_process_keep_their_type_and_message(cache, facts, tmp_path, kind):
    result = json.dumps({"ok": False, "error": "so it is", "exit_code": kind.exit_code})
    with pytest.raises(kind, match=r"^so it is$"):
        cache(f"print({result!r})").build(tmp_path / "x.onnx", facts)


def test_concurrent_builds_share_one_engine(cache, facts, tmp_path):
    builder = cache("time.sleep(0.5); finish()")
    plans: list[bytes] = []
    messages: list[str] = []

    def build() -> None:
        plans.append(builder.build(tmp_path / "x.onnx", facts, messages.append).read_bytes())

    threads = [threading.Thread(target=build) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(plans) == 3
    assert len(set(plans)) == 1  # each build writes its own process id
    assert "another process is building a TensorRT engine; waiting for it" in messages


def test_waiting_for_another_build_times_out(cache, facts, tmp_path):
    builder = cache()
    builder.make_folder()
    with builder._try_lock(), pytest.raises(EnvironmentUnfitError, match=r"has been building .* for over 0\.3 s"):
        builder.build(tmp_path / "x.onnx", facts, timeout=0.3)


PARENT = """
import sys
from device_runtime.backbone.tensorrt.engines import EngineCache, engine_facts
child = "import os, sys, time; from ssd_edge.ort.apart import die_with_parent; die_with_parent();"
child += f"open({sys.argv[1] + '/pid'!r}, 'w').write(str(os.getpid())); time.sleep(60)"
cache = EngineCache(sys.argv[1] + "/engines", [sys.executable, "-c", child])
cache.build("x.onnx", engine_facts("a", "fp32", None, "10"))
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda how: how.name)
def test_build_ends_with_its_parent(tmp_path, how):
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path)], stderr=subprocess.DEVNULL)
    pid = tmp_path / "pid"
    try:
        end = time.monotonic() + 20
        while not (pid.exists() and pid.read_text()) and time.monotonic() < end:
            time.sleep(0.02)
        assert lives(int(pid.read_text()))
        parent.send_signal(how)
        assert parent.wait(10) != 0
        assert dies(int(pid.read_text()))
    finally:
        parent.kill()
        parent.wait()


# --- TensorRT-RTX


@pytest.fixture
def rtx(tmp_path):
    """Path of a real graph, and its facts for TensorRT-RTX."""
    trt = pytest.importorskip("tensorrt_rtx", reason="pip install tensorrt-rtx (x86-64 Linux)")
    onnx = STANDINS["real_onnx"]()
    (tmp_path / "x.onnx").write_bytes(onnx)
    return tmp_path / "x.onnx", engine_facts(files.sha256(onnx), "fp32", None, trt.__version__, "tensorrt_rtx")


def test_check_accepts_a_real_graph(rtx):
    checked = check_graph(rtx[0].read_bytes())
    assert (checked.module, checked.version, checked.input) == ("tensorrt_rtx", rtx[1].tensorrt, "uint8")
    assert checked.bytes > 10_000
    assert checked.layers >= 4
    assert checked.seconds >= 0


def test_check_refuses_an_unknown_operator(rtx):
    with pytest.raises(GateRefusedError, match="NoSuchOperator"):
        check_graph(STANDINS["real_onnx"](operator="NoSuchOperator"))
    with pytest.raises(EnvironmentUnfitError, match="'no_such_tensorrt' cannot be imported"):
        check_graph(b"", "no_such_tensorrt")


def test_real_build(rtx, tmp_path):
    path, facts = rtx
    cache = EngineCache(tmp_path / "engines")
    plan = cache.build(path, facts)
    assert cache.get(facts) == plan
    record = cache.record(facts)
    assert record.version == facts.tensorrt
    assert record.bytes == plan.stat().st_size > 10_000
    assert record.layers["parsed"] >= 4


def test_real_build_refuses_a_broken_graph_and_another_file(rtx, tmp_path):
    path, facts = rtx
    cache = EngineCache(tmp_path / "engines")
    with pytest.raises(BundleRefusedError, match="is expected; install the bundle again"):
        cache.build(path, replace(facts, onnx_sha256="0" * 64))
    broken = STANDINS["real_onnx"](operator="NoSuchOperator")
    path.write_bytes(broken)
    with pytest.raises(GateRefusedError, match="NoSuchOperator"):
        cache.build(path, replace(facts, onnx_sha256=files.sha256(broken)))
    assert remaining(cache) == []


def test_building_process_imports_base_dependencies_only():
    build = "device_runtime.backbone.tensorrt.build"
    code = f"import sys; import {build}; print([m for m in ('torch', 'onnx') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
