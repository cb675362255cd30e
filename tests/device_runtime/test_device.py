"""`Device` in process: predict, learn and roll back; crashes and invalid input."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from device_runtime import Device
from device_runtime.install.bundle import install
from device_runtime.results import NO_OLD_CLASSES, ForgetResult
from ssd_edge import files, learners
from ssd_edge.errors import BadFilesError, BundleRefusedError, InputError
from ssd_edge.learners.closed_form.sums import ClassStatistics
from ssd_edge.learners.priors import Priors
from ssd_edge.learners.retention import TrackRecord, cost


@pytest.fixture
def root(installed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(installed, tmp_path / "root"))


def image_paths(shapes: Path, shape: str, split: str = "test") -> list[Path]:
    return sorted((shapes / split / shape).iterdir())


def scores(device: Device, paths: list[Path]) -> bytes:
    return device.learner.scores(device.embed(paths)).numpy().tobytes()


def test_learn_a_new_class_and_roll_back(root: Path, shapes: Path) -> None:
    old = [path for shape in ("circle", "square") for path in image_paths(shapes, shape)]
    with Device.open(root) as device:
        assert "triangle" not in device.classes
        before = scores(device, old)
        result = device.learn("triangle", image_paths(shapes, "triangle", "train"))
        assert result.generation == 2
        assert result.classes == device.classes
        assert device.classes[-1] == "triangle"
        assert result.held_out.images == 40  # each image once
        answers = [p.label for p in device.predict(image_paths(shapes, "triangle"))]
        assert answers.count("triangle") >= 10, answers
        assert result.old_classes.kind.startswith("estimate")
        device.rollback()
        assert "triangle" not in device.classes
        assert scores(device, old) == before
    with Device.open(root) as device:  # after a restart
        assert device.generation.number == 1
        assert scores(device, old) == before
        assert device.rollback(2).classes[-1] == "triangle"


def test_restart_keeps_the_state(root: Path, shapes: Path) -> None:
    paths = image_paths(shapes, "triangle") + image_paths(shapes, "cross")
    device = Device.open(root)
    device.learn("triangle", image_paths(shapes, "triangle", "train"))
    assert scores(Device.open(root), paths) == scores(device, paths)


def test_images_may_be_paths_arrays_or_pil(root: Path, shapes: Path) -> None:
    path = image_paths(shapes, "circle")[0]
    image = Image.open(path)
    device = Device.open(root)
    answers = device.predict([path, str(path), image, np.asarray(image)])
    assert len({(a.label, a.score) for a in answers}) == 1
    assert [a.image for a in answers] == [str(path), str(path), "image 2", "image 3"]
    assert device.predict([]) == []


@pytest.mark.parametrize(
    ("label", "count", "message"),
    [
        ("unknown", 5, "is reserved"),
        ("new", 2, "needs at least 3 different images, but 'new' has 2"),
        ("", 5, "a class name is empty"),
    ],
)
def test_refused_learn_changes_nothing(root: Path, shapes: Path, label: str, count: int, message: str) -> None:
    device = Device.open(root)
    with pytest.raises(InputError, match=message):
        device.learn(label, image_paths(shapes, "triangle")[:count])
    assert Device.open(root).generation.number == 1
    assert sorted(p.name for p in (root / "generations").iterdir()) == ["000001"]


def test_object_that_is_no_image_is_named_and_changes_nothing(root: Path, shapes: Path) -> None:
    device = Device.open(root)
    with pytest.raises(InputError, match="image 3 is a int, but a path, a PIL image or a uint8 array is needed"):
        device.learn("new", [*image_paths(shapes, "triangle")[:3], 7])
    assert Device.open(root).generation.number == 1


def test_corrupt_image_is_named_and_changes_nothing(root: Path, shapes: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jpg"
    bad.write_text("this is no image")
    device = Device.open(root)
    with pytest.raises(InputError, match=r"bad\.jpg is not a JPEG"):
        device.learn("new", [*image_paths(shapes, "triangle"), bad])
    assert Device.open(root).generation.number == 1


def test_all_bad_images_are_named_at_once(root: Path, shapes: Path, tmp_path: Path) -> None:
    good, black = image_paths(shapes, "triangle"), np.zeros((9, 9, 2), np.uint8)
    (tmp_path / "text.jpg").write_text("this is no image")
    (tmp_path / "empty.png").touch()
    bad = [tmp_path / "text.jpg", tmp_path / "gone.jpg", black, tmp_path / "empty.png"]
    said = ["text.jpg is not a JPEG", "gone.jpg does not", "must have 1 or 3 channels, but has 2", "empty.png is empty"]
    device = Device.open(root)
    sources = [*bad[:2], *good * 5, *bad[2:]]  # in the first and the last batch that are decoded
    for attempt in (device.predict, lambda sources: device.learn_all({"new": sources, "other": good})):
        with pytest.raises(BadFilesError, match=r"^4 of (79|94) files cannot be used: ") as refused:
            attempt(sources)
        assert all(text in problem for text, problem in zip(said, refused.value.problems, strict=True))
    assert Device.open(root).generation.number == 1


def test_one_image_is_as_good_as_a_list(root: Path, shapes: Path) -> None:
    path = image_paths(shapes, "circle")[0]
    device = Device.open(root)
    (expected,) = device.predict([path])
    array = np.asarray(Image.open(path))
    for one in (path, str(path), Image.open(path), array):
        (answer,) = device.predict(one)
        assert (answer.label, answer.score) == (expected.label, expected.score)
    assert len(device.predict(array[..., 0])) == 1
    assert len(device.predict(np.stack([array, array]))) == 2
    assert device.embed(path).shape == device.embed([path]).shape
    with pytest.raises(InputError, match="needs at least 3 different images, but 'new' has 1"):
        device.learn("new", path)


@pytest.mark.slow  # test_killed.py tests the same on smaller states by default
def test_crash_at_any_step_of_a_learn_leaves_a_committed_generation(root: Path, shapes: Path) -> None:
    paths, seen = image_paths(shapes, "triangle", "train")[:10], []
    probe = image_paths(shapes, "triangle") + image_paths(shapes, "circle")
    before = scores(Device.open(root), probe)
    device = Device.open(root)
    # only the writes are tested here, so embed once
    embeddings = device.embed(paths)
    device.embed = lambda sources: embeddings  # type: ignore[method-assign]

    class Crash(Exception):
        pass

    step = 1
    while True:
        count = 0

        def hook(name: str, path: Path) -> None:
            nonlocal count
            count += 1
            if count == step:  # noqa: B023  (called within this iteration)
                raise Crash

        files.fault_hook = hook
        try:
            device.learn("triangle", paths)
            break
        except Crash:
            pass
        finally:
            files.fault_hook = None
        after = Device.open(root)
        seen.append(after.generation.number)
        if after.generation.number == 1:
            assert scores(after, probe) == before
        else:
            assert after.classes[-1] == "triangle"
            after.rollback(1)
        step += 4  # every fourth step; the tests of the store cover every step
    assert step > 20
    assert 1 in seen


def test_rollback_without_a_parent_names_the_choices(root: Path, bundle: Path) -> None:
    device = Device.open(root)
    with pytest.raises(InputError, match=r"generation 1 was installed, not learned.*it is the only one"):
        device.rollback()
    install(root, bundle)
    with pytest.raises(InputError, match=r"generation 2 was installed.*name one of: 1"):
        Device.open(root).rollback()
    with pytest.raises(InputError, match="available"):
        Device.open(root).rollback(7)


def test_status_and_history_are_json(root: Path, shapes: Path) -> None:
    device = Device.open(root)
    device.learn("triangle", image_paths(shapes, "triangle")[:6])
    status = json.loads(json.dumps(device.status().to_dict()))
    assert status["generation"] == 2
    assert status["learned_here"] == ["triangle"]
    assert status["images"]["triangle"] == 6
    assert status["provider"] == "CPUExecutionProvider"
    assert status["replay"] is False
    history = json.loads(json.dumps(device.history().to_dict()))
    assert [event["event"] for event in history["events"]] == ["install", "learn"]
    assert [entry["number"] for entry in history["generations"]] == [1, 2]


def test_damaged_generation_falls_back_with_a_warning(root: Path, shapes: Path) -> None:
    Device.open(root).learn("triangle", image_paths(shapes, "triangle")[:6])
    path = root / "generations" / "000002" / "learner.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    device = Device.open(root)
    assert device.generation.number == 1
    assert "generation 1 is used instead" in device.status().warning


def test_inconsistent_bundle_is_refused(bundle: Path, tmp_path: Path) -> None:
    from ssd_edge import bundle as bundles
    from ssd_edge.classes import ClassRegistry

    opened = bundles.read(bundle)
    registry = ClassRegistry()
    for name in ("one", "two", "three", "four", "five"):
        registry = registry.add(name)
    entries = {path: (role, opened.entries[path]) for role, path in opened.roles.items()}
    entries["classes.json"] = ("classes", files.json_bytes(registry.to_json()))
    manifest = {key: value for key, value in opened.manifest.items() if key not in ("files", "format", "version")}
    bundles.write(tmp_path / "odd.ssdedge", bundles.pack({**manifest, "classes": registry.names}, entries))
    with pytest.raises(BundleRefusedError, match="the registry has 5 classes, but the learner has 4"):
        install(tmp_path / "root", tmp_path / "odd.ssdedge")
    assert not (tmp_path / "root" / "CURRENT").exists()


def test_retention_estimate_detects_a_corrupted_learner() -> None:
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(4, 16, generator=generator) * 3
    labels = torch.arange(400) % 4
    vectors = means[labels] + torch.randn(400, 16, generator=generator)
    statistics = ClassStatistics(16)
    statistics.add(vectors, labels)
    good = learners.build({"name": "slda"}, 16, Priors())
    good.learn(learners.Task(vectors, labels))
    corrupted = learners.build({"name": "slda"}, 16, Priors())
    corrupted.learn(learners.Task(vectors, labels.roll(1)))
    record = TrackRecord.of(good, statistics, torch.full((4,), 50), *[torch.full((4,), 48)] * 2)
    same, harmed = cost(good, good, statistics, record), cost(good, corrupted, statistics, record)
    assert torch.equal(same.before, same.after)
    assert float(same.before.mean()) == pytest.approx(0.96, abs=0.03)
    assert float((harmed.before - harmed.after).mean()) > 0.7


def test_example_runs(bundle: Path, capsys: pytest.CaptureFixture) -> None:
    import runpy

    example = runpy.run_path(str(Path(__file__).resolve().parents[2] / "examples" / "device.py"))
    example["main"](bundle)
    output = capsys.readouterr().out
    assert "a red thing: a red thing" in output
    assert "as it was installed: " in output


def test_an_image_without_an_embedding_is_named(tiny_bundle, tmp_path: Path) -> None:
    """A backbone that divides by its norm gives NaN for a black image."""
    (tmp_path / "a.ssdedge").write_bytes(tiny_bundle(normalised=True))
    install(tmp_path / "root", tmp_path / "a.ssdedge")
    device = Device.open(tmp_path / "root")
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(130):  # more than one batch
        Image.new("RGB", (8, 8), (0, 0, 0) if number % 20 == 19 else (200, 200, number)).save(
            folder / f"{number:03}.png"
        )
    paths = sorted(folder.iterdir())
    for act in (device.predict, device.embed, lambda images: device.learn("plate", images)):
        with pytest.raises(
            InputError, match=r"NaN or infinity for \S+019\.png, .*099\.png and 1 more images; leave them"
        ):
            act(paths)
    assert device.store.current().number == 1
    with pytest.raises(InputError, match="for image 1; leave it out"):
        device.predict([np.full((8, 8, 3), 9, np.uint8), np.zeros((8, 8, 3), np.uint8)])
    with pytest.raises(InputError, match="for all 2 images; check its weights"):
        device.predict([np.zeros((8, 8, 3), np.uint8)] * 2)


def test_a_record_is_utf_8_whatever_files_are_called() -> None:
    """Warnings name images, and a file name may be any bytes."""
    warnings = ["b\udce9.png"]
    result = ForgetResult(forgot="a", images=3, exact=True, left="", old_classes=NO_OLD_CLASSES, warnings=warnings)
    assert json.loads(files.json_bytes(result.info()))["warnings"] == ["b?.png"]
