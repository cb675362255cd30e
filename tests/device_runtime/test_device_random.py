"""Random sequences of device operations, compared with a simple model.

The model holds the id, name and number of images of each class, and for every generation the committed bytes and the
scores it gave. Memory, disk use and open files must not grow with the number of operations.
"""

from __future__ import annotations

import dataclasses
import gc
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from helpers import store_standins
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from device_runtime.device import Device
from device_runtime.install import bundle
from device_runtime.learning.guard import Limits
from device_runtime.store import generations
from device_runtime.store.generations import Generations
from ssd_edge import bundle as bundles
from ssd_edge import files
from ssd_edge.errors import BundleRefusedError, GateRefusedError, InputError
from ssd_edge.system import resident

STORE = vars(store_standins)
COLOURS, contents, leftovers, photos = (STORE[key] for key in ("COLOURS", "contents", "leftovers", "photos"))
ANY = Limits(force=True)
EVENTS = 30  # in the journal, small enough to be reached in a test
GROWTH_MB = 50
NAMES = st.sampled_from([*COLOURS, "mug", "fastener"])
PICTURES = st.sampled_from(list(COLOURS))  # a class may be taught with images of any colour
SEEDS = st.integers(0, 99)
PICKS = st.integers(0, 20)


@dataclasses.dataclass(frozen=True)
class Known:
    """One class of the model."""

    id: int
    name: str
    images: int


@dataclasses.dataclass(frozen=True)
class Model:
    """One generation: classes by row, next id, release and parent; files and scores once it is committed."""

    classes: tuple[Known, ...]
    next_id: int
    release: int
    parent: int | None
    files: dict[str, bytes] = dataclasses.field(default_factory=dict)
    scores: torch.Tensor | None = None

    def row(self, name: str) -> int | None:
        return next((row for row, one in enumerate(self.classes) if one.name == name), None)

    def with_images(self, name: str, images: int) -> Model:
        row, after = self.row(name), list(self.classes)
        if row is None:
            return dataclasses.replace(
                self, classes=(*after, Known(self.next_id, name, images)), next_id=self.next_id + 1
            )
        after[row] = dataclasses.replace(after[row], images=after[row].images + images)
        return dataclasses.replace(self, classes=tuple(after))

    def without(self, row: int) -> Model:
        return dataclasses.replace(self, classes=self.classes[:row] + self.classes[row + 1 :])

    def named(self, row: int, name: str) -> Model:
        after = list(self.classes)
        after[row] = dataclasses.replace(after[row], name=name)
        return dataclasses.replace(self, classes=tuple(after))


