"""The tutorials: their commands, in order, with small pictures in place of photographs, print what the pages show.

The tiny backbone replaces the default one, except in the slow test: its export alone takes longer than all of this.
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import logging
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import run_here
from PIL import Image

import ssd_edge

pytestmark = pytest.mark.usefixtures("one_thread")

DOCS = Path(__file__).resolve().parent.parent / "docs"
SETUP = ("pip ", "python3 -m venv ", "sudo ", "systemctl ", "apt ")  # not run: they change the machine
MASKED = (  # numbers with their units, times and what depends on the images
    (r"\d{4}-\d\d-\d\dT[\d:]+Z", "#"),
    (r"nearest: [^)]+", "nearest: #"),
    (r"\d[\d.,]*( (s|ms|min|B|[kMG]i?B)\b)?", "#"),
    (r"\s+", " "),
)


def blocks(page: str) -> list[tuple[str, str]]:
    """Return (language, text) of the examples of a page, in order."""
    return re.findall(r"^```(\w+)\n(.*?)^```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def commands(text: str) -> Iterator[str]:
    """Yield the command lines of a shell block that belong to SSD-Edge, without comments."""
    for line in text.replace("\\\n", " ").splitlines():
        line = line.split(" #")[0].strip()
        if line and not line.startswith(("#", *SETUP)):
            yield line


def masked(line: str) -> str:
    """Return a line of output without what differs from one computer to another."""
    for pattern, replacement in MASKED:
        line = re.sub(pattern, replacement, line)
    return line.strip()


class Reader:
    """Follows a page: types its commands, within this process, and compares their output with the page."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
        self._patch, self._capfd = monkeypatch, capfd
        self.typed: list[str] = []

    def follow(self, page: str, change: Callable[[str], str] = str) -> None:
        """Run the examples of a page; `change` may replace a part of a command."""
        printed: list[str] = []
        names: dict[str, object] = {}
        for language, text in blocks(page):
            if language == "python":
                exec(compile(text, page, "exec"), names)
            elif language == "json":
                assert list(json.loads(text)) in [list(json.loads(line)) for line in printed if line.startswith("{")]
            elif language == "text":
                said = set(map(masked, printed))
                for line in text.splitlines():
                    assert masked(line) in said, f"{page} shows what is not printed: {line}\n" + "\n".join(printed)
            elif language == "bash":
                for line in commands(text):
                    self._type(change(line))
                    output = self._capfd.readouterr()
                    printed += (output.out + output.err).splitlines()

    def _type(self, line: str) -> None:
        self.typed.append(line)
        *before, last = line.split(" | ")
        if before:  # what another program writes to our standard input
            wrote = subprocess.run(before[0], shell=True, stdout=subprocess.PIPE, check=False).stdout
            Path("stdin").write_bytes(wrote)
        program, *words = shlex.split(last)
        assert program == "ssd-edge", line
        with open("stdin" if before else os.devnull, "rb") as stdin:
            self._patch.setattr(sys, "stdin", io.TextIOWrapper(stdin))
            run_here(*words)


