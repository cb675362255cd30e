"""``ssd-edge bench`` as a command."""

from __future__ import annotations

import json
from typing import Any

import pytest
from click.testing import CliRunner

from ssd_edge.cli import cli
from ssd_edge.run import bench as benching


@pytest.mark.parametrize(("args", "expected"), [([], benching.Size()), (["--full"], benching.FULL)])
def test_json_is_one_object_and_full_is_the_large_size(
    args: list[str], expected: benching.Size, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    report = benching.Report([], [], None, 2.5, ["avx2"], {"threads": 3})

    def bench(size: benching.Size, log: Any) -> benching.Report:
        asked.append(size)
        log("10,000 neurons")
        return report

    monkeypatch.setattr(benching, "bench", bench)
    done = CliRunner().invoke(cli, ["bench", "--json", *args])
    assert done.exit_code == 0, done.output
    assert asked == [expected]
    assert json.loads(done.stdout) == report.to_dict()
    assert done.stderr == "10,000 neurons\n"
