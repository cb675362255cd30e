"""Fixtures for the tests of learners and the bundle format."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from ssd_edge import bundle
from ssd_edge.errors import BundleRefusedError


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Limit PyTorch to one thread: for small tensors on busy cores, a second thread only adds waiting."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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
