"""``ssd-edge fleet``, from what devices export to what they install."""

from __future__ import annotations

import json

from click.testing import CliRunner
from helpers.fleet import Device, common_bundle, export, vectors, write

from device_runtime import Device as RealDevice
from device_runtime.install.bundle import install
from ssd_edge import bundle as bundles
from ssd_edge.cli import cli


def run(*args: object) -> str:
    done = CliRunner().invoke(cli, ["fleet", *map(str, args)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_exported_files_become_a_bundle_that_a_device_installs(tmp_path) -> None:
    common = common_bundle()
    base = write(common, tmp_path / "common.ssdedge")
    devices = {kind: Device(common, kind).learn({kind: vectors(kind, 8)}) for kind in ("wedge", "bolt", "pin")}
    files = [export(device, common, tmp_path) for device in devices.values()]
    (tmp_path / "broken.ssdedge").write_bytes(files[0].read_bytes()[:-1])
    options = ("--ledger", tmp_path / "ledger", "--max-forgetting", 1)
    output = run(base, *files[:2], files[0], tmp_path / "broken.ssdedge", "-o", tmp_path / "first.ssdedge", *options)
    assert "round 1: 2 counted, 1 failed, 1 repeated" in output
    assert f"{tmp_path / 'broken.ssdedge'}: " in output
    assert f"{files[0]}: answered more than once, counted once" in output
    assert "5 classes, 76 images; devices: 2, release 2, not signed" in output

    first = bundles.read(tmp_path / "first.ssdedge")
    newer = export(Device(first, "newer").learn({"cap": vectors("cap", 7)}), first, tmp_path)
    given = (base, newer, files[2], "--issued", tmp_path / "first.ssdedge", "-o", tmp_path / "second.ssdedge", *options)
    left = devices["bolt"].state.bundle.installation
    found = json.loads(run(*given, "--without", left, "--json"))
    assert len(found["round"]["counted"]) == 2
    assert found["issued"]["classes"] == {"cup": 20, "nut": 20, "screw": 20, "cap": 7, "wedge": 8, "pin": 8}
    install(tmp_path / "root", tmp_path / "second.ssdedge")
    with RealDevice.open(tmp_path / "root") as device:
        assert sorted(device.classes) == sorted(found["issued"]["classes"])
    assert json.loads((tmp_path / "ledger" / "round-000002.json").read_text()) == found["round"]


def test_what_cannot_be_done_is_said(tmp_path, refused) -> None:
    base = write(common_bundle(), tmp_path / "common.ssdedge")
    options = ("--ledger", tmp_path / "ledger", "-o", tmp_path / "out.ssdedge")
    assert "no device has learned anything" in refused("fleet", base, *options, code=2)
    assert "no device 'x'" in refused("fleet", base, "--without", "x", *options, code=2)
    assert not (tmp_path / "out.ssdedge").exists()
