"""Tests of sums over parts of the images of a stream, as the workers of a cluster compute them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from ssd_edge import learners
from ssd_edge.backbones import names
from ssd_edge.backbones import package as packages
from ssd_edge.backbones.embedder import open_backbone
from ssd_edge.config import BackboneConfig
from ssd_edge.data.arrays import Images
from ssd_edge.images.second import second_view
from ssd_edge.learners import Task
from ssd_edge.run.parts import TEST, Moments, Rows, Totals, Work, Worker, added

pytestmark = pytest.mark.usefixtures("one_thread")
DIM = 256
TINY = BackboneConfig(name="tiny")
CLASSES = 3


@pytest.fixture(scope="module")
def images(shapes: Path) -> tuple[Images, np.ndarray]:
    """Return 36 files of three classes, interleaved, and their rows."""
    folders = sorted(path for path in (shapes / "train").iterdir())[:CLASSES]
    files = [folder / f"{number:03d}.png" for number in range(12) for folder in folders]
    return Images(files, list(map(str, files))), np.arange(len(files)) % CLASSES


@pytest.fixture(scope="module")
def work() -> Work:
    package = packages.load(names.package_folder(TINY))
    return Work(package, {"name": "slda"}, DIM, package.priors, 0, "files")


def rows_of(images: Images, labels: np.ndarray, chosen: np.ndarray, keep: int = 0) -> Rows:
    """Return some images as a part; those before `keep` return their embeddings."""
    return Rows(
        position=chosen,
        experience=labels[chosen] // 2,
        row=labels[chosen],
        keep=chosen < keep,
        packed=images.packed(chosen),
        names=[images.names[place] for place in chosen],
    )


@pytest.mark.parametrize("name", ["slda", "ridge", "ranpac", "fecam", "ncm"])
@pytest.mark.parametrize("parts", [1, 5])
def test_sums_do_not_depend_on_the_partition(
    name: str, parts: int, images: tuple[Images, np.ndarray], work: Work
) -> None:
    """Learning the parts' sums, sent as bytes, gives the scores of learning the samples."""
    files, labels = images
    work = dataclasses.replace(work, options={"name": name, **({"features": 200} if name == "ranpac" else {})})
    worker = Worker(work, threads=1)
    order = np.random.default_rng(parts).permutation(len(labels))
    found = [
        Totals.from_bytes(totals.to_bytes())
        for chosen in np.array_split(order, parts)
        for totals in worker.totals(rows_of(files, labels, np.sort(chosen), keep=10))
    ]
    whole = sorted(added(found), key=lambda totals: totals.experience)
    assert [totals.experience for totals in whole] == [0, 1]
    assert [totals.images for totals in whole] == [24, 12]
    embedder = open_backbone(TINY, torch.device("cpu"))
    pixels = np.concatenate(list(files.batches(embedder.pixels, 64)))
    embeddings, rows = torch.from_numpy(embedder.embed(pixels)), torch.from_numpy(labels)
    second = torch.from_numpy(worker._embedded(files, second_view)) if worker.learner.wants_second_view else None
    expected, summed = (learners.build(work.options, work.dim, work.priors, 0) for _ in range(2))
    for number, totals in enumerate(whole):
        chosen = rows // 2 == number
        views = None if second is None else second[chosen]
        expected.learn(Task(embeddings[chosen], rows[chosen], views))
        summed.add([(totals.sums.state(), torch.from_numpy(totals.rows))])
    assert summed.tasks_learned >= 2
    assert torch.equal(summed.seen, expected.seen)
    torch.testing.assert_close(summed.scores(embeddings), expected.scores(embeddings), rtol=1e-4, atol=1e-4)
    kept = {place: row for totals in whole for place, row in zip(totals.positions.tolist(), totals.kept, strict=True)}
    assert sorted(kept) == list(range(10))
    for place, row in kept.items():
        np.testing.assert_allclose(row, embeddings[place], atol=1e-5)
    statistics = [totals.embeddings for totals in whole]
    assert all(one is None for one in statistics) == (summed.class_statistics() is not None)


def test_test_images_return_embeddings_and_no_sums(images: tuple[Images, np.ndarray], work: Work) -> None:
    files, labels = images
    part = rows_of(files, labels, np.arange(6), keep=6)
    (found,) = Worker(work, threads=1).totals(dataclasses.replace(part, experience=np.full(6, TEST)))
    assert (found.experience, found.images, found.sums) == (TEST, 6, None)
    assert found.kept.shape == (6, DIM)


def test_every_file_that_cannot_be_used_is_named(images: tuple[Images, np.ndarray], work: Work, tmp_path: Path) -> None:
    files, _ = images
    bad = [tmp_path / name for name in ("one.png", "two.png")]
    for path in bad:
        path.write_bytes(b"not an image")
    mixed = Images([*[Path(name) for name in files.names[:2]], *bad], [*files.names[:2], *map(str, bad)])
    (found,) = Worker(work, threads=1).totals(rows_of(mixed, np.zeros(4, np.int64), np.arange(4)))
    assert found.sums is None
    assert len(found.bad) == 2
    for path in bad:
        assert sum(path.name in sentence for sentence in found.bad) == 1
    sent = Totals.from_bytes(found.to_bytes())
    assert (sent.bad, sent.failures) == (found.bad, [])


@pytest.mark.parametrize("cut", [1, 30, 99])
def test_moments_of_parts_add_up(cut: int) -> None:
    features = 1e4 + np.random.default_rng(0).normal(size=(100, 5)).astype(np.float32)
    found = Moments.of(features[:cut]).plus(Moments.of(features[cut:]))
    assert found.count == 100
    np.testing.assert_allclose(found.mean, features.mean(0, dtype=np.float64), rtol=1e-12)
    np.testing.assert_allclose(found.deviation, features.std(0, dtype=np.float64), rtol=1e-6)
