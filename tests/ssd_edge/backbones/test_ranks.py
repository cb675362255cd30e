"""Tests of pretraining in several processes and of its checkpoint: the result is that of one process.

The processes are those of the command line, with the environment and the store that torchrun gives them; the slow test
starts torchrun itself.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import run_here
from helpers.forked import Launcher
from torch import nn

from ssd_edge import files
from ssd_edge.backbones import batchnorm, checkpoint
from ssd_edge.backbones import package as packages
from ssd_edge.backbones.ranks import Ranks
from ssd_edge.cli import options
from ssd_edge.errors import InputError

# 39 of 40 images in 3 steps of an epoch; the parts of two processes have 6 and 7
TINY = (
    "data.max_per_class=8", "train.size=8", "train.batch=13", "train.lr=0.02", "train.epochs=2", "train.cutout=3",
    "train.threads=1", "student.neurons=16", "student.k=2", "student.epochs=1",
)  # fmt: skip
Done = subprocess.CompletedProcess[str]
Together = Callable[..., tuple[dist.TCPStore, list[Callable[[], Done]]]]


@pytest.fixture
def together(launcher: Launcher, tmp_path: Path) -> Iterator[Together]:
    """Function that starts processes of the command line as torchrun does, and returns its store and their ends."""
    with ThreadPoolExecutor() as pool:

        def start(*args: str | Path, count: int = 2) -> tuple[dist.TCPStore, list[Callable[[], Done]]]:
            store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            shared = {
                "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "GLOO_SOCKET_IFNAME": "lo",
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True",
            }  # fmt: skip
            words, ends = [str(arg) for arg in args], []
            for rank in range(count):
                environment = {**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
                ends.append(pool.submit(launcher.run, words, tmp_path, environment, 120).result)
            return store, ends

        yield start


def losses(text: str) -> list[float]:
    return [float(line.split("loss")[1].split()[0]) for line in text.splitlines() if line.startswith("epoch")]


def stop_after(epochs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupt a training in this process as soon as so many epochs are in its checkpoint."""
    real = checkpoint.Checkpoint.write

    def write(self: checkpoint.Checkpoint, state: checkpoint.State, epoch: int, seconds: float) -> None:
        real(self, state, epoch, seconds)
        if epoch == epochs:
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.Checkpoint, "write", write)


# with SGD and AdamW
@pytest.mark.parametrize("arch", ["resnet9", pytest.param("convmixer", marks=pytest.mark.slow)])
def test_a_training_that_was_interrupted_ends_as_if_it_was_not(
    arch: str, shapes: Path, together: Together, refused: Callable[..., str], capfd, monkeypatch, tmp_path: Path
) -> None:
    command = (f"data.path={shapes}", *TINY, f"train.arch={arch}")
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    run_here("pretrain", whole, *command)
    said = losses(capfd.readouterr().err)
    assert len(said) == 2
    with monkeypatch.context() as patch:
        stop_after(1, patch)
        error = refused("pretrain", stopped, *command, code=130)
    assert "the same command continues after the last complete epoch" in error
    assert [path.name for path in stopped.iterdir()] == ["checkpoint.safetensors"]
    again = tmp_path / "again"
    again.mkdir()
    files.write_bytes(again / checkpoint.NAME, (stopped / checkpoint.NAME).read_bytes())

    run_here("pretrain", again, *command)
    one = capfd.readouterr().err
    assert "continuing after epoch 1" in one
    assert losses(one) == said[1:]
    assert packages.load(again).identity == packages.load(whole).identity
    assert not (again / checkpoint.NAME).exists()

    _, ends = together("pretrain", stopped, *command)
    first, second = (end() for end in ends)
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert (second.stdout, second.stderr) == ("", "")
    assert "identity" in first.stdout
    assert losses(first.stderr) == pytest.approx(said[1:], abs=0.0011)  # two roundings
    expected, found = packages.load(whole), packages.load(stopped)
    for name, weights in expected.weights.items():
        assert np.allclose(weights, found.weights[name], rtol=1e-3, atol=2e-3 * np.abs(weights).max()), name
    assert not (stopped / checkpoint.NAME).exists()