@pytest.fixture
def reader(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path, exported_once: None
) -> Iterator[Reader]:
    """Someone who follows a page in an empty folder, with a device of their own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SSD_EDGE_ROOT", str(tmp_path / "device"))
    root, caught = logging.getLogger(), (signal.SIGTERM, signal.SIGINT)
    handlers, level, before = list(root.handlers), root.level, [signal.getsignal(number) for number in caught]
    yield Reader(monkeypatch, capfd)
    root.handlers[:] = handlers  # `device watch` replaces all of these
    root.setLevel(level)
    for number, handler in zip(caught, before, strict=True):
        signal.signal(number, handler)


def photograph(shapes: Path, names: dict[str, str], count: int) -> None:
    """Write ``products/`` with pictures of shapes that are called as the products of a page, and others in test/."""
    for shape, name in names.items():
        (Path("products") / name).mkdir(parents=True)
        for source in sorted((shapes / "train" / shape).iterdir())[:count]:
            shutil.copy(source, Path("products") / name)


def first_product(reader: Reader, shapes: Path, change: Callable[[str], str] = str) -> None:
    photograph(shapes, {"circle": "Banana", "cross": "Kiwi", "square": "Lemon"}, 20)
    shutil.copytree(shapes / "train" / "stripes", "carrots", ignore=lambda _, names: sorted(names)[20:])
    shutil.copy(shapes / "test" / "circle" / "001.png", "banana.jpg")
    shutil.copy(shapes / "test" / "stripes" / "002.png", "photo.jpg")
    reader.follow("first-product.md", change)
    asked = [line for line in reader.typed if " predict " in line]
    assert reader.typed.index(asked[0]) + 1 == 5  # the fifth command names a photograph


def test_first_product(reader: Reader, shapes: Path) -> None:
    first_product(reader, shapes, lambda line: line.replace("train products", "train products backbone=tiny"))


@pytest.mark.slow
def test_first_product_as_written(reader: Reader, shapes: Path) -> None:
    first_product(reader, shapes)


def small_network(name: str, pretrained: bool, num_classes: int) -> object:
    """Return a convolutional network that is exported in little time; in place of `timm.create_model`."""
    import torch

    torch.manual_seed(0)
    stages = torch.nn.Conv2d(3, 16, 7, 8), torch.nn.ReLU(), torch.nn.Conv2d(16, 32, 3, 2), torch.nn.ReLU()
    return torch.nn.Sequential(*stages, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())


def test_own_backbone(reader: Reader, shapes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timm = types.ModuleType("timm")
    monkeypatch.setattr(timm, "create_model", small_network, raising=False)
    monkeypatch.setitem(sys.modules, "timm", timm)
    photograph(shapes, {"circle": "Banana", "stripes": "Kiwi"}, 8)
    smaller = {"--teacher lite0": "--teacher tiny", "--size 64": "--size 16"}  # exporting Lite0 takes long
    reader.follow("own-backbone.md", lambda line: re.sub("|".join(smaller), lambda found: smaller[found[0]], line))
    with_levels, last, distilled = (ssd_edge.load_run(f"runs/{run}").learner.dim for run in (1, 2, 3))
    assert with_levels > last == 32
    assert distilled == 832


FFMPEG = """#!/bin/sh
cat {frames}
"""


def test_camera(reader: Reader, shapes: Path, installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(installed, tmp_path / "device")
    with open("frames", "wb") as frames:
        for source in sorted((shapes / "train" / "triangle").iterdir())[:20]:
            Image.open(source).save(frames, "JPEG", quality=95)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "ffmpeg").write_text(FFMPEG.format(frames=tmp_path / "frames"))
    (tmp_path / "bin" / "ffmpeg").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    change = {"watch /dev/video0": "watch file:///dev/video0", "--every 0.5": "--every 0"}  # it ends; no waiting
    reader.follow("camera.md", lambda line: re.sub("|".join(change), lambda found: change[found[0]], line))
    journal = (tmp_path / "device" / "journal.jsonl").read_text()
    assert re.findall("learn|rollback", journal) == ["learn", "rollback"]


def stored_output(cell: dict[str, Any]) -> list[str]:
    """Return the lines that a notebook keeps of a cell's output."""
    texts = (one["text"] if one["output_type"] == "stream" else one["data"]["text/plain"] for one in cell["outputs"])
    return [line for text in texts for line in "".join(text).splitlines()]


def test_the_notebook(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, exported_once: None) -> None:
    """Each cell runs, and prints what is stored, numbers aside."""
    monkeypatch.chdir(tmp_path)
    notebook = json.loads((DOCS.parent / "examples" / "tour.ipynb").read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    names: dict[str, object] = {}
    for cell in cells:
        *statements, last = ast.parse("".join(cell["source"])).body
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(ast.Module(statements, []), "tour.ipynb", "exec"), names)
            if isinstance(last, ast.Expr):
                value = eval(compile(ast.Expression(last.value), "tour.ipynb", "eval"), names)
                print("" if value is None else repr(value))
            else:
                exec(compile(ast.Module([last], []), "tour.ipynb", "exec"), names)
        shown = [masked(line) for line in printed.getvalue().splitlines() if line]
        assert shown == [masked(line) for line in stored_output(cell)]
    assert len(cells) >= 8
