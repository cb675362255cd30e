"""Many cells: what is to be done, in which processes, and what is told meanwhile.

Everything that cells share (embeddings, keys) is made here first, so that workers only learn. A worker that dies
takes nothing along: finished cells are stored one by one, and its own is done again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import torch

from ssd_edge import files
from ssd_edge.data import cache
from ssd_edge.errors import EnvironmentUnfitError, InputError, SSDEdgeError
from ssd_edge.report import events
from ssd_edge.report.events import Listener, Message
from ssd_edge.report.wording import percent
from ssd_edge.reproduction import cells, work
from ssd_edge.reproduction.sources import Sources, found, write_inputs, write_priors
from ssd_edge.reproduction.specs import Experiment, StreamSource, streams
from ssd_edge.reproduction.work import Job
from ssd_edge.run.train import pick_device, set_threads
from ssd_edge.system import duration, usable_cores

ATTEMPTS = 3  # at a cell whose process dies
RESULTS = Path("results") / "reproduce"
INTERNAL = 1  # exit code of what is no user's error


@dataclasses.dataclass(frozen=True)
class Request:
    """What a user asks for.

    Attributes:
        experiments: to run.
        budget: smoke, reduced or full.
        orders: class orders; None: the budget's.
        workers: processes; 0: one per usable core, or one where there is a GPU.
        out: results.md and results/ are in here.
        tiny_backbone: for Split Tiny-ImageNet, or None.
    """

    experiments: Sequence[Experiment]
    budget: str
    orders: int | None
    workers: int
    out: Path
    tiny_backbone: Path | None = None

    @property
    def results(self) -> Path:
        """Where cells are stored."""
        return self.out / RESULTS


def wanted(request: Request) -> list[cells.Setup]:
    """All setups, each once: first every one of the first class order with its upper bound, then of the next."""
    asked: dict[str, cells.Setup] = {}
    for experiment in request.experiments:
        for stream in experiment.streams:
            for system in experiment.systems:
                for setup in cells.setups(experiment, system, stream, request.budget, request.orders):
                    for one in (setup, cells.upper_bound(setup)):
                        asked.setdefault(one.key(), one)
    return sorted(asked.values(), key=lambda setup: setup.order)


def missing_data(setups: Sequence[cells.Setup]) -> list[str]:
    """Files that the setups need and that are not under ``$SSD_EDGE_DATA``."""
    return sorted({streams()[q.stream].data for q in setups if found(streams()[q.stream].data) is None})


def plan(request: Request, sources: Sources, scratch: Path) -> tuple[list[Job], int]:
    """The cells that are not stored yet, with everything that they need in `scratch`; and how many are.

    Raises:
        InputError: data is not here, and this budget takes no other in its place.
    """
    setups = wanted(request)
    smoke = request.budget == "smoke"
    lacking = missing_data(setups)
    if lacking and not smoke:
        root = os.environ.get("SSD_EDGE_DATA")
        where = f"not under SSD_EDGE_DATA={root}" if root else "SSD_EDGE_DATA is not set"
        raise InputError(f"the budget {request.budget} needs {', '.join(lacking)}, but {where}; put the files there")
    jobs, stored = [], 0
    for setup in setups:
        stream = streams()[setup.stream]
        if _lacks_backbone(stream, sources):
            continue  # `run` has said so
        inputs = sources.inputs(stream, setup.images, smoke)
        priors, keys, notes = sources.keys(inputs, setup.learner, stream, not smoke)
        cell = cells.spec(setup, cells.Provenance(inputs.dataset.fingerprint, inputs.identity, keys))
        if cells.is_stored(request.results, cell):
            stored += 1
            continue
        name = cells.file_name(cell)
        jobs.append(
            Job(
                cell=cell,
                inputs=write_inputs(scratch, inputs),
                priors=write_priors(scratch, priors),
                notes=(*inputs.notes, *notes),
                explained=bool(notes),
                stand_in=inputs.stand_in,
                result=request.results / name,
                checkpoint=_checkpoints() / f"{files.sha256(files.json_bytes(cell))[:24]}.safetensors",
                device=str(sources.device),
            )
        )
    return jobs, stored


def _checkpoints() -> Path:
    """States of unfinished cells; beside the embeddings, which can be deleted at any time too."""
    return cache.folder().parent / "reproduce"


def run(request: Request, listener: Listener) -> SSDEdgeError | None:
    """Run what is not stored yet.

    Returns:
        None, or, where cells failed, an error with the worst of their exit codes: the others are stored.

    Raises:
        InputError: data is not here; nothing was run.
    """
    device = pick_device("auto")
    set_threads(0)
    sources = Sources(device, listener, request.tiny_backbone)
    named = dict.fromkeys(stream for experiment in request.experiments for stream in experiment.streams)
    for stream in (name for name in named if _lacks_backbone(streams()[name], sources)):
        listener(
            Message(f"{stream}: skipped, because it needs a backbone that has not seen its classes (--tiny-backbone)")
        )
    with tempfile.TemporaryDirectory(prefix="ssd-edge-") as scratch:
        jobs, stored = plan(request, sources, Path(scratch))
        listener(Message(f"{len(jobs) + stored} cells, {stored} of them stored already"))
        workers = request.workers or (1 if device.type == "cuda" else usable_cores())
        failures = _all(jobs, min(workers, max(1, len(jobs))), listener)
    if not failures:
        return None
    error = SSDEdgeError(f"{len(failures)} of {len(jobs)} cells failed (above); all others are stored")
    codes = [code for code, _ in failures]
    error.exit_code = INTERNAL if INTERNAL in codes else max(codes)
    return error


def _lacks_backbone(stream: StreamSource, sources: Sources) -> bool:
    """Whether the data is here but not the backbone that it needs (digits stand in for data that is not)."""
    return stream.backbone != "shipped" and sources.tiny_backbone is None and found(stream.data) is not None


def title(job: Job) -> str:
    """A cell in a few words."""
    asked = job.cell["asked"]
    readable = Path(cells.file_name(job.cell)).name.rsplit("-", 2)[0]
    return f"{asked['stream']} {readable}, order {job.cell['order']}"


Outcome = tuple[int, str, float]  # exit code (0: done), what to tell, seconds


def attempt(job: Job) -> Outcome:
    """Run one cell; an error is told, not raised, because the others go on."""
    began = time.monotonic()
    try:
        result = work.run(job)
    except SSDEdgeError as error:
        return error.exit_code, str(error), time.monotonic() - began
    except Exception:
        return INTERNAL, traceback.format_exc(), time.monotonic() - began
    return 0, percent(result["accuracy"]), time.monotonic() - began


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """An interrupt waits until the block is left; processes started in it never see one: their parent ends them."""
    came: list[int] = []
    # both: a mask is inherited by the processes, but another thread of this one may still take the signal
    handler = signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGINT, handler)
    if came:
        raise KeyboardInterrupt


def _all(jobs: list[Job], workers: int, listener: Listener) -> list[tuple[int, str]]:
    """Run the jobs; returns exit code and message of those that failed."""
    failures, began = [], time.monotonic()
    outcomes = _here(jobs) if workers == 1 else _beside(jobs, workers)
    width = len(str(len(jobs)))
    # closing: an interrupt must end the worker processes at once
    reporting = events.progress(listener, "reproduce", len(jobs), "cell", live_only=True)
    with contextlib.closing(outcomes), reporting as update:
        for done, (job, (code, told, seconds)) in enumerate(outcomes, 1):
            left = (time.monotonic() - began) / done * (len(jobs) - done)
            status = f"FAILED, {told.strip()}" if code else f"{told} in {duration(seconds)}"
            listener(Message(f"[{done:>{width}}/{len(jobs)}] {title(job)}: {status}; {duration(left)} left"))
            update(done - 1, 1.0)
            if code:
                failures.append((code, told))
    return failures


def _here(jobs: Sequence[Job]) -> Iterator[tuple[Job, Outcome]]:
    """One after the other in this process."""
    threads = torch.get_num_threads()
    work.limit_threads()
    try:
        for job in jobs:
            yield job, attempt(job)
    finally:
        torch.set_num_threads(threads)


def _beside(jobs: Sequence[Job], workers: int) -> Iterator[tuple[Job, Outcome]]:
    """In processes side by side. Where one dies, the pool is made anew for what it left undone.

    Raises:
        EnvironmentUnfitError: processes keep dying.
    """
    left = list(jobs)
    for _ in range(ATTEMPTS):
        pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), work.limit_threads)
        try:
            with _uninterrupted():
                waiting = {pool.submit(attempt, job): job for job in left}
            for future in as_completed(waiting):
                if isinstance(future.exception(), BrokenProcessPool):  # all that were not finished
                    continue
                left.remove(waiting[future])
                yield waiting[future], future.result()
        except BrokenProcessPool:
            pass  # while cells were still handed out
        finally:
            _end(pool)
        if not left:
            return
        left = left[workers:] + left[:workers]  # what ran when the process died comes last
    raise EnvironmentUnfitError(
        f"worker processes died {ATTEMPTS} times with {len(left)} cells left; memory may be short: lower --workers"
    )


def _end(pool: ProcessPoolExecutor) -> None:
    """Stop a pool without waiting for cells that are running."""
    for process in multiprocessing.active_children():  # this command's only ones
        process.terminate()
    pool.shutdown(wait=True, cancel_futures=True)
