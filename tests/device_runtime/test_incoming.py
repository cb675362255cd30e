"""What a sender announces is not believed; what pushes leave behind is bounded."""

from __future__ import annotations

import json
import os
import time
from typing import Any

import pytest

from device_runtime import incoming
from ssd_edge import files
from ssd_edge.bundle import container
from ssd_edge.errors import BundleRefusedError

ENTRIES = {"backbone.onnx": bytes(range(256)) * 8, "classes.json": b"{}\n"}
BACKBONE = files.sha256(ENTRIES["backbone.onnx"])


def offered(entries: dict[str, bytes], /, **changes: Any) -> dict[str, Any]:
    listed = [{"path": p, "sha256": files.sha256(d), "size": len(d)} for p, d in entries.items()]
    size = sum(map(len, container.blocks(entries)))
    return {"bundle": "0" * 64, "size": size, "name": "robot.ssdedge", "entries": listed, **changes}


def line(value: Any) -> bytes:
    return json.dumps(value).encode()


WRONG = {
    "no JSON": b"hello",
    "no object": b"[1]",
    "deep": b"[" * 30_000,
    "an absolute path": line(offered({"/etc/x.txt": b"x"})),
    "a path that goes up": line(offered({"../x.txt": b"x"})),
    "too many": line(offered({f"{n}.txt": b"" for n in range(65)})),
    "twice": line(offered(ENTRIES, entries=offered(ENTRIES)["entries"] * 2)),
    "two sizes": line(
        offered(ENTRIES, entries=[{"path": f"{n}.txt", "sha256": BACKBONE, "size": n} for n in range(2)])
    ),
    "too large": line(offered(ENTRIES, size=container.MAX_BYTES + 1)),
    "smaller than its entries": line(offered(ENTRIES, size=10)),
    "a negative size": line(offered(ENTRIES, entries=[{"path": "a.txt", "sha256": BACKBONE, "size": -1}])),
    "a size of truth": line(offered(ENTRIES, entries=[{"path": "a.txt", "sha256": BACKBONE, "size": True}])),
    "a digest that is a path": line(
        offered(ENTRIES, entries=[{"path": "a.txt", "sha256": "../" * 21 + "x", "size": 1}])
    ),
    "no digest": line(offered(ENTRIES, bundle=7)),
    "no bundle": line({"entries": []}),
    "entries of numbers": line(offered(ENTRIES, entries=[1, 2])),
}


@pytest.mark.parametrize("offer", WRONG.values(), ids=WRONG)
def test_a_hostile_offer_is_refused(offer):
    with pytest.raises(BundleRefusedError) as refused:
        incoming.parse_offer(offer)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 400


def test_an_offer_without_mistakes_is_read():
    offer = incoming.parse_offer(line(offered({**ENTRIES, "again.json": b"{}\n"}, retry=1, allow_downgrade=True)))
    assert offer.paths["again.json"] == offer.paths["classes.json"]
    assert offer.sizes == {BACKBONE: 2048, files.sha256(b"{}\n"): 3}
    assert (offer.retry, offer.allow_downgrade) == (False, True)  # 1 is not true


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("robot.ssdedge", "robot.ssdedge"),
        ("../../etc/passwd", "_.._etc_passwd.ssdedge"),
        ("..", "pushed.ssdedge"),
        ("-rf.ssdedge", "rf.ssdedge"),
        ("x" * 500, "x" * 128 + ".ssdedge"),
        ("Ärger\x1b[0m", "_rger__0m.ssdedge"),
        (None, "None.ssdedge"),
    ],
)
def test_a_name_from_the_sender_is_never_a_path(name, kept):
    assert incoming.parse_offer(line(offered(ENTRIES, name=name))).name == kept


@pytest.mark.parametrize(
    ("leftovers", "stay"),
    [
        ([(1.0, 10), (1.0, 20), (1.0, 30)], {0, 1}),  # twice the size of this bundle, the newest first
        ([(0.1, 10), (0.1, incoming.KEEP + 60), (0.1, incoming.KEEP - 60)], {0, 2}),
    ],
)
def test_leftovers_of_other_pushes_go(tmp_path, leftovers, stay):
    offer, here = incoming.parse_offer(line(offered(ENTRIES))), incoming.Incoming(tmp_path)
    now = time.time()
    for number, (share, age) in enumerate(leftovers):
        path = here.folder / (f"{number:064x}" + ".part" * (number % 2))
        path.write_bytes(bytes(int(share * offer.size)))
        os.utime(path, (now - age, now - age))
    for name in ("old.ssdedge", f"{files.TEMPORARY_PREFIX}x", f"{BACKBONE}.part"):
        (here.folder / name).write_bytes(b"x")
    here.tidy(offer)
    stays = {path.name.removesuffix(".part") for path in here.folder.iterdir()}
    assert stays == {f"{number:064x}" for number in stay} | {BACKBONE}
