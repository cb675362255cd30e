"""``ssd-edge bench`` as a command."""

from __future__ import annotations

import json
from typing import Any

import pytest
from click.testing import CliRunner

from ssd_edge.cli import cli
from ssd_edge.run import bench as benching


@pytest.mark.parametrize(("words", "expected"), [([], benching.Size()), (["--full"], benching.FULL)])
def test_json_is_one_object_and_full_is_the_large_size(
    words: list[str], expected: benching.Size, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def bench(size: benching.Size, say: Any) -> dict[str, Any]:
        asked.append(size)
        say("10,000 neurons")
        return {"ratios": {"cpu_r1000": 6.5}}

    monkeypatch.setattr(benching, "bench", bench)
    done = CliRunner().invoke(cli, ["bench", "--json", *words])
    assert done.exit_code == 0, done.output
    assert asked == [expected]
    assert json.loads(done.stdout) == {"ratios": {"cpu_r1000": 6.5}}
    assert done.stderr == "10,000 neurons\n"
