"""Processes that torchrun has started, and that train one network together with DistributedDataParallel.

The process of rank 0 reads the data, sends it to the others, writes all files and prints. The others only train.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import logging
import os
import signal
import socket
import time
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

from ssd_edge.backbones import batchnorm
from ssd_edge.errors import EnvironmentUnfitError, InputError, SSDEdgeError, meaning_of
from ssd_edge.system import ranks

# A process that is lost is noticed by its connection or by torchrun. Waiting is not a fault: rank 0 decodes the images.
PATIENCE = datetime.timedelta(days=2)
TELLING = 1.0  # seconds that the others stay, because torchrun ends all processes once one has ended
CONTINUES = "the same command continues after the last complete epoch"


@dataclasses.dataclass
class Ranks:
    """This process and its peers; by default there are none, and every method does nothing.

    Attributes:
        rank: Number of this process.
        count: Number of processes.
        device: Training device of this process.
        store: Keys and values that all processes see.
    """

    rank: int = 0
    count: int = 1
    device: torch.device = dataclasses.field(default_factory=lambda: torch.device("cpu"))
    store: Any = None
    _shared: int = 0

    def start(self, device: torch.device) -> torch.device:
        """Connect the processes, and return the device of this one.

        Args:
            device: Kind of device; with CUDA, each process of a machine gets a GPU of its own.

        Raises:
            EnvironmentUnfitError: This machine has fewer GPUs than processes.
        """
        self.device = device
        if self.count == 1:
            return device
        if device.type == "cuda":
            local, gpus = int(os.environ.get("LOCAL_RANK", self.rank)), torch.cuda.device_count()
            if local >= gpus:
                raise EnvironmentUnfitError(
                    f"each process needs a GPU of its own, but this machine has {gpus}; start at most {gpus} with "
                    f"--nproc-per-node, or set train.device=cpu"
                )
            self.device = torch.device("cuda", local)
            torch.cuda.set_device(self.device)
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=self.store, rank=self.rank, world_size=self.count, timeout=PATIENCE)
        return self.device

    def part(self, batch: int) -> slice:
        """Return which positions of a batch this process computes; sizes differ by one at most.

        Raises:
            InputError: The batch has fewer images than there are processes.
        """
        if batch < self.count:
            raise InputError(
                f"a batch of {batch} images cannot be split over {self.count} processes; start fewer, or raise "
                "train.batch"
            )
        return slice(batch * self.rank // self.count, batch * (self.rank + 1) // self.count)

    def share(self, value: Tensor | None) -> Tensor:
        """Return a tensor of rank 0 on all processes; the others pass None, and get it on their device."""
        if self.count == 1:
            assert value is not None
            return value
        key = f"shared/{self._shared}"
        self._shared += 1
        if self.rank == 0:
            assert value is not None
            value = value.to(self.device).contiguous()
            self.store.set(key, json.dumps([str(value.dtype).removeprefix("torch."), list(value.shape)]))
        else:
            while not self.store.check([key]):  # `wait` could not be interrupted
                if self.store.check(["told"]):
                    raise EnvironmentUnfitError("another process has failed")
                time.sleep(0.02)
            dtype, shape = json.loads(self.store.get(key))
            value = torch.empty(shape, dtype=getattr(torch, dtype), device=self.device)
        if value.numel():
            dist.broadcast(value, 0)
        return value

    def share_bytes(self, data: bytes) -> bytes:
        """Return bytes of rank 0 on all processes; what the others pass is ignored."""
        if self.count == 1:
            return data
        shared: np.ndarray = self.share(torch.tensor(bytearray(data), dtype=torch.uint8)).cpu().numpy()
        return shared.tobytes()

    def total(self, value: Tensor) -> Tensor:
        """Return the sum of a tensor over all processes."""
        if self.count > 1:
            dist.all_reduce(value)
        return value

    @contextlib.contextmanager
    def training(self, model: nn.Module) -> Iterator[nn.Module]:
        """Yield a module to be trained in place of `model`: it averages gradients over the processes.

        Meanwhile batch normalisation uses the statistics of the whole batch, and the processes of a machine share the
        threads of one.

        Raises:
            InputError: A layer cannot be synchronised.
        """
        if self.count == 1:
            yield model
            return
        threads = torch.get_num_threads()
        torch.set_num_threads(max(1, threads // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
        try:
            with batchnorm.synchronised(model):
                yield self._parallel(model)
        finally:
            torch.set_num_threads(threads)

    def _parallel(self, model: nn.Module) -> nn.Module:
        ids = [self.device.index] if self.device.type == "cuda" else None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # the argument has another name since PyTorch 2.13
            # the running statistics are the same everywhere, because those of the batches are
            return nn.parallel.DistributedDataParallel(model, device_ids=ids, broadcast_buffers=False)


@contextlib.contextmanager
def joined() -> Iterator[Ranks]:
    """Yield the processes of this run: those that torchrun has started, or this one alone.

    If they fail, one of them raises what happened, and the others end silently with its exit code or their own.

    Raises:
        InputError: The environment is not that of torchrun.
        EnvironmentUnfitError: Another process was lost.
    """
    rank, count = ranks()
    if count == 1:
        yield Ranks()
        return
    if rank:
        warnings.simplefilter("ignore")
        logging.disable()
    try:
        store, _, _ = next(rendezvous("env://", rank, count))
    except (ValueError, RuntimeError) as error:
        raise InputError(
            f"WORLD_SIZE is {count}, but process {rank} cannot join the others ({error}); start all of them with "
            "torchrun, or unset WORLD_SIZE"
        ) from error
    told: BaseException | None = None
    first = True
    try:
        store.set(f"process/{rank}", f"{os.getpid()} {socket.gethostname()}")
        yield Ranks(rank, count, store=store)
    except BaseException as error:
        for number in (signal.SIGTERM, signal.SIGINT):  # torchrun sends them as soon as one process has ended
            signal.signal(number, signal.SIG_IGN)
        with contextlib.suppress(RuntimeError):  # the store may be gone with the process that held it
            first = store.add("told", 1) == 1
        told = _meaning(error, store, count)
    with contextlib.suppress(RuntimeError):
        store.set(f"ended/{rank}", "")
    if told is None:
        dist.destroy_process_group()
    elif first:
        raise told  # out of the handler: whatever an interrupt caused is taken for one
    else:
        time.sleep(TELLING)
        raise SystemExit(_code(told))


def _meaning(error: BaseException, store: Any, count: int) -> BaseException:
    """Return what an error means in a run of several processes.

    The connection to a process that was killed breaks; or torchrun notices it first, and interrupts the others.
    """
    interrupted = isinstance(error, KeyboardInterrupt)
    if _is_of_the_connection(error) or (interrupted and _is_one_gone(store, count)):
        return EnvironmentUnfitError(
            f"one of the {count} processes was lost (killed, out of memory, or its machine is gone); {CONTINUES}"
        )
    return KeyboardInterrupt(CONTINUES) if interrupted else error


def _is_one_gone(store: Any, count: int) -> bool:
    """Return True if a process of this machine no longer exists, although it has not ended by itself."""
    with contextlib.suppress(RuntimeError):
        for rank in range(count):
            if not store.check([f"process/{rank}"]):
                continue
            pid, _, host = store.get(f"process/{rank}").decode().partition(" ")
            if host == socket.gethostname() and _is_gone(int(pid)) and not store.check([f"ended/{rank}"]):
                return True
    return False


def _is_gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError as error:
        return isinstance(error, ProcessLookupError)
    return False


def _is_of_the_connection(error: BaseException) -> bool:
    """Return True for an error of the connection between the processes."""
    text = str(error).lower()
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in text)


def _code(error: BaseException) -> int:
    meaning = meaning_of(error)
    if meaning is not None:
        return meaning.exit_code
    return 130 if isinstance(error, KeyboardInterrupt) else SSDEdgeError.exit_code
