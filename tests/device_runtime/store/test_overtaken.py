"""Readers take no lock; a generation pruned while it is opened or read is not reported as damaged."""

from __future__ import annotations

import os

import pytest
from helpers import store_standins

from device_runtime.device import Device
from device_runtime.install import bundle
from device_runtime.store import generations
from device_runtime.store.generations import Generations
from device_runtime.store.record import Generation
from ssd_edge.answers.head import Head
from ssd_edge.errors import BundleRefusedError, EnvironmentUnfitError

STORE = vars(store_standins)
contents = STORE["contents"]


@pytest.fixture
def store(tmp_path, monkeypatch):
    """Return a store with generation 1 installed and generations 2 and 3 learned."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    return STORE["three"](tmp_path / "root")


def overtake(monkeypatch, reader: Generations, times: int) -> None:
    """Let another process prune the current generation just before the reader opens it, `times` times."""
    real, left = Generations.open, iter(range(times))

    def overtaken(self: Generations, number: int) -> object:
        if self is reader and number == reader.pointer() and next(left, None) is not None:
            writer = Generations(reader.root)
            for _ in range(2):
                STORE["learn"](writer, 9.0)
            STORE["prune"](writer, keep=1)
        return real(self, number)

    monkeypatch.setattr(Generations, "open", overtaken)


def test_a_generation_pruned_while_opened_is_not_damaged(store, monkeypatch, caplog):
    overtake(monkeypatch, store, times=3)
    got = store.current()
    assert (got.number, got.fallback, caplog.text) == (9, "", "")
    assert store.numbers() == [1, 8, 9]
    overtake(monkeypatch, store, times=1)
    assert [(one.number, one.intact) for one in store.list()] == [(1, True), (8, True)]
    assert store.numbers() == [1, 10, 11]


def test_a_reader_gives_up_after_five_attempts(store, monkeypatch):
    overtake(monkeypatch, store, times=99)
    with pytest.raises(EnvironmentUnfitError, match=r"was replaced 5 times while it was read; .* try again"):
        store.current()


def test_a_generation_pruned_while_read_is_read_again(store):
    read = []

    def state(generation: Generation) -> dict[str, bytes]:
        read.append(generation.number)
        if len(read) == 1:
            for _ in range(2):
                STORE["learn"](Generations(store.root), 9.0)
            STORE["prune"](Generations(store.root), keep=1)
        return contents(generation)

    assert store.read_current(state) == STORE["state"](9.0)
    assert read == [3, 5]


def test_damage_during_a_read_is_reported(store):
    def state(generation: Generation) -> bytes:
        STORE["flip"](generation.path / "learner.safetensors")
        return generation.read("learner.safetensors")

    with pytest.raises(BundleRefusedError, match="is damaged: its sha256"):
        store.read_current(state)


@pytest.mark.parametrize("refresh", [False, True])
def test_device_reads_while_another_process_prunes(tiny_bundle, tmp_path, monkeypatch, caplog, refresh):
    """Another process commits and prunes the generation being read; no warning is logged and no fallback is used."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    monkeypatch.setattr(generations, "KEEP", 1)
    (tmp_path / "tiny.ssdedge").write_bytes(tiny_bundle())
    root = tmp_path / "root"
    bundle.install(root, tmp_path / "tiny.ssdedge")
    writer, reader = Device.open(root), Device.open(root)
    writer.rename("cup", "mug")
    real, overtaken = Head.parse, []

    def parse(data):
        if not overtaken:
            overtaken.append(True)
            writer.rename("mug", "cup")
            writer.rename("cup", "beaker")
            assert not writer.store.folder(2).exists()
        return real(data)

    monkeypatch.setattr(Head, "parse", parse)  # read before the thresholds
    if refresh:
        assert reader.refresh()
    else:
        reader = Device.open(root)
    assert (reader.generation.number, reader.generation.fallback, reader.classes[0]) == (4, "", "beaker")
    assert not [record for record in caplog.records if "used instead" in record.message]
