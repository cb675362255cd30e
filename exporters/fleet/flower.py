"""The Flower apps of a fleet: a client that answers with sums, and a server that adds them.

A SuperNode answers for the devices that its ``--node-config`` names; the server's run configuration names the common
bundle, the ledger and the bundle to write. Both are in docs/fleet.md. Everything else is in `gateway`.
"""

from __future__ import annotations

import functools
import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from device_runtime.learning import contribution
from device_runtime.learning.guard import Limits
from device_runtime.learning.state import DeviceState
from device_runtime.store.generations import Generations
from exporters.fleet.gateway import Gateway, Reply, exported
from ssd_edge import bundle as bundles
from ssd_edge import files
from ssd_edge.errors import InputError, SSDEdgeError, printable, require

LEAST_IMAGES = 5  # of a class, below which a client sends nothing of it; docs/fleet.md says why
AT_ONCE = 64  # nodes asked at once: their answers are in memory together
SUMS, ABOUT = "sums", "about"
_LOG = logging.getLogger("flwr")


def client_app(answer: Callable[[Any], Iterable[Reply]] | None = None) -> Any:
    """Return a Flower ClientApp that answers a query with the sums of its devices.

    Args:
        answer: Returns the answers of the devices of a node, from its Flower context; None: those of `devices` in the
            folder or file that its node configuration names.

    Raises:
        EnvironmentUnfitError: Flower is not installed.
    """
    _flower()
    from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
    from flwr.clientapp import ClientApp

    app, answers = ClientApp(), answer or _configured

    def query(message: Any, context: Any) -> Any:
        records = {}
        for number, reply in enumerate(answers(context)):
            said = {"who": reply.who, "problem": reply.problem, "about": json.dumps(reply.about)}
            records[f"{number}.{ABOUT}"] = ConfigRecord(said)
            if reply.arrays is not None:
                arrays = {name: _array(array) for name, array in reply.arrays.items()}
                records[f"{number}.{SUMS}"] = ArrayRecord(arrays)
        return Message(RecordDict(records), reply_to=message)

    app.query()(query)
    return app


def server_app(base: Path | None = None, **settings: Any) -> Any:
    """Return a Flower ServerApp that asks all nodes once, adds what they answer and writes a bundle.

    Args:
        base: The common bundle; None: it is in the run configuration, as are the settings.
        settings: ``ledger``, ``output``, ``sign``, ``timeout``, ``nodes``, ``at-once`` and ``max-forgetting`` of the
            run configuration, which has precedence.

    Raises:
        EnvironmentUnfitError: Flower is not installed.
    """
    _flower()
    from flwr.serverapp import ServerApp

    app = ServerApp()

    def main(grid: Any, context: Any) -> None:
        chosen = {"base": "" if base is None else str(base), **settings, **context.run_config}
        missing = [key for key in ("base", "ledger", "output") if not chosen.get(key)]
        if missing:
            raise InputError(f"the run configuration names no {', '.join(missing)}; see docs/fleet.md")
        gateway = Gateway(Path(chosen["ledger"]), bundles.read(Path(chosen["base"]), allow_control_flow=True))
        timeout = float(chosen.get("timeout", 600))
        nodes = _wait_for(grid, int(chosen.get("nodes", 1)), timeout)
        found = gateway.gather(ask(grid, nodes, timeout, int(chosen.get("at-once", AT_ONCE))))
        for line in found.lines():
            _LOG.info("%s", printable(line))
        key = Path(chosen["sign"]) if chosen.get("sign") else None
        limits = Limits(float(chosen.get("max-forgetting", Limits.max_forgetting)))
        for line in gateway.issue(Path(chosen["output"]), key, limits).lines():
            _LOG.info("%s", printable(line))

    app.main()(main)
    return app


