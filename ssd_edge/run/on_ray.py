"""Embedding and adding up on a Ray cluster (``--engine ray``).

The images of a stream are a Ray Data set, in the order of their experiences. Actors with one backbone each turn parts
of it into sums (`parts`), with more than `FAN` of them further actors add these up, and this process adds up what is
left and solves.
"""

from __future__ import annotations

import dataclasses
import os
import time
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ssd_edge import learners
from ssd_edge.backbones import names
from ssd_edge.backbones import package as packages
from ssd_edge.backbones.embedder import Embedder, level_scales
from ssd_edge.config import TrainConfig
from ssd_edge.data import Dataset, Images, load
from ssd_edge.errors import BadFilesError, InputError
from ssd_edge.learners.base import Progress
from ssd_edge.learners.closed_form.sums import ClassStatistics
from ssd_edge.learners.registry import SUMMED
from ssd_edge.learners.unknown import held_out_parts
from ssd_edge.report import events
from ssd_edge.report.events import Listener, Message
from ssd_edge.run import report
from ssd_edge.run.cluster import HELPER, WORKER, Cluster
from ssd_edge.run.parts import TEST, Rows, Totals, Work, Worker, added
from ssd_edge.run.streams import Stream
from ssd_edge.run.tasks import StreamData

PART = 2048  # images a worker takes at a time, at most
SMALLEST = 64  # and at least, if there are as many
PARTS = 8  # for each worker, if parts are not at a limit: the last ones to finish wait for less
FAN = 8  # workers beyond which tasks add up as many totals each, before this process adds up theirs
RETRIES = 10  # of one part whose worker dies
TESTED = 20_000  # test images, at most; the accuracy on them has a standard error of 0.35 points at most


def check(options: Mapping[str, Any]) -> None:
    """Check that the state of a learner is sums.

    Args:
        options: ``name`` and settings of the learner.

    Raises:
        InputError: It is not.
    """
    if options["name"] not in SUMMED:
        raise InputError(
            f"--engine ray adds up sums, but learner.name={options['name']} needs all embeddings in one process; "
            f"use one of {', '.join(SUMMED)}, or --engine local"
        )