def test_a_killed_process_ends_the_others_with_a_sentence(shapes: Path, together: Together, tmp_path: Path) -> None:
    package = tmp_path / "package"
    store, (first, second) = together("pretrain", package, f"data.path={shapes}", *TINY, "train.epochs=100000")
    waiting = time.monotonic() + 60
    while not (package / checkpoint.NAME).exists():
        assert time.monotonic() < waiting
        time.sleep(0.05)
    os.kill(int(store.get("process/1").split()[0]), signal.SIGKILL)
    assert second().returncode == -signal.SIGKILL
    assert first().returncode == 3
    error = first().stderr.splitlines()[-1]
    assert error.startswith("error: one of the 2 processes was lost (killed, out of memory")
    assert error.endswith("the same command continues after the last complete epoch")


def test_an_error_is_said_by_one_process(together: Together, tmp_path: Path) -> None:
    _, ends = together("pretrain", tmp_path / "package", "data.path=nowhere")
    first, second = (end() for end in ends)
    assert (first.returncode, first.stderr.count("error:")) == (2, 1)
    assert "error: there is no data set at" in first.stderr
    assert second.returncode != 0
    assert second.stderr == ""


@pytest.mark.parametrize(
    ("args", "environment", "message"),
    [
        (("train", "photos"), {}, "train works in one process, but torchrun has started 2"),
        (("deploy", "--target", "jetson", "run"), {}, "deploy works in one process"),
        (("pretrain", "x", "--student", "data.path=digits"), {}, "pretrain --student works in one process"),
        (("pretrain", "x"), {}, "pretrain needs images"),
        (("train", "photos"), {"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two' and RANK is '0', which torchrun does not"),
        (("pretrain", "x", "data.path=digits"), {"MASTER_ADDR": ""}, "process 0 cannot join the others"),
    ],
)
def test_what_torchrun_cannot_start(
    args: tuple[str, ...], environment: dict[str, str], message: str, refused: Callable[..., str], monkeypatch
) -> None:
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", **environment}.items():
        monkeypatch.setenv(name, value)
    assert message in refused(*args, code=2)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(options, "wait_silently", lambda: None)
    if environment:
        return
    assert refused(*args, code=2) == ""


def test_a_batch_is_split_evenly() -> None:
    parts = [Ranks(rank, 3).part(11) for rank in range(3)]
    assert [list(range(11))[part] for part in parts] == [[0, 1, 2], [3, 4, 5, 6], [7, 8, 9, 10]]
    with pytest.raises(InputError, match=r"a batch of 2 images cannot be split over 3 processes.*train\.batch"):
        Ranks(0, 3).part(2)


@pytest.mark.parametrize("options", [{}, {"momentum": None}, {"affine": False}, {"track_running_stats": False}])
def test_batch_normalisation_of_parts_is_that_of_the_batch(options: dict[str, object], monkeypatch) -> None:
    """Two threads, each with a part of the batch, against `torch.nn.BatchNorm2d` with the whole, in float64."""
    torch.manual_seed(0)
    batch = (3.0 + torch.randn(7, 4, 3, 3)).double().requires_grad_()
    whole = nn.BatchNorm2d(4, **options).double()
    if whole.affine:
        nn.init.normal_(whole.weight)
    layers = [nn.Sequential(nn.BatchNorm2d(4, **options)).double() for _ in range(2)]
    for layer in layers:
        layer[0].load_state_dict(whole.state_dict())
    towards = torch.randn(7, 4, 3, 3).double()
    for _ in range(2):
        (whole(batch) * towards).sum().backward()

    barrier, parts = threading.Barrier(2), {}

    def all_reduce(value: torch.Tensor) -> None:
        parts[threading.get_ident()] = value.clone()
        barrier.wait(60)
        total = torch.stack(list(parts.values())).sum(0)
        barrier.wait(60)
        value.copy_(total)

    monkeypatch.setattr(batchnorm.dist, "all_reduce", all_reduce)

    def train(layer: nn.Module, part: slice) -> torch.Tensor:
        own = batch[part].detach().requires_grad_()
        with batchnorm.synchronised(layer):
            for _ in range(2):
                (layer(own) * towards[part]).sum().backward()
        assert own.grad is not None
        return own.grad

    with ThreadPoolExecutor(2) as pool:
        gradients = list(pool.map(train, layers, (slice(0, 3), slice(3, 7))))
    assert batch.grad is not None
    assert torch.allclose(torch.cat(gradients), batch.grad, rtol=0, atol=1e-12)
    for layer in layers:
        for name, value in whole.state_dict().items():
            assert torch.allclose(layer[0].state_dict()[name].double(), value.double(), rtol=0, atol=1e-12), name
    for name, parameter in whole.named_parameters():
        total = sum(dict(layer[0].named_parameters())[name].grad for layer in layers)
        assert torch.allclose(total, parameter.grad, rtol=0, atol=1e-12), name
    assert torch.equal(layers[0].eval()(batch), layers[0][0](batch))


def test_batch_normalisation_of_another_kind_is_refused() -> None:
    class WithActivation(nn.BatchNorm2d):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return super().forward(inputs).relu()

    refusal = pytest.raises(InputError, match="WithActivation, which cannot be synchronised")
    with refusal, batchnorm.synchronised(nn.Sequential(WithActivation(4))):
        pass


def test_a_checkpoint_of_another_training_is_refused(
    shapes: Path, refused: Callable[..., str], monkeypatch, tmp_path: Path
) -> None:
    package, command = tmp_path / "package", (f"data.path={shapes}", *TINY)
    with monkeypatch.context() as patch:
        stop_after(1, patch)
        refused("pretrain", package, *command, code=130)
    path = package / checkpoint.NAME
    before = path.read_bytes()
    error = refused("pretrain", package, *command, "train.lr=0.03", code=2)
    assert "interrupted after epoch 1, but train.lr was 0.02 and is now 0.03. Continue it with its own" in error
    assert "the digest of the images was" in refused("pretrain", package, *command, "data.max_per_class=7", code=2)
    assert path.read_bytes() == before
    path.write_bytes(before[:-100])
    assert "checkpoint.safetensors is not a valid safetensors file" in refused("pretrain", package, *command, code=5)
    arrays, metadata = files.parse_tensors(before, "")
    arrays.pop("model.1.weight")
    files.write_tensors(path, arrays, metadata)
    assert "checkpoint.safetensors is damaged" in refused("pretrain", package, *command, code=5)


def torchrun(*args: str | Path, count: int = 2) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count), "-m", "ssd_edge"]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


