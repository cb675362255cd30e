"""Bundles whose tensors lie: each is refused in one sentence, or every verb works on the device that installed it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import store_standins
from helpers.mutations import FLOATS, SHAPES, WHOLE

from device_runtime import Device
from device_runtime.install.bundle import install
from device_runtime.learning.guard import Limits
from device_runtime.learning.state import DeviceState
from ssd_edge import bundle as bundles
from ssd_edge import files
from ssd_edge.errors import BundleRefusedError, GateRefusedError, SSDEdgeError
from ssd_edge.learners import LEARNERS
from ssd_edge.learners.closed_form.sums import pack_symmetric, unpack_symmetric
from ssd_edge.system import MIB, reset_peak, resident

photos = vars(store_standins)["photos"]
ANY = Limits(max_forgetting=1.0)
Arrays = dict[str, np.ndarray]


def repacked(data: bytes, **changes: Callable[[Any, Any], Any]) -> bytes:
    """Return a bundle with changed entries.

    Args:
        data: the bundle.
        changes: role → function that changes the arrays and metadata, or the JSON value, of that entry in place.
    """
    opened = bundles.parse(data)
    entries = {path: (role, opened.entries[path]) for role, path in opened.roles.items()}
    for role, change in changes.items():
        path = opened.roles[role]
        if path.endswith(".json"):
            value = json.loads(opened.read(role))
            change(value, None)
            entries[path] = role, files.json_bytes(value)
        else:
            arrays, metadata = opened.tensors(role)
            change(arrays, metadata)
            entries[path] = role, files.tensor_bytes(arrays, metadata)
    return bundles.pack(opened.manifest, entries)


def replaced(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Arrays, Any], None]:
    def apply(arrays: Arrays, metadata: Any) -> None:
        with np.errstate(all="ignore"):
            arrays[name] = change(arrays[name])

    return apply


def lie(key: str, value: Any) -> Callable[[Arrays, Any], None]:
    return lambda arrays, metadata: metadata.update({key: value})


def as_another_kind(arrays: Arrays, metadata: Any) -> None:
    """Name another learner, with a state that suits it."""
    metadata.update(learner="ridge", settings={})
    del arrays["prior_weight"]
    # Of float64 in ridge, with less room for rounding; the shares of the mean are larger than those of rounding.
    second = unpack_symmetric(torch.from_numpy(arrays["second"]).double(), arrays["sums"].shape[1])
    second += 1e-3 * second.diagonal().mean() * torch.eye(len(second))
    arrays["sums"], arrays["second"] = arrays["sums"].astype(np.float64), pack_symmetric(second).numpy()


@pytest.fixture(scope="module")
def exported(tiny_bundle, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], bytes]:
    """Function that returns a bundle exported by a device that was taught `wedge`, for a kind of learner."""
    folder, made = tmp_path_factory.mktemp("exported"), dict[str, bytes]()

    def make(learner: str) -> bytes:
        if learner not in made:
            (folder / "tiny.ssdedge").write_bytes(tiny_bundle(learner=learner))
            install(folder / learner, folder / "tiny.ssdedge")
            device = Device.open(folder / learner)
            device.learn("wedge", photos("wedge", 6), ANY)
            device.export(folder / "taught.ssdedge")
            made[learner] = (folder / "taught.ssdedge").read_bytes()
        return made[learner]

    return make


def verbs(device: Device, folder: Path) -> Iterator[Callable[[], object]]:
    yield lambda: device.predict(photos("cup", 3))
    yield lambda: device.learn("wedge", photos("wedge", 4), ANY)
    yield lambda: device.learn("bolt", photos("bolt", 4), ANY)
    yield lambda: device.merge_labels(["nut"], "screw", ANY)
    yield lambda: device.forget("cup", limits=ANY)
    yield lambda: device.export(folder / "again.ssdedge")
    yield lambda: install(folder / "again", folder / "again.ssdedge")


def survives(what: str, make: Callable[[], bytes], tmp_path: Path, into: bytes | None = None) -> str:
    """Install a bundle, or merge it into a device with the bundle `into`, and do everything; return what happened."""
    folder = tmp_path / f"mutant-{len(list(tmp_path.iterdir()))}"
    folder.mkdir()
    path = folder / "false.ssdedge"
    try:
        path.write_bytes(make())
    except SSDEdgeError:
        return "not packed"
    try:
        if into is None:
            install(folder / "root", path)
        else:
            (folder / "tiny.ssdedge").write_bytes(into)
            install(folder / "root", folder / "tiny.ssdedge")
            Device.open(folder / "root").merge(path, ANY)
    except SSDEdgeError as error:
        done = "gate" if isinstance(error, GateRefusedError) else "refused"
        return done if str(error).isprintable() else f"{what}: {error!r}"
    except Exception as error:
        raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error
    device = Device.open(folder / "root")
    for number, verb in enumerate(verbs(device, folder)):
        try:
            verb()
        except SSDEdgeError:
            continue
        except Exception as error:
            raise AssertionError(f"{what}, verb {number}: {type(error).__name__}: {error}") from error
    return "used"


def mutants(data: bytes, roles: tuple[str, ...]) -> Iterator[tuple[str, Callable[[], bytes]]]:
    opened = bundles.parse(data)
    for role in (role for role in roles if role in opened.roles):
        for name, array in opened.tensors(role)[0].items():
            values = FLOATS if array.dtype.kind == "f" else WHOLE
            for kind, change in {**values, **SHAPES}.items():
                yield (
                    f"{role}, {name}: {kind}",
                    lambda role=role, name=name, change=change: repacked(data, **{role: replaced(name, change)}),
                )


@pytest.mark.parametrize("learner", ["slda", "ncm"])
@pytest.mark.parametrize("merging", [False, True], ids=["installed", "merged"])
def test_mutants_of_statistics_and_thresholds(exported, tiny_bundle, tmp_path, merging, learner):
    data = exported(learner)
    chosen = list(mutants(data, ("statistics", "unknown", "learner")))[::17]
    into = tiny_bundle(learner=learner) if merging else None
    found = [survives(what, make, tmp_path, into) for what, make in chosen]
    assert set(found) <= {"used", "refused", "gate", "not packed"}
    assert found.count("refused") > 3


@pytest.mark.slow
@pytest.mark.parametrize("learner", [name for name in LEARNERS if name != "flymodel"])  # it needs 32 features
@pytest.mark.filterwarnings("ignore")
def test_all_mutants_of_every_learner(exported, tiny_bundle, tmp_path, learner):
    data = exported(learner)
    roles = ("statistics", "unknown", "learner") if learner in ("slda", "ncm") else ("learner",)
    found = [survives(what, make, tmp_path) for what, make in list(mutants(data, roles))[::4]]
    if learner in ("slda", "ncm"):
        into = tiny_bundle(learner=learner)
        found += [survives(what, make, tmp_path, into) for what, make in list(mutants(data, roles))[::9]]
    assert set(found) <= {"used", "refused", "gate", "not packed"}


WRONG = [
    ("statistics", replaced("second", np.zeros_like), "indefinite"),
    ("statistics", replaced("second", np.negative), "indefinite"),
    ("statistics", replaced("counts", np.negative), "'counts' of 'class statistics' must be from 0"),
    ("statistics", replaced("counts", FLOATS["fractional"]), "must be whole numbers"),
    ("statistics", replaced("counts", np.zeros_like), "a class without samples has a sum"),
    ("statistics", replaced("counts", lambda counts: counts + 1), "the registry counts 20, 20, 20, 6 images"),
    ("statistics", replaced("sums", FLOATS["scaled up"]), "indefinite"),
    ("statistics", replaced("sums", SHAPES["a column less"]), r"'sums' .* must have the shape \(4, 6\)"),
    ("learner", replaced("counts", np.zeros_like), "has samples of the rows none, but has learned 0, 1, 2, 3"),
    ("learner", replaced("second", np.zeros_like), "indefinite"),
    ("learner", replaced("sums", FLOATS["scaled up"]), "indefinite"),
    ("learner", replaced("counts", lambda counts: counts + 1), "the registry counts 20, 20, 20, 6 images"),
    ("learner", lie("dim", 20_000), "dim is 20000, but the embeddings have 6 features"),
    ("learner", lie("dim", 5), "dim is 5, but the embeddings have 6"),
    ("learner", as_another_kind, "contains the learner 'ridge', but its manifest says 'slda'"),
    ("learner", lie("settings", {"prior_weight": -7.0}), "prior_weight must be at least -1"),
    ("unknown", replaced("directions", FLOATS["scaled up"]), "'directions'"),
    ("unknown", replaced("directions", FLOATS["fractional"]), "unit length"),
    ("unknown", replaced("thresholds", lambda thresholds: thresholds + 5), "'thresholds'"),
    ("unknown", replaced("thresholds", SHAPES["a row less"]), "'thresholds'"),
    ("unknown", replaced("whitening", np.negative), "'whitening'"),
    ("unknown", replaced("axes", lambda axes: (0.9 * axes).astype(axes.dtype)), "right angles"),
    ("unknown", replaced("fitted", np.negative), "a rate of -0.95"),
]


@pytest.mark.parametrize(("role", "change", "told"), WRONG)
def test_false_states_are_refused_everywhere(exported, tiny_bundle, tmp_path, refused, role, change, told):
    path, learner = tmp_path / "false.ssdedge", "ncm" if role == "statistics" else "slda"  # which holds its own
    path.write_bytes(repacked(exported(learner), **{role: change}))
    with pytest.raises(BundleRefusedError, match=told):
        install(tmp_path / "root", path)
    assert re.search(told, refused("verify", path, code=5))
    (tmp_path / "tiny.ssdedge").write_bytes(tiny_bundle(learner=learner))
    install(tmp_path / "other", tmp_path / "tiny.ssdedge")
    with pytest.raises(BundleRefusedError, match=told):
        Device.open(tmp_path / "other").merge(path)


def test_class_statistics_are_there_exactly_once(exported):
    """Two copies could disagree, and without any a class could neither be taught nor judged."""
    opened, other = (bundles.parse(exported(learner)) for learner in ("slda", "ncm"))
    entries = {path: (role, opened.entries[path]) for role, path in opened.roles.items()}
    assert "statistics.safetensors" not in entries
    twice = entries | {"statistics.safetensors": ("statistics", other.read("statistics"))}
    with pytest.raises(BundleRefusedError, match="'slda' holds class statistics, and the bundle has others in"):
        DeviceState.of_bundle(bundles.parse(bundles.pack(opened.manifest, twice)))
    none = {path: (role, other.entries[path]) for role, path in other.roles.items() if role != "statistics"}
    with pytest.raises(BundleRefusedError, match="'ncm' needs class statistics, but the bundle has no"):
        DeviceState.of_bundle(bundles.parse(bundles.pack(other.manifest, none)))


@pytest.mark.parametrize(
    "images", [1.5, -1, True, "20", None, 10**400, 2**53 + 1, 19], ids=lambda value: f"{value!r:.10}"
)
def test_false_counts_of_images_are_refused(tiny_bundle, tmp_path, images):
    def change(value: Any, _: Any) -> None:
        value["classes"][0]["images"] = images

    with pytest.raises(BundleRefusedError, match=r"a count is|the registry counts 19, 20, 20 images"):
        DeviceState.of_bundle(bundles.parse(repacked(tiny_bundle(), classes=change)))


def test_a_false_dimension_allocates_nothing(tiny_bundle):
    """248 kB that named 20,000 features asked for 4.8 GB."""
    if not reset_peak():
        pytest.skip("the system does not report the peak of memory")
    data = repacked(tiny_bundle(learner="ncm"), learner=lie("dim", 20_000))
    before = resident("VmHWM")
    with pytest.raises(BundleRefusedError, match="20000"):
        DeviceState.of_bundle(bundles.parse(data))
    assert (resident("VmHWM") - before) / MIB < 20


def test_a_learner_that_answers_otherwise_is_refused_by_verify(tiny_bundle, tmp_path, refused):
    (tmp_path / "false.ssdedge").write_bytes(repacked(tiny_bundle(), learner=replaced("sums", np.negative)))
    assert "agree with the bundle on" in refused("verify", tmp_path / "false.ssdedge", code=5)