class Engine:
    """Does on a cluster what `run.embed` and the learner's sums do in one process.

    Args:
        cluster: The cluster.
        fan: Number of totals that are added up at once.
    """

    def __init__(self, cluster: Cluster, fan: int = FAN) -> None:
        self.cluster, self.fan = cluster, fan
        context = cluster.ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.execution_options.preserve_order = True

    def load(self, config: TrainConfig, listener: Listener) -> Dataset:
        """Read a data set as `data.load`, and keep at most `TESTED` test images."""
        dataset = load(config.data, config.run.seed, self.digests)
        if len(dataset.test) <= TESTED:
            return dataset
        rng = np.random.default_rng([config.run.seed, 2])
        chosen = np.sort(rng.permutation(len(dataset.test))[:TESTED])
        missing = len(dataset.classes) - len(np.unique(dataset.test_labels[chosen]))
        if missing:  # one of each class at least
            first = np.unique(dataset.test_labels, return_index=True)[1]
            chosen = np.union1d(chosen, first)
        listener(Message(f"testing on {len(chosen):,} of {len(dataset.test):,} test images, a seeded choice"))
        return dataclasses.replace(dataset, test=dataset.test.take(chosen), test_labels=dataset.test_labels[chosen])

    def digests(self, images: Images) -> list[bytes]:
        """Do what `Images.digests` does, with files read by the workers."""
        if images.kind != "files":
            return images.digests()
        data = self._table(images, np.arange(len(images)), {})
        found = self._map(data, _Digests, (), PART, self.cluster.workers)
        problems: list[str] = []
        digests: list[bytes] = []
        for batch in found.iter_batches(batch_size=None, batch_format="pyarrow"):
            digests += batch.column("digest").to_pylist()
            problems += [os.fsdecode(problem) for problem in batch.column("problem").to_pylist() if problem]
        if problems:
            raise InputError(problems[0])
        return digests

    def data(
        self,
        config: TrainConfig,
        dataset: Dataset,
        stream: Stream,
        embedder: Embedder,
        listener: Listener,
    ) -> SummedData:
        """Return the data of a stream whose sums are computed as they are learned.

        Args:
            config: Configuration of the run.
            dataset: Images.
            stream: Order of classes and samples.
            embedder: The backbone.
            listener: Receives progress events.

        Raises:
            BadFilesError: An image of the first experience cannot be used, and the backbone does not standardise.
        """
        started = time.monotonic()
        rows = torch.from_numpy(stream.rows(dataset.train_labels))
        experiences = stream.experiences(dataset.train_labels)
        total = len(dataset.train) + len(dataset.test)
        listener(Message(f"embedding {total:,} images with {self.cluster.workers} workers on Ray"))
        folder = names.package_folder(config.backbone)
        graph = embedder.graph
        work = Work(
            backbone=packages.load(folder) if graph is None else graph,
            options=dict(config.learner),
            dim=embedder.dim,
            priors=embedder.priors,
            seed=config.run.seed,
            kind=dataset.train.kind,
        )
        if not embedder.standardised:
            moments = self._moments(work, dataset, experiences[0])
            sigma = level_scales(moments.deviation, embedder.widths)
            work = dataclasses.replace(
                work, standardisation=(moments.mean.astype(np.float32), sigma.astype(np.float32))
            )
        kept = _kept(rows, len(stream.order), config.run.seed)
        learner = learners.build(config.learner, embedder.dim, embedder.priors, config.run.seed)
        size = (len(kept), embedder.dim)
        data = SummedData(
            train=torch.zeros(size),
            train_rows=rows,
            test=torch.zeros(len(dataset.test), embedder.dim),
            test_rows=torch.from_numpy(stream.rows(dataset.test_labels)),
            train_tasks=tuple(torch.from_numpy(index) for index in experiences),
            test_tasks=tuple(torch.from_numpy(index) for index in stream.groups(dataset.test_labels)),
            introduced=stream.introduced,
            names=tuple(dataset.classes[label] for label in stream.order),
            standardisation=work.standardisation,
            second=torch.zeros(size) if learner.wants_second_view else None,
            kept=kept,
            totals=self._totals(work, dataset, experiences, rows.numpy(), kept.numpy(), listener),
            sums=ClassStatistics(embedder.dim) if learner.class_statistics() is None else None,
        )
        data.begin()
        return dataclasses.replace(data, embed_seconds=time.monotonic() - started)

    def _moments(self, work: Work, dataset: Dataset, first: np.ndarray) -> Any:
        """Return the moments of the raw features of the first experience."""
        work = dataclasses.replace(work, measure_only=True)
        columns = {"row": np.zeros(len(first), np.int64), "experience": np.zeros(len(first), np.int64)}
        table = self._table(dataset.train, first, {**columns, "keep": np.zeros(len(first), bool)})
        (found,) = added(self._run(work, table, len(first)))
        if found.bad or found.failures:
            _refuse(found, len(dataset.train) + len(dataset.test))
        return found.moments

    def _totals(
        self,
        work: Work,
        dataset: Dataset,
        experiences: list[np.ndarray],
        rows: np.ndarray,
        kept: np.ndarray,
        listener: Listener,
    ) -> Iterator[Totals]:
        """Yield the totals of the test images and of each experience, in order.

        Raises:
            BadFilesError: An image cannot be used; all of them are named.
            InputError: The backbone gives NaN for an image.
        """
        test, order = len(dataset.test), np.concatenate(experiences)
        numbers = np.repeat(np.arange(len(experiences)), [len(part) for part in experiences])
        no_rows, of_test = np.zeros(test, np.int64), np.full(test, TEST)
        parts = [
            self._table(
                dataset.test, np.arange(test), {"row": no_rows, "experience": of_test, "keep": np.ones(test, bool)}
            ),
            self._table(
                dataset.train, order, {"row": rows[order], "experience": numbers, "keep": np.isin(order, kept)}
            ),
        ]
        total, done = test + len(order), 0
        bad = Totals(TEST, 0, np.zeros(0, np.int64))
        expected = {TEST: test, **{number: len(part) for number, part in enumerate(experiences)}}
        collected: dict[int, Totals] = {}
        following = TEST
        with events.progress(listener, "embedding") as update:
            for found in self._run(work, parts[0].union(parts[1]), total):
                done += found.images
                update(0, done / total, f"{done:,} images")
                bad.bad += found.bad
                bad.failures += found.failures
                if bad.bad or bad.failures:
                    continue  # to name all of them
                (collected[found.experience],) = added([*filter(None, [collected.get(found.experience)]), found])
                while following in collected and collected[following].images == expected[following]:
                    yield collected.pop(following)
                    following += 1
        if bad.bad or bad.failures:
            _refuse(bad, total)
        if done != total or collected:
            raise RuntimeError(f"Ray returned {done} images of {total}")  # neither lost nor counted twice

    def _run(self, work: Work, data: Any, images: int) -> Iterator[Totals]:
        """Yield the totals of parts of a Ray Data set of so many images, about in its order."""
        shared = self.cluster.ray.put(work)
        # a graph runs on the CPU
        gpu = self.cluster.gpus > 0 and isinstance(work.backbone, packages.BackbonePackage)
        workers = min(self.cluster.workers, self.cluster.gpus) if gpu else self.cluster.workers
        summed = self._map(data, _Adder, ([shared], gpu), self._part(images), workers, gpu)
        if workers > self.fan:
            summed = self._map(summed, _Fewer, (), self.fan, -(-workers // self.fan), cpus=HELPER)
        for batch in summed.iter_batches(batch_size=1, batch_format="pyarrow", prefetch_batches=0):
            for totals in batch.column("totals"):
                yield Totals.from_bytes(totals.as_py())

    def _part(self, images: int) -> int:
        """Return the number of images that a worker takes at a time."""
        return max(min(PART, -(-images // (PARTS * self.cluster.workers))), SMALLEST)

    def _map(
        self,
        data: Any,
        actor: type,
        given: tuple[Any, ...],
        size: int,
        actors: int,
        gpu: bool = False,
        cpus: float = WORKER,
    ) -> Any:
        """Return a Ray Data set mapped by a pool of actors; a part whose actor dies is given to another one."""
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # Ray: without a limit, which it will not take from 2.64 on, it never gives up
            return data.map_batches(
                actor,
                fn_constructor_args=given,
                batch_size=size,
                batch_format="pyarrow",
                compute=self.cluster.ray.data.ActorPoolStrategy(size=actors),
                num_cpus=cpus,
                num_gpus=1 if gpu else None,
                max_restarts=-1,
                max_task_retries=RETRIES,
            )

    def _table(self, images: Images, positions: np.ndarray, columns: Mapping[str, np.ndarray]) -> Any:
        """Return images as a Ray Data set with their positions and other columns, in this order."""
        import pyarrow

        size, blocks = self._part(len(positions)), []
        for start in range(0, len(positions), size):
            some = slice(start, start + size)
            packed = pyarrow.array(images.packed(positions[some]), pyarrow.large_binary())
            named = [b""] * len(packed)
            if images.kind != "files":
                named = [os.fsencode(images.names[position]) for position in positions[some]]
            table = {"position": positions[some], "image": packed, "name": pyarrow.array(named, pyarrow.binary())}
            table |= {name: column[some] for name, column in columns.items()}
            blocks.append(self.cluster.ray.put(pyarrow.table(table)))
        return self.cluster.ray.data.from_arrow_refs(blocks)


@dataclasses.dataclass(frozen=True)
class SummedData(StreamData):
    """Data of a stream of which only the sums come to this process, and the embeddings that `train` and `test` hold.

    Attributes:
        totals: Yields the totals of the test images, and then of each experience, in order.
        sums: Receives the statistics of all training embeddings; None if the learner has them.
    """

    totals: Iterator[Totals] = dataclasses.field(default_factory=lambda: iter(()))
    sums: ClassStatistics | None = None

    def begin(self) -> None:
        """Receive the embeddings of the test images."""
        self._next(TEST)

    def learn(self, learner: learners.Learner, number: int, progress: Progress) -> None:
        """Let a learner learn one experience; the next one that it has not learned."""
        found = self._next(number)
        if found.sums is None:
            raise ValueError("the totals of an experience have no sums")
        learner.add([(found.sums.state(), torch.from_numpy(found.rows))])
        progress(1.0)

    def statistics(self) -> ClassStatistics:
        """Return the class statistics of all training embeddings."""
        if self.sums is None:
            raise ValueError("the learner has the statistics of the embeddings")
        return self.sums

    def _next(self, number: int) -> Totals:
        """Return the totals of an experience, and keep the embeddings that come with them."""
        for found in self.totals:
            self._keep(found)
            if found.experience == number:
                return found
        raise ValueError(f"experience {number} was learned before")

    def _keep(self, found: Totals) -> None:
        """Keep what is to be kept of an experience."""
        positions = torch.from_numpy(found.positions)
        if found.experience == TEST:
            self.test[positions] = torch.from_numpy(found.kept)
            return
        if len(positions) and self.kept is not None:
            places = torch.searchsorted(self.kept, positions)
            self.train[places] = torch.from_numpy(found.kept)
            if self.second is not None:
                self.second[places] = torch.from_numpy(found.second)
        if self.sums is not None and found.embeddings is not None:
            self.sums.merge(found.embeddings, torch.from_numpy(found.rows))


def _kept(rows: Tensor, classes: int, seed: int) -> Tensor:
    """Return the positions of the training images whose embeddings a run needs, besides their sums; ascending.

    These are the images that calibrate the thresholds for ``unknown``, and those that the report learns again from.
    """
    again = report.places(rows, seed) <= report.CAPS[-1]
    return (again | (held_out_parts(rows, classes) >= 0)).nonzero().flatten()


def _refuse(found: Totals, total: int) -> None:
    """Raise the error of images that cannot be used.

    Raises:
        BadFilesError: Files cannot be used; all are named.
        InputError: The backbone gives NaN for an image.
    """
    if found.bad:
        raise BadFilesError(sorted(found.bad), total, "--skip-bad (data.skip_bad=true)")
    raise InputError(found.failures[0])


class _Adder:
    """Actor that embeds and adds up."""

    def __init__(self, shared: list[Any], gpu: bool) -> None:
        import ray

        torch.set_num_threads(1)
        self.worker = Worker(ray.get(shared[0]), "cuda" if gpu else "cpu", threads=1)

    def __call__(self, batch: Any) -> Any:
        import pyarrow

        columns = {name: batch.column(name).to_numpy() for name in ("position", "experience", "row", "keep")}
        packed = batch.column("image").to_pylist()
        names = [os.fsdecode(name) for name in batch.column("name").to_pylist()]
        found = self.worker.totals(Rows(**columns, packed=packed, names=names))
        return pyarrow.table({"totals": pyarrow.array([part.to_bytes() for part in found], pyarrow.large_binary())})


class _Fewer:
    """Actor that adds up totals."""

    def __call__(self, batch: Any) -> Any:
        import pyarrow

        found = added(Totals.from_bytes(totals.as_py()) for totals in batch.column("totals"))
        return pyarrow.table({"totals": pyarrow.array([part.to_bytes() for part in found], pyarrow.large_binary())})


class _Digests:
    """Actor that reads files and hashes them."""

    def __call__(self, batch: Any) -> Any:
        import pyarrow

        images = Images.unpacked("files", batch.column("image").to_pylist(), [])
        problem = ""
        try:
            digests = images.digests()
        except InputError as error:
            digests, problem = [b""] * len(images), str(error)
        problems = [os.fsencode(problem), *[b""] * (len(images) - 1)]
        return pyarrow.table({"digest": digests, "problem": pyarrow.array(problems, pyarrow.binary())})
