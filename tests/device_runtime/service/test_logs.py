"""Log lines as JSON."""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path

import numpy as np

from device_runtime.service import logs


def line_of(message: str, fields: object = None, error: BaseException | None = None) -> str:
    trace = (type(error), error, error.__traceback__) if error else None
    record = logging.LogRecord("camera", logging.WARNING, "file", 1, message, None, trace)
    if fields is not None:
        record.fields = fields
    return logs.JsonLines().format(record)


def test_log_line_is_one_json_object():
    numbers = {"score": np.float32(0.5), "n": np.int64(3), "psi": float("nan")}
    fields = {"image": Path("a.jpg"), **numbers, "l": [True, None, (1.5,)]}
    found = json.loads(line_of("image named", fields))
    assert set(found) == {"monotonic", "untrusted_time", "level", "source", "event", "fields"}
    assert (found["level"], found["source"], found["event"]) == ("warning", "camera", "image named")
    assert found["fields"] == {"image": "a.jpg", "score": 0.5, "n": 3, "psi": "nan", "l": [True, None, [1.5]]}
    assert found["untrusted_time"].endswith("Z")
    assert found["monotonic"] > 0


def test_log_line_is_printable_ascii_of_limited_length():
    evil = "\n\r\x1b[2J\x00\x7f\x9b\u2028\udc80é"
    loop: list[object] = []
    loop.append(loop)
    line = line_of(evil, {evil: evil, "loop": loop})
    assert line.isascii()
    assert line.isprintable()
    assert json.loads(line)["event"] == evil
    assert len(line_of("x" * 10**6, {"y" * 10**5: "z" * 10**5})) < 5 * logs.LONGEST


def test_log_line_has_the_traceback():
    try:
        raise ValueError("no such\nimage")
    except ValueError as error:
        found = json.loads(line_of("failed", error=error))
    assert found["error"].endswith("ValueError: no such\nimage")
    assert "fields" not in found


def test_log_json_replaces_other_handlers(capsys, monkeypatch):
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    for handler in before:  # so that they are not closed
        root.removeHandler(handler)
    try:
        logs.log_json()
        logs.log_json()
        logging.getLogger("camera").info("seen", extra={"fields": {"n": 1}})
        logging.getLogger("camera").debug("not seen")
        warnings.showwarning(UserWarning("two\nlines"), UserWarning, "decoder.py", 1)
    finally:
        root.handlers[:], root.level = before, level
    lines = capsys.readouterr().err.splitlines()
    assert [json.loads(line)["event"] for line in lines] == ["seen", "UserWarning: two\nlines"]
