"""A gateway adds what devices have learned, in any order, and counts nothing twice."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.fleet import ANY, CENTRES, Device, common_bundle, vectors

from device_runtime import Device as RealDevice
from device_runtime.install.bundle import install
from device_runtime.install.trust import trust
from device_runtime.learning.state import DeviceState
from exporters.fleet.gateway import Gateway, Reply
from ssd_edge import bundle as bundles
from ssd_edge.errors import BundleRefusedError, GateRefusedError, InputError


@pytest.fixture(scope="module")
def common() -> bundles.Bundle:
    return common_bundle()


def issued(gateway: Gateway, path: Path) -> DeviceState:
    """Write the bundle of a gateway and return the state in it."""
    gateway.issue(path / "fleet.ssdedge", limits=ANY)
    return DeviceState.of_bundle(bundles.read(path / "fleet.ssdedge"))


def by_name(state: DeviceState) -> dict[str, np.ndarray]:
    """Return the scores of each class for images of all."""
    images = torch.from_numpy(np.concatenate([vectors(name, 8, 77) for name in CENTRES]))
    return dict(zip(state.registry.names, state.learner.scores(images).T.numpy(), strict=True))


def assert_same(one: DeviceState, other: DeviceState, rounding: float = 1e-4) -> None:
    """Check that two states give the same scores, whatever the order of their classes."""
    first, second = by_name(one), by_name(other)
    assert first.keys() == second.keys()
    largest = max(float(np.abs(scores).max()) for scores in second.values())
    for name, scores in second.items():
        np.testing.assert_allclose(first[name], scores, rtol=0, atol=rounding * largest, err_msg=name)
    images = {entry.name: entry.images for entry in other.registry.entries}
    assert {entry.name: entry.images for entry in one.registry.entries} == images


LESSONS = (
    {"wedge": ("wedge", 10, 1), "cup": ("cup", 5, 1)},
    {"bolt": ("bolt", 8, 2)},
    {"wedge": ("wedge", 7, 3), "pin": ("pin", 6, 3)},
    {"cup": ("cup", 4, 4), "bolt": ("bolt", 5, 4)},
)


def lesson(number: int) -> dict[str, np.ndarray]:
    return {name: vectors(*what) for name, what in LESSONS[number].items()}


def fleet(common: bundles.Bundle) -> list[Device]:
    """Return four devices that have learned different things."""
    return [Device(common, f"camera-{number}").learn(lesson(number)) for number in range(len(LESSONS))]


@pytest.fixture(scope="module")
def cameras(common) -> list[Device]:
    return fleet(common)


@pytest.fixture(scope="module")
def taught_all(common) -> DeviceState:
    """Return the state of one device that was taught everything."""
    one = Device(common, "all")
    for number in range(len(LESSONS)):
        one.learn(lesson(number))
    return one.state


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("learner", "settings"),
    [
        ("slda", {}), ("ncm", {}), ("fecam", {}), ("ranpac", {"features": 40}),
        pytest.param("slda", {"per_class": True}, marks=SLOW), pytest.param("slda", {"second_view": True}, marks=SLOW),
        pytest.param("ridge", {}, marks=SLOW), pytest.param("klda", {"features": 40}, marks=SLOW),
    ],
)  # fmt: skip
def test_the_sum_of_many_devices_is_one_device_that_was_taught_everything(tmp_path, learner, settings):
    common = common_bundle(learner, **settings)
    one = Device(common, "all")
    for number in range(len(LESSONS)):
        one.learn(lesson(number))
    gateway = Gateway(tmp_path / "ledger", common)
    found = gateway.gather([device.reply() for device in fleet(common)])
    assert (len(found.counted), found.refused, found.failed, found.conflicts) == (4, {}, {}, [])
    assert_same(issued(gateway, tmp_path), one.state)


def test_an_empty_bundle_is_a_common_bundle(tmp_path):
    common = common_bundle(classes=0)
    one = Device(common, "all")
    gateway = Gateway(tmp_path / "ledger", common)
    devices = [Device(common, name).learn({name: vectors(name, 6)}) for name in ("cup", "nut", "screw")]
    for name in ("cup", "nut", "screw"):
        one.learn({name: vectors(name, 6)})
    gateway.gather(device.reply() for device in devices)
    assert_same(issued(gateway, tmp_path), one.state)


def test_order_and_rounds_do_not_matter(common, cameras, taught_all, tmp_path):
    once, later = Gateway(tmp_path / "once", common), Gateway(tmp_path / "later", common)
    once.gather(device.reply() for device in cameras)
    for device in reversed(cameras):
        later.gather([device.reply()])
    expected = issued(once, tmp_path)
    assert all(np.array_equal(a, b) for a, b in zip(
        by_name(expected).values(), by_name(issued(later, tmp_path)).values(), strict=True
    ))  # fmt: skip
    assert_same(expected, taught_all)


def test_thresholds_and_held_out_results_are_those_of_the_devices(common, cameras, tmp_path):
    gateway = Gateway(tmp_path / "ledger", common)
    gateway.gather(device.reply() for device in cameras)
    state = issued(gateway, tmp_path)
    pin, there = state.registry.row_of("pin"), cameras[2].state
    row = there.registry.row_of("pin")  # taught by that device alone
    assert torch.allclose(state.rejector.thresholds[pin], there.rejector.thresholds[row], atol=1e-3)
    assert torch.equal(state.record.counts(pin), there.record.counts(row))
    wedge = state.registry.row_of("wedge")
    tested = sum(one.state.record.tested[one.state.registry.row_of("wedge")] for one in (cameras[0], cameras[2]))
    assert state.record.tested[wedge] == tested == 17
    own = torch.from_numpy(vectors("wedge", 40, 55))
    assert float(state.rejector.accepts(own, torch.full((40,), wedge))[0].double().mean()) > 0.8


def test_failures_repeats_and_garbage_change_nothing_and_are_named(common, cameras, taught_all, tmp_path):
    gateway = Gateway(tmp_path / "ledger", common)
    good, bad = [device.reply() for device in cameras], cameras[0].reply()
    garbage = np.random.default_rng(0)
    second, counts = bad.arrays["learner.second"], bad.arrays["learner.counts"]
    wrong = {
        "nan": {"learner.sums": np.full_like(bad.arrays["learner.sums"], np.nan)},
        "infinite": {"learner.second": np.full_like(second, np.inf)},
        "noise": {"learner.second": garbage.standard_normal(second.shape).astype(np.float32)},
        "small noise": {"learner.second": second + np.float32(0.5) * garbage.standard_normal(second.shape).astype("f")},
        "half an image": {"learner.counts": counts + 0.5},
        "negative": {"learner.counts": -counts},
        "no images": {"learner.counts": np.zeros_like(counts)},
        "shape": {"learner.sums": bad.arrays["learner.sums"][:, :-1]},
        "dtype": {"learner.sums": bad.arrays["learner.sums"].astype(np.float16)},
        "text": {"learner.sums": np.full(bad.arrays["learner.sums"].shape, "x")},
        "unknown array": {"extra": counts},
        "beside": {"statistics.counts": counts},
        "too many right": {"held_out": bad.arrays["held_out"] + [[0.0, 1.0, 0.0]]},
        "scores": {"scores": np.full_like(bad.arrays["scores"], 1e6)},
    }
    replies = [dataclasses.replace(bad, who=who, arrays={**bad.arrays, **part}) for who, part in wrong.items()]
    for who, about in {
        "no about": None,
        "number": 7,
        "id": {**bad.about, "installation": "../../etc"},
        "names": {**bad.about, "classes": ["unknown", "cup"]},
        "twice one name": {**bad.about, "classes": ["cup", "cup"]},
        "generation": {**bad.about, "generation": "1"},
        "other bundle": {**bad.about, "base": "0" * 64},
        "other backbone": {**bad.about, "backbone": "0" * 64},
    }.items():
        wrong[who] = {}
        replies.append(dataclasses.replace(bad, who=who, about=about))
    silent = [Reply("fails", problem="the camera is broken"), Reply("asleep", problem="no answer", late=True)]
    found = gateway.gather([*replies, *silent, *good, good[1], good[1]])
    assert list(found.refused) == list(wrong)
    assert (found.failed, found.late, found.repeated) == ({"fails": "the camera is broken"}, ["asleep"], ["camera-1"])
    assert found.counted == sorted(device.state.bundle.installation for device in cameras)
    assert_same(issued(gateway, tmp_path), taught_all)


def test_a_late_device_is_taken_in_the_next_round(common, cameras, taught_all, tmp_path):
    gateway = Gateway(tmp_path / "ledger", common)
    first = gateway.gather([*(device.reply() for device in cameras[:3]), Reply("camera-3", problem="", late=True)])
    assert first.late == ["camera-3"]
    gateway.issue(tmp_path / "first.ssdedge", limits=ANY)
    second = Gateway(tmp_path / "ledger", common).gather(device.reply() for device in cameras)
    assert (second.number, second.counted) == (2, [cameras[3].state.bundle.installation])
    assert len(second.unchanged) == 3
    assert_same(issued(Gateway(tmp_path / "ledger", common), tmp_path), taught_all)


def test_cumulative_sums_of_one_device_count_once(common, tmp_path):
    gateway, device = Gateway(tmp_path / "ledger", common), Device(common, "camera")
    for number in range(len(LESSONS)):
        gateway.gather([device.learn(lesson(number)).reply()])
    assert_same(issued(gateway, tmp_path), device.state)


def test_a_device_that_rolled_back_takes_its_images_with_it(common, cameras, tmp_path):
    gateway, device = Gateway(tmp_path / "ledger", common), Device(common, "camera")
    gateway.gather([cameras[1].reply(), device.learn(lesson(0)).reply()])
    device.state = dataclasses.replace(device.base, bundle=device.state.bundle)
    gateway.gather([device.reply()])
    assert gateway.devices == [cameras[1].state.bundle.installation]
    assert_same(issued(gateway, tmp_path), cameras[1].state)


def test_devices_continue_from_the_bundle_of_the_fleet(common, cameras, tmp_path):
    gateway = Gateway(tmp_path / "ledger", common)
    gateway.gather(device.reply() for device in cameras[:2])
    gateway.issue(tmp_path / "first.ssdedge", limits=ANY)
    first = bundles.read(tmp_path / "first.ssdedge")
    assert first.manifest["release"] == common.manifest["release"] + 1
    newer = Device(first, "camera-0 again").learn(lesson(2))
    gateway.gather([newer.reply(), cameras[3].reply()])  # the other one has not installed it yet
    one = Device(common, "all")
    for number in (0, 1, 2, 3):
        one.learn(lesson(number))
    assert_same(issued(gateway, tmp_path), one.state)
    assert bundles.read(tmp_path / "fleet.ssdedge").manifest["release"] == common.manifest["release"] + 2


def test_a_device_can_be_taken_out_again(common, cameras, tmp_path):
    gateway = Gateway(tmp_path / "ledger", common)
    gateway.gather(device.reply() for device in cameras)
    gateway.leave_out(left := cameras[2].state.bundle.installation)
    found = gateway.gather(device.reply() for device in cameras)
    assert "was left out" in found.refused["camera-2"]
    assert not [path for path in (tmp_path / "ledger").iterdir() if left in path.name]
    one = Device(common, "all")
    for number in (0, 1, 3):
        one.learn(lesson(number))
    assert_same(issued(gateway, tmp_path), one.state)
    with pytest.raises(InputError, match="no device"):
        gateway.leave_out(left)


def test_what_a_device_has_merged_from_another_does_not_count_twice(common, cameras, tmp_path):
    gateway = Gateway(tmp_path / "ledger", common)
    part = cameras[1].reply()
    merged = dataclasses.replace(part, about={**part.about, "merged": [cameras[0].state.bundle.installation]})
    found = gateway.gather([cameras[0].reply(), merged])
    assert list(found.refused) == ["camera-1"]
    assert "counts already" in found.refused["camera-1"]


def test_a_name_for_different_things_is_a_conflict(common, tmp_path):
    gateway = Gateway(tmp_path / "ledger", common)
    devices = [Device(common, f"d{n}").learn({"part": vectors("wedge", 10, n)}) for n in range(4)]
    odd = [Device(common, f"odd{n}").learn({"part": vectors("bolt", 12, n)}) for n in range(2)]
    cup = Device(common, "wrong").learn({"cup": vectors("pin", 10)})
    found = gateway.gather(device.reply() for device in (*odd, *devices, cup))
    ids = sorted(device.state.bundle.installation for device in odd)
    assert [(one.name, one.counted_as, one.devices) for one in found.conflicts] == [
        ("cup", "cup (2)", [cup.state.bundle.installation]),
        ("part", "part (2)", ids),
    ]
    more = [
        Device(common, "late").learn({"part": vectors("bolt", 9, 8)}),
        odd[0].learn({"part": vectors("bolt", 5, 9)}),
    ]
    again = gateway.gather(device.reply() for device in more)
    assert len(again.conflicts[1].devices) == 3
    state = issued(gateway, tmp_path)
    images = {entry.name: entry.images for entry in state.registry.entries}
    assert images == {"cup": 20, "nut": 20, "screw": 20, "cup (2)": 10, "part": 40, "part (2)": 38}
    for name, true in (("part", "wedge"), ("part (2)", "bolt"), ("cup (2)", "pin"), ("cup", "cup")):
        rows = state.learner.predict(torch.from_numpy(vectors(true, 20, 5)))
        assert (rows == state.registry.row_of(name)).double().mean() > 0.9


def test_names_of_a_conflict_fit_and_do_not_collide(common, tmp_path):
    gateway, long = Gateway(tmp_path / "ledger", common), "x" * 64
    devices = [Device(common, kind).learn({long: vectors(kind, 10)}) for kind in ("wedge", "bolt", "pin")]
    gateway.gather(device.reply() for device in devices)
    names = issued(gateway, tmp_path).registry.names[3:]
    assert sorted(names) == sorted([long, "x" * 60 + " (2)", "x" * 60 + " (3)"])


def test_few_images_of_a_class_are_not_sent(common, cameras):
    device = Device(common, "few").learn({"wedge": vectors("wedge", 9), "bolt": vectors("bolt", 4)})
    with pytest.raises(InputError, match="bolt has fewer than 5 images"):
        device.sums.without_few(5, device.base)
    assert device.sums.without_few(4, device.base).classes == ("wedge", "bolt")
    separate = common_bundle(per_class=True)
    one, alone = Device(separate, "few"), Device(separate, "alone")
    one.learn({"wedge": vectors("wedge", 9), "bolt": vectors("bolt", 4)})
    alone.learn({"wedge": vectors("wedge", 9)})
    kept = one.sums.without_few(5, one.base)
    assert kept.classes == ("wedge",)
    for name, tensor in alone.sums.learner.items():
        assert torch.allclose(kept.learner[name], tensor, rtol=1e-5, atol=1e-4), name


def test_the_cost_for_the_classes_of_the_bundle_is_limited(common, tmp_path):
    gateway = Gateway(tmp_path / "ledger", common)
    replies = [Device(common, f"d{n}").learn({f"new {n}": vectors("cup", 20, n)}).reply() for n in range(3)]
    gateway.gather(replies)
    with pytest.raises(GateRefusedError):
        gateway.issue(tmp_path / "fleet.ssdedge")
    assert not (tmp_path / "fleet.ssdedge").exists()


def test_a_ledger_belongs_to_one_bundle(common, tmp_path):
    Gateway(tmp_path / "ledger", common).gather([])
    with pytest.raises(InputError, match="name that bundle, or another folder"):
        Gateway(tmp_path / "ledger", common_bundle(classes=2))
    with pytest.raises(InputError, match="nothing was written"):
        Gateway(tmp_path / "ledger", common).issue(tmp_path / "fleet.ssdedge")
    (tmp_path / "ledger" / "ledger.json").write_text("[]")
    with pytest.raises(BundleRefusedError, match="is damaged"):
        Gateway(tmp_path / "ledger", common)


@pytest.mark.parametrize("learner", ["flymodel", "finetune"])
def test_learners_without_sums_are_refused(tmp_path, learner):
    settings = {"inputs_per_neuron": 8} if learner == "flymodel" else {}
    with pytest.raises(InputError, match="cannot be"):
        Gateway(tmp_path / "ledger", common_bundle(learner, classes=0, **settings))


def test_a_signed_bundle_is_installed_by_devices(common, cameras, tmp_path):
    pytest.importorskip("cryptography")
    from ssd_edge.bundle import signing

    private, public = signing.new_key(tmp_path, "fleet")
    gateway = Gateway(tmp_path / "ledger", common)
    gateway.gather(device.reply() for device in cameras)
    result = gateway.issue(tmp_path / "fleet.ssdedge", private, ANY)
    trust(tmp_path / "root", public)
    install(tmp_path / "root", tmp_path / "fleet.ssdedge")
    with RealDevice.open(tmp_path / "root") as device:
        assert device.classes == list(result.classes)
        assert device.status().images == result.classes