@pytest.mark.slow  # 3 minutes
def test_torchrun(shapes: Path, cli, tmp_path: Path) -> None:
    command = (f"data.path={shapes}", *TINY, "train.epochs=12", "train.lr=0.002", "data.max_per_class=30")
    whole = tmp_path / "whole"
    done = torchrun("pretrain", whole, *command)
    assert done.wait(120) == 0
    expected = packages.load(whole)
    assert packages.load(whole).card["config"]["epochs"] == 12

    def stop(number: int, of: Callable[[subprocess.Popen[str]], int], count: int) -> str:
        """Send a signal after two more epochs and return what was said."""
        running = torchrun("pretrain", tmp_path / "stopped", *command, count=count)
        assert running.stderr is not None
        lines = []
        for line in running.stderr:
            lines.append(line)
            if len(losses("".join(lines))) == 2:
                break
        os.kill(of(running), number)
        with contextlib.closing(running.stderr):
            lines.extend(running.stderr)
        assert running.wait(60) == 1
        return "".join(lines)

    def last_rank(running: subprocess.Popen[str]) -> int:
        children = Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()
        return int(children[-1])

    said = stop(signal.SIGKILL, last_rank, 2)
    assert said.count("error: one of the 2 processes was lost") == 1
    assert "exitcode  : 3" in said
    for number in (signal.SIGINT, signal.SIGTERM):
        said = stop(number, lambda running: running.pid, 2)
        assert "continuing after epoch" in said
        assert said.count("interrupted: the same command continues") == 1
        assert "error:" not in said
    done = torchrun("pretrain", tmp_path / "stopped", *command)
    assert done.wait(120) == 0
    assert packages.load(tmp_path / "stopped").identity == expected.identity  # two processes add in one order only

    three = torchrun("pretrain", tmp_path / "three", *command, count=3)
    assert three.wait(120) == 0
    one = cli("pretrain", tmp_path / "one", *command)
    assert three.stderr is not None
    assert losses(three.stderr.read()) == pytest.approx(losses(one.stderr), abs=0.005)
