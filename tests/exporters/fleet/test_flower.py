"""The Flower apps: what a node answers, what the server makes of it, and both in Flower's own simulation."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from helpers.fleet import Device, common_bundle, export, vectors, write

from exporters.fleet import flower
from exporters.fleet.gateway import Gateway, Reply
from ssd_edge import bundle as bundles
from ssd_edge.errors import EnvironmentUnfitError, InputError

KINDS = ("wedge", "bolt", "pin")


@pytest.fixture(scope="module")
def common() -> bundles.Bundle:
    return common_bundle()


@pytest.fixture
def folder(common, tmp_path) -> Path:
    """Return a folder with what three devices have exported, one of which has few images of a class."""
    (tmp_path / "exported").mkdir()
    for number, kind in enumerate(KINDS):
        images = {kind: vectors(kind, 9 if number else 4)}
        export(Device(common, kind).learn(images), common, tmp_path / "exported")
    write(common, tmp_path / "common.ssdedge")
    return tmp_path / "exported"


def test_a_node_answers_for_a_folder_of_devices(common, folder):
    found = list(flower.devices(folder, folder.parent / "common.ssdedge"))
    assert [reply.who for reply in found] == ["bolt.ssdedge", "pin.ssdedge", "wedge.ssdedge"]
    assert [list(reply.about["classes"]) for reply in found[:2]] == [["bolt"], ["pin"]]
    assert found[2].arrays is None
    assert "wedge has fewer than 5 images" in found[2].problem
    (alone,) = flower.devices(folder / "bolt.ssdedge")
    assert "name the one that the device had installed" in alone.problem


def test_without_flower_one_sentence_says_so(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "flwr", None)
    with pytest.raises(EnvironmentUnfitError, match=r"flwr.*ssd-edge\[fleet\]"):
        flower.client_app()


@pytest.fixture
def flwr(monkeypatch):
    """Pretend that a task of Flower runs in this process: without one, no message can be made."""
    pytest.importorskip("flwr", reason="Flower is not installed; its layer is not tested (docs/fleet.md)")
    from flwr.supercore.task_identity import TaskIdentity

    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


def test_a_query_is_answered_and_read(flwr, common, folder):
    from flwr.app import ConfigRecord, Context, Message, RecordDict

    context = Context(
        run_id=1, node_id=7, state=RecordDict(), run_config={},
        node_config={"devices": str(folder), "base": str(folder.parent / "common.ssdedge"), "least-images": 4},
    )  # fmt: skip
    asked = Message(RecordDict(), dst_node_id=7, message_type="query")
    answer = flower.client_app()(asked, context).content
    found = list(flower.read(answer, "node 7"))
    assert [reply.who for reply in found] == [f"node 7: {kind}.ssdedge" for kind in ("bolt", "pin", "wedge")]
    gateway = Gateway(folder.parent / "ledger", common)
    assert len(gateway.gather(found).counted) == 3
    answer["0.sums"]["scores"].data = b"no array"
    answer["1.about"]["about"] = "{"
    answer["3.about"] = ConfigRecord({"x": 1})
    refused = Gateway(folder.parent / "other", common).gather(flower.read(answer, "node 7"))
    assert len(refused.counted) == 1
    assert set(refused.refused) == {"node 7: bolt.ssdedge", "node 7: pin.ssdedge"}
    assert refused.failed == {"node 7": "it sent nothing"}
    context.node_config.clear()
    with pytest.raises(InputError, match="names no devices"):
        flower.client_app()(asked, context)


@pytest.mark.slow
def test_a_simulated_fleet_is_one_device_that_was_taught_everything(common, tmp_path, monkeypatch):
    pytest.importorskip("ray", reason="Flower's simulation is not installed; it is not tested (docs/fleet.md)")
    pytest.importorskip("flwr", reason="Flower is not installed; its layer is not tested (docs/fleet.md)")
    from flwr.simulation import run_simulation

    write(common, tmp_path / "common.ssdedge")
    nodes = 30
    path = str(tmp_path / "common.ssdedge")

    def images(node: int) -> dict[str, np.ndarray]:
        return {KINDS[node % len(KINDS)]: vectors(KINDS[node % len(KINDS)], 6, node)}

    def answer(context):
        node = int(context.node_config["partition-id"])
        if node % 10 == 9:
            raise RuntimeError(f"camera {node} is broken")
        reply = Device(bundles.read(path), f"camera-{node}").learn(images(node)).reply()
        if node == 3:
            reply.arrays["learner.sums"][:] = np.nan
        return [reply, reply] if node == 4 else [reply]

    settings = {"ledger": str(tmp_path / "ledger"), "output": str(tmp_path / "fleet.ssdedge"), "max-forgetting": 1.0}
    server = flower.server_app(tmp_path / "common.ssdedge", **settings, nodes=nodes, timeout=300)
    backend = {"init_args": {"num_cpus": 2}, "client_resources": {"num_cpus": 1, "num_gpus": 0.0}}
    run_simulation(server, flower.client_app(answer), num_supernodes=nodes, backend_config=backend)
    report = json.loads((tmp_path / "ledger" / "round-000001.json").read_text())
    assert len(report["counted"]) == 26
    assert len(report["failed"]) == 3
    assert len(report["refused"]) == len(report["repeated"]) == 1
    one = Device(common, "all")
    for node in range(nodes):
        if node % 10 != 9 and node != 3:
            one.learn(images(node))
    found = bundles.read(tmp_path / "fleet.ssdedge")
    assert {e.name: e.images for e in found.registry.entries} == {e.name: e.images for e in one.state.registry.entries}


def test_nodes_are_asked_a_few_at_a_time(flwr):
    asked = []

    class Grid:
        def send_and_receive(self, messages, timeout):
            asked.append(len(messages))
            return []

    found = list(flower.ask(Grid(), range(1, 8), 1.0, at_once=3))
    assert asked == [3, 3, 1]
    assert found[0] == Reply("node 1", problem="no answer", late=True)
    assert len(found) == 7
