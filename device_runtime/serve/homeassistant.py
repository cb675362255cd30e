"""Discovery by Home Assistant over MQTT: one retained message describes the device and all its entities.

https://www.home-assistant.io/integrations/mqtt/#device-discovery-payload
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from ssd_edge.classes import MAX_NAME_LENGTH
from ssd_edge.system import VERSION


def safe(text: str) -> str:
    """Return text as one level of a topic: letters, digits, ``-`` and ``_``, at most 64 of them."""
    return re.sub(r"[^A-Za-z0-9_-]", "_", text)[:64] or "_"


def node(prefix: str) -> str:
    """Return what identifies a device by the prefix of its topics."""
    return f"ssd_edge_{safe(prefix)}"


def topic(prefix: str) -> str:
    """Return the topic of the message."""
    return f"homeassistant/device/{node(prefix)}/config"


def discovery(prefix: str, model: str, cameras: Sequence[str], frames: tuple[int, int] | None) -> dict[str, Any]:
    """Return the message.

    Args:
        prefix: What all topics begin with.
        model: Name of the bundle.
        cameras: Ids of the cameras.
        frames: Least and most frames that a command teaches; None if commands are switched off.
    """
    own = node(prefix)
    entities: dict[str, dict[str, Any]] = {
        "generation": {
            "platform": "sensor",
            "name": "Generation",
            "icon": "mdi:history",
            "entity_category": "diagnostic",
            "state_topic": f"{prefix}/state",
            "value_template": "{{ value_json.generation }}",
        },
        "drift": {
            "platform": "binary_sensor",
            "name": "Drift",
            "device_class": "problem",
            "entity_category": "diagnostic",
            "state_topic": f"{prefix}/state",
            "value_template": "{{ 'ON' if value_json.drift == 'drifted' else 'OFF' }}",
            "json_attributes_topic": f"{prefix}/state",
        },
    }
    for camera in cameras:
        there = [{"topic": f"{prefix}/available"}, {"topic": f"{prefix}/{camera}/available"}]
        shared = {
            "platform": "sensor",
            "state_topic": f"{prefix}/{camera}/state",
            "availability": there,
            "availability_mode": "all",
        }
        entities[f"{camera}_answer"] = {
            **shared,
            "name": f"Camera {camera}",
            "icon": "mdi:shape",
            "value_template": "{{ value_json.label }}",
            "json_attributes_topic": f"{prefix}/{camera}/state",
        }
        entities[f"{camera}_score"] = {
            **shared,
            "name": f"Camera {camera} score",
            "icon": "mdi:percent",
            "unit_of_measurement": "%",
            "state_class": "measurement",
            "value_template": "{{ none if value_json.score is none else (100 * value_json.score) | round(1) }}",
        }
    if frames is not None:
        entities |= _commands(prefix, cameras, frames)
    for name, entity in entities.items():
        entity["unique_id"] = f"{own}_{name}"
    return {
        "device": {
            "identifiers": [own],
            "name": f"SSD-Edge {prefix.rpartition('/')[2]}",
            "manufacturer": "SSD-Edge",
            "model": model,
            "sw_version": VERSION,
        },
        "origin": {"name": "SSD-Edge", "sw_version": VERSION},
        "availability": [{"topic": f"{prefix}/available"}],
        "components": entities,
    }


def _commands(prefix: str, cameras: Sequence[str], frames: tuple[int, int]) -> dict[str, dict[str, Any]]:
    """Return the entities that change the device."""
    entities: dict[str, dict[str, Any]] = {
        "rollback": {
            "platform": "button",
            "name": "Undo the last change",
            "icon": "mdi:undo",
            "command_topic": f"{prefix}/command/rollback",
            "payload_press": "{}",
        },
        "frames": {
            "platform": "number",
            "name": "Frames to teach",
            "icon": "mdi:image-multiple",
            "min": frames[0],
            "max": frames[1],
            "step": 1,
            "mode": "box",
            "command_topic": f"{prefix}/command/frames",
            "state_topic": f"{prefix}/state",
            "value_template": "{{ value_json.frames }}",
        },
        "result": {
            "platform": "sensor",
            "name": "Last command",
            "icon": "mdi:message-text",
            "state_topic": f"{prefix}/command/result",
            "value_template": "{{ value_json.message[:250] }}",  # a state has at most 255 characters
            "json_attributes_topic": f"{prefix}/command/result",
        },
    }
    for camera in cameras:
        entities[f"{camera}_teach"] = {
            "platform": "text",
            "name": f"Teach what camera {camera} shows",
            "icon": "mdi:school",
            "max": MAX_NAME_LENGTH,
            "command_topic": f"{prefix}/command/teach",
            "command_template": '{"label": {{ value | tojson }}, "camera": "' + camera + '"}',
        }
    return entities