def ask(grid: Any, nodes: Sequence[int], timeout: float, at_once: int = AT_ONCE) -> Iterator[Reply]:
    """Ask nodes, some at a time, and yield the answers of their devices.

    Args:
        grid: Flower's grid.
        nodes: Node ids.
        timeout: Seconds after which nodes that were asked together count as late.
        at_once: How many are asked together.
    """
    from flwr.app import Message, MessageType, RecordDict

    for start in range(0, len(nodes), at_once):
        asked = nodes[start : start + at_once]
        messages = [Message(RecordDict(), dst_node_id=node, message_type=MessageType.QUERY) for node in asked]
        answered = set()
        for message in grid.send_and_receive(messages, timeout=timeout):
            node = message.metadata.src_node_id
            answered.add(node)
            if message.has_error():
                lines = ["it failed", *str(message.error.reason or "").splitlines()]
                yield Reply(f"node {node}", problem=[line for line in lines if line.strip()][-1])  # of a traceback
            else:
                yield from read(message.content, f"node {node}")
        yield from (Reply(f"node {node}", problem="no answer", late=True) for node in asked if node not in answered)


def read(content: Any, node: str) -> Iterator[Reply]:
    """Yield the answers in a message of `client_app`. What cannot be read is passed on, to be refused by name.

    Args:
        content: Flower's RecordDict.
        node: Name of the node.
    """
    for name, said in content.config_records.items():
        who = f"{node}: {said['who']}" if said.get("who") else node
        sums = content.array_records.get(f"{name.removesuffix(ABOUT)}{SUMS}")
        if sums is None:
            yield Reply(who, problem=str(said.get("problem") or "it sent nothing"))
            continue
        try:
            yield Reply(who, {key: array.numpy() for key, array in sums.items()}, json.loads(str(said.get("about"))))
        except (ValueError, TypeError, EOFError, OSError) as error:  # bytes that are no array
            yield Reply(who, {}, f"unreadable: {error}")


def devices(path: Path, base: Path | None = None, least: int = LEAST_IMAGES) -> Iterator[Reply]:
    """Yield what devices have learned since their bundles.

    Args:
        path: The root of a device, a bundle that a device has exported, or a folder with any number of them.
        base: The bundle that the devices had installed; needed for exported bundles.
        least: Smallest number of images of a class that is sent.
    """
    if files.is_folder(path) and not files.exists(path / "CURRENT"):
        for one in files.list_folder(path):
            if files.is_folder(one) or one.suffix == ".ssdedge":
                yield from devices(one, base, least)
        return
    try:
        if files.is_folder(path):
            part, state = contribution.of_store(Generations(path))
        elif base is None:
            raise InputError(f"{path} is an exported bundle; name the one that the device had installed as base")
        else:
            state = _state_of(base)
            part = exported(path, {state.bundle.bundle_sha256: state})
        part = part.without_few(least, state)
    except SSDEdgeError as error:
        yield Reply(path.name, problem=str(error))
    else:
        yield Reply(path.name, part.to_arrays(), part.about())


@functools.lru_cache(maxsize=2)
def _state_of(bundle: Path) -> DeviceState:
    return DeviceState.of_bundle(bundles.read(bundle, allow_control_flow=True))


def _configured(context: Any) -> Iterator[Reply]:
    """Yield the answers of the devices that a node configuration names."""
    chosen = context.node_config
    if not chosen.get("devices"):
        raise InputError("this SuperNode names no devices; start it with --node-config 'devices=\"FOLDER\"'")
    base = Path(chosen["base"]) if chosen.get("base") else None
    return devices(Path(chosen["devices"]), base, int(chosen.get("least-images", LEAST_IMAGES)))


def _array(array: Any) -> Any:
    from flwr.app import Array

    return Array.from_numpy_ndarray(array)


def _wait_for(grid: Any, count: int, timeout: float) -> list[int]:
    """Return the ids of all nodes, once there are `count` or the time is over."""
    until = time.monotonic() + timeout
    while len(nodes := sorted(grid.get_node_ids())) < count and time.monotonic() < until:
        time.sleep(0.5)
    return nodes


def _flower() -> None:
    require("flwr", "fleet", "ask devices with Flower")
