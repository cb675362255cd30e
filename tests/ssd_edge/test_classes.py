"""Class names and the registry."""

from __future__ import annotations

import json
from typing import Any

import pytest

from ssd_edge.classes import ClassEntry, ClassRegistry, normalise_name
from ssd_edge.errors import BundleRefusedError, InputError


def test_names_are_normalised() -> None:
    assert normalise_name("  A\u0308pfel ") == "\u00c4pfel"
    assert normalise_name("犬 🐕") == "犬 🐕"
    assert normalise_name("x" * 64) == "x" * 64


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "a class name is empty"),
        (" \t ", "a class name is empty"),
        ("Unknown", r"the class name 'Unknown' is reserved for images of no known class"),
        ("x" * 65, "has 65 characters, but at most 64 are allowed"),
        ("a\nb", r"'a\\nb' contains the control character U\+000A; remove it"),
        ("a\x1b[31m", r"contains the control character U\+001B"),
        (
            "a\u202eb",
            r"contains the control character U\+202E",
        ),  # a control character that reverses the surrounding text
        ("a\u2028b", r"contains the control character U\+2028"),
        ("a\udc80", r"the class name 'a\\udc80' is not valid UTF-8; rename the folder"),  # from a file name
        ("\u3164", r"contains the invisible character U\+3164; remove it"),  # Hangul filler
        ("\u2800", r"contains the invisible character U\+2800; remove it"),  # the Braille pattern without dots
        ("gear\uffa0", r"contains the invisible character U\+FFA0"),
        ("gear\U000e0041", r"contains the invisible character U\+E0041|control character U\+E0041"),
        ("gear\u034f", r"contains the invisible character U\+034F"),
        ("\u200b", r"contains the control character U\+200B"),
        ("\u00a0\u3000", "a class name is empty"),
        ("\u0301\ufe0f", "a class name is empty"),
    ],
)
def test_refused_names(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        normalise_name(name)
    str(caught.value).encode()  # the message is printable


@pytest.mark.parametrize(
    "name",
    [
        "ｕｎｋｎｏｗｎ",
        "unkn\u043ewn",  # a Cyrillic o
        "un\u043an\u043ewn",
        "\u03c5\u03b7\u03ba\u03b7\u03bf\u03c9\u03b7",  # Greek
        "U\u039d\u039aN\u041eWN",  # Greek and Cyrillic capitals
        "𝐮𝐧𝐤𝐧𝐨𝐰𝐧",
        "ⓤⓝⓚⓝⓞⓦⓝ",
        "unkn0wn",
        "ünknöwn",
        "un known",
        "u\u0332nknown",
    ],
)
def test_names_that_look_like_the_reserved_one_are_refused(name: str) -> None:
    with pytest.raises(InputError, match="looks like 'unknown', which is reserved"):
        normalise_name(name)


@pytest.mark.parametrize(
    "name", ["unknown part", "unknowns", "known", "неизвестно", "неизвестный", "άγνωστο", "不明", "w"]
)
def test_names_that_only_remind_of_it_are_kept(name: str) -> None:
    assert normalise_name(name) == name


def test_variation_selectors_are_dropped() -> None:
    assert normalise_name("☕\ufe0f") == normalise_name("☕") == "☕"


def test_add_and_row() -> None:
    empty = ClassRegistry()
    registry = empty.add("cat", images=5).add(" dog ", origin="device")
    assert len(empty) == 0
    assert registry.names == ["cat", "dog"]
    assert registry.entries == (ClassEntry(0, "cat", "base", 5), ClassEntry(1, "dog", "device", 0))
    assert (registry.row("dog "), registry.row("cow")) == (1, None)
    with pytest.raises(InputError, match=r"the class 'cat' exists already; choose another name\. Known: cat"):
        registry.add("cat")
    with pytest.raises(InputError, match="is reserved"):
        registry.add("unknown")


def test_ids_are_never_reused() -> None:
    registry = ClassRegistry().add("cat").add("dog")
    without_dog = ClassRegistry(registry.entries[:1], registry.next_id)
    assert ClassRegistry.from_json(without_dog.to_json()).add("cow").entries[1].id == 2


def test_repeated_entries() -> None:
    for entries in ([ClassEntry(0, "a"), ClassEntry(0, "b")], [ClassEntry(0, "a"), ClassEntry(1, "a")]):
        with pytest.raises(InputError, match="must not repeat"):
            ClassRegistry(entries)


def test_json_round_trip() -> None:
    registry = ClassRegistry().add("Äpfel", images=3).add("犬", origin="device")
    restored = ClassRegistry.from_json(json.loads(json.dumps(registry.to_json())))
    assert (restored.entries, restored.next_id) == (registry.entries, registry.next_id)


ENTRY = {"id": 0, "name": "a", "origin": "base", "images": 1}


@pytest.mark.parametrize(
    "value",
    [
        None,
        [],
        {},
        {"next_id": 1},
        {"next_id": 1, "classes": 5},
        {"next_id": "x", "classes": []},
        {"next_id": 1, "classes": [{"id": 0}]},
        {"next_id": 1, "classes": [{**ENTRY, "name": "unknown"}]},
        {"next_id": 1, "classes": [{**ENTRY, "name": 5}]},
        {"next_id": 2, "classes": [ENTRY, {**ENTRY, "id": 1}]},
        {"next_id": 2, "classes": [ENTRY, {**ENTRY, "name": "b"}]},
        {"next_id": 0, "classes": [ENTRY]},
        {"next_id": 1, "classes": [{**ENTRY, "id": -1}]},
    ],
)
def test_damaged_json(value: Any) -> None:
    with pytest.raises(BundleRefusedError, match=r"the class registry (is damaged|has the ids)"):
        ClassRegistry.from_json(value)


def test_a_renamed_class_keeps_its_id_and_row():
    registry = ClassRegistry().add("cup", images=3).add("nut").rename("cup", " mug ")
    assert registry.names == ["mug", "nut"]
    assert registry.entries[0] == ClassEntry(0, "mug", "base", 3)
    assert registry.add("cup").entries[2].id == 2
    assert registry.rename("mug", "mug").names == ["mug", "nut"]
    with pytest.raises(InputError, match="the class 'nut' exists already"):
        registry.rename("mug", "nut")
    with pytest.raises(InputError, match=r"no class 'nutt' is known\. Did you mean 'nut'\? Known: mug, nut"):
        registry.rename("nutt", "bolt")


def test_image_counts_of_a_known_class_are_added():
    registry = ClassRegistry().add("cup", images=3).taught("cup", 4)
    assert registry.entries[0].images == 7
    with pytest.raises(InputError, match="no class 'nut' is known"):
        registry.taught("nut", 1)


def test_removing_a_class_frees_its_row_but_not_its_id():
    registry = ClassRegistry().add("cup", images=3).add("nut").add("gear").without(" nut ")
    assert registry.names == ["cup", "gear"]
    assert registry.entries[1] == ClassEntry(2, "gear")
    assert registry.without("gear").add("bolt").entries[1].id == 3
    assert registry.without("cup").without("gear").names == []
    with pytest.raises(InputError, match="no class 'nut' is known"):
        registry.without("nut")


def test_joining_classes_adds_their_images():
    registry = ClassRegistry().add("mug", images=3).add("nut", images=9).add("cup", "device", images=4)
    assert registry.joined("mug", " cup ").entries == (
        ClassEntry(1, "nut", "base", 9),
        ClassEntry(2, "cup", "device", 7),
    )
    assert registry.joined("cup", "mug").entries == (ClassEntry(0, "mug", "base", 7), ClassEntry(1, "nut", "base", 9))
    assert registry.joined("cup", "mug").add("cup").entries[2].id == 3
    with pytest.raises(InputError, match="the class 'cup' cannot be merged with itself"):
        registry.joined("cup", "cup ")
    for pair in (("cups", "nut"), ("nut", "cups")):
        with pytest.raises(InputError, match=r"no class 'cups' is known.*Did you mean 'cup'"):
            registry.joined(*pair)
