"""Examples of the documentation: every command line is valid, and every Python example runs.

The examples of docs/python.md are run by tests/ssd_edge/test_api.py.
"""

from __future__ import annotations

import re
import shlex
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "examples").glob("*.sh"))]


def command_lines() -> Iterator[tuple[str, list[str]]]:
    """Yield (page, arguments) of each `ssd-edge` command in a shell block, without comments and pipes."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        blocks = [text] if page.suffix == ".sh" else re.findall(r"```(?:bash|sh)\n(.*?)```", text, re.DOTALL)
        for line in "\n".join(blocks).replace("\\\n", " ").splitlines():
            found = re.search(r"(?:^|\| |bin/)ssd-edge (.+)", line.split(" #")[0])
            if found and "…" not in found[1]:
                yield page.name, shlex.split(re.split(r"[|>]", found[1])[0])


def inline_commands() -> Iterator[tuple[str, list[str]]]:
    """Yield (page, verbs) of each `ssd-edge` command within a sentence."""
    for page in PAGES:
        for found in re.findall(r"`ssd-edge ([a-z][^`]*)`", page.read_text(encoding="utf-8")):
            yield page.name, found.split()


def resolve(arguments: list[str]) -> tuple[click.Command, list[str]]:
    """Return the command that the arguments name and what is left for it."""
    from ssd_edge.cli import cli

    command: click.Command = cli
    while isinstance(command, click.Group) and arguments:
        name, *arguments = arguments
        if name in ("…", "VERB"):
            break
        assert name in command.commands, f"no verb '{name}'"
        command = command.commands[name]
    return command, arguments


COMMANDS = list(command_lines())


def test_commands_within_sentences_exist() -> None:
    found = list(inline_commands())
    assert len(COMMANDS) > 30
    assert len(found) > 25
    for page, words in found:
        assert resolve(words), page


@pytest.mark.parametrize(
    ("page", "arguments"), COMMANDS, ids=[f"{page}: {' '.join(words)}" for page, words in COMMANDS]
)
def test_a_command_line_is_valid(page: str, arguments: list[str]) -> None:
    """Options, number of arguments, and `section.key=value` words are accepted; nothing is run."""
    from ssd_edge.config import DistillConfig, PretrainConfig, TrainConfig, merge, parse
    from ssd_edge.learners import AUTO, settings_of

    command, rest = resolve(arguments)
    context = command.make_context(command.name, rest)
    overrides = context.params.get("overrides", ())
    if command.name == "pretrain":
        parse(PretrainConfig, merge({}, overrides))
    elif command.name == "distill":
        parse(DistillConfig, merge({}, overrides))
    elif command.name == "train":
        config = parse(TrainConfig, merge({}, overrides))
        if config.learner["name"] != AUTO:
            settings_of(config.learner)


def python_blocks(name: str) -> list[str]:
    """Return the Python examples of a page."""
    return re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(encoding="utf-8"), re.DOTALL)


def run(blocks: list[str], namespace: dict[str, Any], root: Path | str = "/data/ssd-edge") -> dict[str, Any]:
    """Execute examples one after another, with `root` in place of the device's root in the text."""
    for block in blocks:
        exec(compile(block.replace("/data/ssd-edge", str(root)), "<example>", "exec"), namespace)
    return namespace


@pytest.fixture
def photos(shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the images that the examples name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gear").mkdir()
    triangles = sorted((shapes / "train" / "triangle").iterdir())
    for number, source in enumerate(triangles[:3], 1):
        shutil.copy(source, tmp_path / "gear" / f"{number}.jpg")  # the content decides, not the name
    shutil.copy(triangles[5], tmp_path / "frame.jpg")
    return tmp_path


def test_python_examples_of_the_device(installed: Path, shapes: Path, photos: Path) -> None:
    root = photos / "root"
    shutil.copytree(installed, root)
    noise = np.random.default_rng(0).integers(0, 256, (2, 6, 40, 40, 3), dtype=np.uint8)
    names = {"nuts": list(noise[0]), "screws": list(noise[1] // 2)}
    (example,) = python_blocks("docs/device.md")
    run([example], names, root=root)
    shutil.rmtree(root)
    shutil.copytree(installed, root)
    run(python_blocks("README.md")[1:], {}, root=root)


def test_python_examples_of_the_service(installed: Path, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from device_runtime import Device

    class Stopped(Exception):
        pass

    def stop(seconds: float) -> None:
        raise Stopped

    loop, drift = python_blocks("docs/service.md")
    monkeypatch.setattr(time, "sleep", stop)
    with pytest.raises(Stopped):
        run([loop], {"time": time})
    with Device.open(installed) as device:
        found = run([drift], {"device": device, "frames": [photos / "frame.jpg"]})
    assert "monitor" in found


def test_python_examples_of_the_bundle(bundle: Path, photos: Path) -> None:
    from ssd_edge.errors import BundleRefusedError

    shutil.copy(bundle, photos / "robot.ssdedge")
    (example,) = python_blocks("docs/bundle.md")
    with pytest.raises(BundleRefusedError, match=r"not signed|no signature"):  # `trained` is not signed
        run([example], {})
