"""Random sequences of commits, rollbacks, prunes, repairs, crashes and damage, compared with a dictionary."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import pytest
from helpers import store_standins
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from device_runtime.store import fsck
from device_runtime.store.generations import Generations
from ssd_edge import files
from ssd_edge.errors import InputError

STORE = vars(store_standins)
contents, state = STORE["contents"], STORE["state"]
KEEP = 3


@pytest.fixture(autouse=True)
def _skip_fsync(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda handle: None)


class Store(RuleBasedStateMachine):
    """Store under test, with a model of all committed states and the current generation."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.mkdtemp()
        self.store = Generations(Path(self.folder) / "root")
        self.committed: dict[int, dict[str, bytes]] = {}
        self.pruned: set[int] = set()
        self.current = 0

    @initialize()
    def first(self) -> None:
        self.install(b"first")

    @rule(backbone=st.sampled_from([b"first", b"second", b"third"]))
    def install(self, backbone: bytes) -> None:
        self._record_commit(STORE["install"](self.store, float(len(self.committed)), backbone).number)

    @rule()
    def learn(self) -> None:
        parent = self.current
        learned = STORE["learn"](self.store, float(len(self.committed)))
        assert learned.parent == parent
        self._record_commit(learned.number)

    def _record_commit(self, number: int) -> None:
        assert number > max(self.committed, default=0)  # numbers are never reused
        self.committed[number] = state(float(len(self.committed)))
        self.current = number

    @rule(data=st.data())
    def roll_back(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.committed)))
        if number in self.pruned:
            with pytest.raises(InputError, match=f"generation {number} was pruned"):
                STORE["roll_back"](self.store, number)
            return
        STORE["roll_back"](self.store, number)
        self.current = number

    @rule(keep=st.integers(1, KEEP), budget=st.one_of(st.none(), st.integers(0, 20_000)))
    def prune(self, keep: int, budget: int | None) -> None:
        before = self.store.numbers()
        pruned = STORE["prune"](self.store, keep, budget)
        assert self.store.numbers() == sorted(set(before) - set(pruned.generations))
        assert not {self.current, before[-1]} & set(pruned.generations)
        self.pruned |= set(pruned.generations)
        assert len(before) - len(pruned.generations) <= keep + 3
        assert len(list(self.store.root.rglob("*"))) <= 6 + 4 * (keep + 3) + 3  # bounded, however much was learned

    @rule(step=st.integers(0, 30))
    def cut(self, step: int) -> None:
        """Interrupt a learn before a step; it must be committed or not."""
        steps = iter(range(1000))

        def hook(name: str, path: Path) -> None:
            if next(steps) >= step:  # also fails the cleanup
                raise KeyboardInterrupt

        files.fault_hook = hook
        value = float(len(self.committed))
        try:
            STORE["learn"](self.store, value)
        except KeyboardInterrupt:
            pass
        finally:
            files.fault_hook = None
        for number in set(self.store.numbers()) - set(self.committed):
            self.committed[number] = state(value)
        self.current = self.store.current().number

    @rule()
    def lose_the_pointer(self) -> None:
        STORE["flip"](self.store.root / "CURRENT")
        assert contents(self.store.current())
        found = fsck.repair(self.store)
        assert ("CURRENT", True) in [(one.path, one.repaired) for one in found]
        # After a crash between CURRENT and the journal, the journal lacks the event until the next write.
        self.current = self.store.current().number

    @rule()
    def repair(self) -> None:
        before = self.store.numbers()
        fsck.repair(self.store)
        assert self.store.numbers() == before
        assert {one.severity for one in fsck.check(self.store)} <= {"note"}

    @invariant()
    def what_is_there_was_committed(self) -> None:
        if not self.committed:
            return
        now = self.store.current()
        assert (now.number, now.fallback) == (self.current, "")
        for number in self.store.numbers():
            generation = self.store.get(number)
            assert contents(generation) == self.committed[number]
            self.store.backbone_path(generation.backbone)
        assert set(self.committed) == self.pruned | set(self.store.numbers())
        seqs = [event["seq"] for event in self.store.journal()]
        assert seqs == sorted(set(seqs))

    def teardown(self) -> None:
        shutil.rmtree(self.folder)


@pytest.mark.parametrize(("runs", "steps"), [(5, 20), pytest.param(20, 50, marks=pytest.mark.slow)])
def test_random_operations(runs, steps):
    suppressed = [HealthCheck.too_slow, HealthCheck.data_too_large]
    options = settings(
        max_examples=runs,
        stateful_step_count=steps,
        database=None,
        suppress_health_check=suppressed,
    )
    run_state_machine_as_test(Store, settings=options)