class Devices(RuleBasedStateMachine):
    """A device, a second `Device` on the same root that only reads, and other devices to merge with."""

    make_bundle: ClassVar[Callable[..., bytes]]  # the `tiny_bundle` fixture
    folder: ClassVar[Path]
    did: ClassVar[Counter]  # number of operations by name, over all runs
    seen: ClassVar[list[tuple[int, int, int]]]  # per run: operations so far, memory in MiB, open files

    def __init__(self) -> None:
        super().__init__()
        self.home = Path(tempfile.mkdtemp(dir=self.folder))
        self.root = self.home / "root"
        self.store = Generations(self.root)
        self.vectors = torch.empty(0)
        self.models: dict[int, Model] = {}
        self.number = 0  # current generation
        self.read = 0  # generation that the reader last loaded
        self.largest = 0  # size of the largest generation in bytes

    # ── the model ────────────────────────────────────────────────────────────────────────────────
    @property
    def now(self) -> Model:
        return self.models[self.number]

    def committed(self, what: str, after: Model) -> None:
        """Check that a commit led to `after` under a new number, and add it to the model."""
        generation = self.device.generation
        assert generation.number > max(self.models, default=0)
        assert generation.parent == after.parent
        kept = contents(generation)
        self.models[generation.number] = dataclasses.replace(
            after, files=kept, scores=self.device.learner.scores(self.vectors)
        )
        self.number = generation.number
        self.largest = max(self.largest, STORE["disk_bytes"](generation.path))
        self.count(what)

    def child(self) -> Model:
        return dataclasses.replace(self.now, parent=self.number)

    def count(self, what: str) -> None:
        type(self).did[what] += 1

    def refused(self, call, *kinds: type[Exception]) -> None:
        """Check that the call is refused and changes no byte on disk."""
        before = self.bytes_on_disk()
        with pytest.raises(kinds or (InputError,)):
            call()
        assert self.bytes_on_disk() == before

    def bytes_on_disk(self) -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in self.root.rglob("*") if path.is_file() and path.name != ".lock"}

    # ── operations ───────────────────────────────────────────────────────────────────────────────
    @initialize()
    def first(self) -> None:
        self.put(1)
        self.device = Device.open(self.root)
        self.reader = Device.open(self.root)
        self.vectors = self.device.embed([picture for name in COLOURS for picture in photos(name, 3, seed=7)])
        self.committed("install", self.installed(1))
        self.read = self.number

    def bundle(self, release: int) -> Path:
        path = self.home / f"{release}.ssdedge"
        if not path.exists():
            path.write_bytes(STORE["with_backbone"](type(self).make_bundle(release=release), release % 3 + 1))
        return path

    def put(self, release: int) -> None:
        bundle.install(self.root, self.bundle(release))

    def installed(self, release: int) -> Model:
        return Model(tuple(Known(row, name, 20) for row, name in enumerate(("cup", "nut", "screw"))), 3, release, None)

    @rule()
    def install(self) -> None:
        newest = max(model.release for model in self.models.values())
        self.put(newest + 1)
        assert self.device.refresh()
        self.committed("install", self.installed(newest + 1))
        if newest > 1:
            self.refused(lambda: self.put(newest), BundleRefusedError)

    @rule(batches=st.dictionaries(NAMES, st.tuples(PICTURES, st.integers(3, 6), SEEDS), min_size=1, max_size=3))
    def learn(self, batches: dict[str, tuple[str, int, int]]) -> None:
        known = [self.now.row(name) is not None for name in batches]
        result = self.device.learn_all({name: photos(*batch) for name, batch in batches.items()}, ANY)
        after = self.child()
        for one, (_, count, _) in zip(result.taught, batches.values(), strict=True):
            assert one.images in (count, count - 1)  # two of so few pixels can be nearly the same, and count once
            after = after.with_images(one.label, one.images)
        kind = "several" if len(batches) > 1 else "known" if known[0] else "new"
        self.committed(f"learn {kind}", after)

    @rule(name=NAMES, picture=PICTURES, count=st.integers(3, 30), seed=SEEDS)
    def learn_under_guard(self, name: str, picture: str, count: int, seed: int) -> None:
        before = self.bytes_on_disk()
        try:
            result = self.device.learn(name, photos(picture, count, seed), limits=Limits(max_forgetting=0.0))
        except GateRefusedError:
            assert self.bytes_on_disk() == before
            self.count("guard refused")
        else:
            self.committed("guard passed", self.child().with_images(name, result.images))

    def one_of(self, pick: int) -> str:
        """Return a class that the device knows, or sometimes one that it does not."""
        names = [one.name for one in self.now.classes]
        return names[pick % len(names)] if names and pick else "never taught"

    @rule(pick=PICKS)
    def forget(self, pick: int) -> None:
        name = self.one_of(pick)
        row = self.now.row(name)
        if row is None:
            self.refused(lambda: self.device.forget(name, limits=ANY))
            self.count("refused")
            return
        assert self.device.forget(name, limits=ANY).images == self.now.classes[row].images
        self.committed("forget", self.child().without(row))

    @rule(picks=st.lists(PICKS, min_size=1, max_size=3), into=NAMES)
    def merge_labels(self, picks: list[int], into: str) -> None:
        names = [self.one_of(pick) for pick in picks]
        rows = {self.now.row(name) for name in names}
        if None in rows or (self.now.row(into) is None and len(rows) < 2) or rows == {self.now.row(into)}:
            self.refused(lambda: self.device.merge_labels(names, into, ANY))
            self.count("refused")
            return
        self.device.merge_labels(names, into, ANY)
        target = self.now.row(into)
        after = self.child()
        if target is None:
            target = self.now.row(names[0])
            after = after.named(target, into)
        for row in sorted(rows - {target}, reverse=True):
            after = after.with_images(into, self.now.classes[row].images).without(row)
        self.committed("merge labels", after)

    @rule(pick=PICKS, new=NAMES)
    def rename(self, pick: int, new: str) -> None:
        name = self.one_of(pick)
        row = self.now.row(name)
        if row is None or self.now.row(new) not in (None, row):
            self.refused(lambda: self.device.rename(name, new))
            self.count("refused")
            return
        self.device.rename(name, new)
        self.committed("rename", self.child().named(row, new))
        before = self.models[self.device.generation.parent]
        assert torch.equal(self.now.scores, before.scores)

    @rule()
    def roll_back(self) -> None:
        parent = self.now.parent
        if parent is None or parent not in self.store.numbers():
            self.refused(self.device.rollback)
            self.count("refused")
            return
        self.device.rollback()
        self.number = parent
        self.count("rollback")

    @rule(data=st.data())
    def roll_back_to(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from([*sorted(self.models)[-12:], max(self.models) + 1]))
        if number not in self.store.numbers():
            self.refused(lambda: self.device.rollback(number))
            self.count("refused")
            return
        self.device.rollback(number)
        self.number = number
        self.count("rollback to a number")

    @rule(batch=st.tuples(PICTURES, st.integers(3, 6), SEEDS), name=NAMES)
    def merge(self, batch: tuple[str, int, int], name: str) -> None:
        """Merge a device that started from the same bundle and has learned one class."""
        there = self.home / f"there-{len(self.models)}"
        bundle.install(there, self.bundle(self.now.release))
        with Device.open(there) as other:
            other.learn(name, photos(*batch), limits=ANY)
            other.export(self.home / "there.ssdedge")
        shutil.rmtree(there)
        installed = next(n for n, one in self.models.items() if (one.parent, one.release) == (None, self.now.release))
        complete = {0, 1, 2} <= {one.id for one in self.now.classes}  # all classes of the bundle
        if not complete or installed not in self.store.numbers():  # the base of the merge is missing
            self.refused(lambda: self.device.merge(self.home / "there.ssdedge", ANY))
            self.count("refused")
            return
        base = self.installed(self.now.release).row(name)
        here = name if base is None else next(one.name for one in self.now.classes if one.id == base)
        self.device.merge(self.home / "there.ssdedge", ANY)
        self.committed("merge", self.child().with_images(here, batch[1]))
        # the same images must not count twice
        self.refused(lambda: self.device.merge(self.home / "there.ssdedge", ANY))

    @rule()
    def export(self) -> None:
        self.device.export(self.home / "export.ssdedge")
        opened = bundles.read(self.home / "export.ssdedge")
        assert opened.manifest["classes"] == [one.name for one in self.now.classes]
        assert opened.read("learner") == self.now.files["learner.safetensors"]
        self.count("export")

    @rule()
    def refresh(self) -> None:
        assert self.reader.refresh() == (self.read != self.number)
        self.read = self.number
        self.count("refresh")

    @rule()
    def reopen(self) -> None:
        self.device = Device.open(self.root)
        self.count("reopen")

    @rule(bad=st.sampled_from(["", "unknown", " ", "a\nb", "x" * 65, "\u202egear"]), seed=SEEDS)
    def bad_name(self, bad: str, seed: int) -> None:
        self.refused(lambda: self.device.learn(bad, photos("gear", 3, seed)))
        if self.now.classes:
            self.refused(lambda: self.device.rename(self.now.classes[0].name, bad))
        self.count("bad name")

    @rule(count=st.integers(0, 2))
    def too_few_images(self, count: int) -> None:
        self.refused(lambda: self.device.learn("never taught", photos("gear", count)))
        self.count("too few")

    # ── invariants ───────────────────────────────────────────────────────────────────────────────
    @invariant()
    def it_is_as_the_model_says(self) -> None:
        if not self.models:
            return
        now, entries = self.store.current(), self.device.registry.entries
        assert (now.number, now.fallback, self.device.generation.number) == (self.number, "", self.number)
        assert [Known(one.id, one.name, one.images) for one in entries] == list(self.now.classes)
        assert self.device.statistics.counts.tolist() == [one.images for one in self.now.classes]
        # the generation of the reader may be pruned already
        for device, number in ((self.device, self.number), (self.reader, self.read)):
            expected = self.models[number]
            assert device.generation.number == number
            assert device.state.contents() == expected.files
            assert torch.equal(device.learner.scores(self.vectors), expected.scores)

    @invariant()
    def the_disk_holds_what_was_committed_and_no_more(self) -> None:
        if not self.models:
            return
        numbers = self.store.numbers()
        assert {self.number, max(self.models)} <= set(numbers)
        assert len(numbers) <= generations.KEEP + 3  # the current one, its fallback and the last installed one
        for number in numbers:
            digests = {name: one["sha256"] for name, one in self.store.get(number).files.items()}
            assert digests == {name: files.sha256(data) for name, data in self.models[number].files.items()}
        assert leftovers(self.root) == []
        needed = {self.store.get(number).backbone for number in numbers}
        assert needed <= {path.stem for path in self.store.backbones()}
        assert len(self.store.backbones()) <= 3  # the bundles use three different backbones
        events = self.store.journal()
        assert [one["seq"] for one in events] == sorted({one["seq"] for one in events})
        journal = (self.root / "journal.jsonl").stat().st_size
        assert journal <= 2_000 * (2 * EVENTS + 1 + len([one for one in events if one["event"] == "install"]))
        state = STORE["disk_bytes"](self.root) - journal
        assert state <= (generations.KEEP + 3) * self.largest + 3 * 2_000

    def teardown(self) -> None:
        shutil.rmtree(self.home)
        if self.models:
            self.device = self.reader = None
            gc.collect()
            type(self).seen.append((sum(self.did.values()), resident() // 2**20, len(os.listdir("/proc/self/fd"))))


@pytest.mark.parametrize(("runs", "steps", "least"), [(4, 30, 60), pytest.param(14, 120, 1000, marks=pytest.mark.slow)])
def test_random_operations(tiny_bundle, monkeypatch, runs, steps, least):
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    monkeypatch.setattr(generations, "EVENTS", EVENTS)
    options = settings(
        max_examples=runs,
        stateful_step_count=steps,
        database=None,
        phases=[Phase.generate],  # do not shrink failures, which takes minutes
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    with STORE["scratch"]() as folder:

        class Run(Devices):
            make_bundle, did, seen = staticmethod(tiny_bundle), Counter(), []

        Run.folder = folder
        run_state_machine_as_test(Run, settings=options)
    total = sum(Run.did.values())
    print(f"{total} operations: {dict(Run.did)}; operations, MiB and handles after each run: {Run.seen}")
    assert total >= least
    half = next(place for place, (done, *_) in enumerate(Run.seen) if 2 * done >= total)
    assert max(memory for _, memory, _ in Run.seen[half:]) - Run.seen[half][1] < GROWTH_MB
    assert Run.seen[-1][2] <= Run.seen[half][2]
    if least >= 1000:
        assert set(Run.did) >= ALL_OPERATIONS


ALL_OPERATIONS = {
    *("install", "learn new", "learn known", "learn several", "guard refused", "guard passed", "forget", "rename"),
    *(
        "merge labels",
        "rollback",
        "rollback to a number",
        "merge",
        "export",
        "refresh",
        "reopen",
        "bad name",
        "too few",
    ),
}
