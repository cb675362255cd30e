"""Fixtures for the tests of learners and the bundle format."""

from __future__ import annotations

import pytest

from ssd_edge import bundle
from ssd_edge.errors import BundleRefusedError


@pytest.fixture
def refusal(tmp_path):
    """Function ``refusal(data)`` that returns the message with which these bytes are refused."""
    path = tmp_path / "robot.ssdedge"

    def read(data: bytes) -> str:
        path.unlink(missing_ok=True)  # replacing the content of an existing file would wait for the disk
        path.write_bytes(data)
        with pytest.raises(BundleRefusedError) as caught:
            bundle.read(path)
        head, message = str(caught.value).split(" is refused: ", 1)
        assert head == str(path)
        assert message.isprintable()
        assert len(message) <= 400
        return message

    return read
