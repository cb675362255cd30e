"""Recognition of each class, as far as held-out images tell."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

from device_runtime.device import Device, Snapshot
from device_runtime.learning.export import lineage

RECORD = "record.safetensors"


class Recognition:
    """Held-out results of the classes of the current generation, read once for each.

    Args:
        device: An open device.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._lock = threading.Lock()
        self._found: tuple[Snapshot, dict[str, Any]] | None = None

    def classes(self) -> dict[str, Any]:
        """Return the classes as JSON values.

        ``recognised`` counts the held-out images of a class's latest learn, or of the bundle, that were answered with
        it, ``confused`` those that were answered with another class. None if no image was held out.
        """
        with self._lock:
            snapshot = self._device.snapshot
            if self._found is None or self._found[0] is not snapshot:
                self._found = snapshot, _classes(self._device, snapshot)
            return self._found[1]


def _classes(device: Device, snapshot: Snapshot) -> dict[str, Any]:
    generation, names = snapshot.generation, snapshot.registry.names
    learned = _latest(device, snapshot)
    tested: list[float] = [0.0] * len(names)
    nearest = tested
    if RECORD in generation.files:
        record, _ = generation.tensors(RECORD)
        tested, nearest = record["tested"].tolist(), record["nearest"].tolist()
    classes = []
    for row, entry in enumerate(snapshot.registry.entries):
        recognised = {"images": int(tested[row]), "right": int(nearest[row])} if tested[row] else None
        confused: Mapping[str, int] = {}
        if entry.name in learned:
            recognised, confused = learned[entry.name]
        classes.append(
            {
                "name": entry.name,
                "images": entry.images,
                "origin": "device" if entry.origin == "device" else "bundle",
                "recognised": recognised,
                "confused": [{"with": name, "images": images} for name, images in confused.items()],
            }
        )
    return {"generation": generation.number, "classes": classes}


def _latest(device: Device, snapshot: Snapshot) -> dict[str, tuple[dict[str, int] | None, dict[str, int]]]:
    """Return what the latest learn of each class says about it, by the present names of the classes.

    A class that has been merged from several since has none: its record counts what is known of all of them.
    """
    now = {name: name for name in snapshot.registry.names}  # name at the time of a change → name now
    found: dict[str, tuple[dict[str, int] | None, dict[str, int]]] = {}
    for event in lineage(device.store.journal(), snapshot.generation):  # newest first
        info = event.get("info") or {}
        if "renamed" in info:
            before, after = info["renamed"]
            if after in now:
                now[before] = now.pop(after)
        elif "merged_labels" in info:
            now.pop(info["into"], None)
        elif "forgot" in info:
            now.pop(info["forgot"], None)  # a class of that name now is another one
        elif "merged" not in info:
            taught = info.get("taught", ())
            for one in taught:
                name, held = now.get(one["label"]), one.get("held_out")
                if name is not None and name not in found and held is not None and held["images"]:
                    images = held["images"]
                    others = {now[other]: n for other, n in (one.get("confused") or {}).items() if other in now}
                    found[name] = {"images": images, "right": round(images * held["accuracy"])}, others
            for one in taught:
                if one["new"]:
                    now.pop(one["label"], None)
    return found
