"""Run many cells, in this process, in parallel, or on a Ray cluster.

Embeddings and keys are shared between cells and prepared first, so that worker processes only learn. Results are stored
one by one; if a worker process dies, only its cell is repeated.
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
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TypeAlias

import torch

from ssd_edge import files
from ssd_edge.data import cache
from ssd_edge.errors import EnvironmentUnfitError, InputError, SSDEdgeError
from ssd_edge.report import events
from ssd_edge.report.events import Listener, Message
from ssd_edge.report.wording import percent
from ssd_edge.reproduction import cells, work
from ssd_edge.reproduction.sources import Sources, locate, write_inputs, write_priors
from ssd_edge.reproduction.specs import Experiment, StreamSource, default_budget, streams
from ssd_edge.reproduction.work import Job
from ssd_edge.run.cluster import Cluster
from ssd_edge.run.train import pick_device, set_threads
from ssd_edge.system import duration, usable_cores

ATTEMPTS = 3  # pools of worker processes, before giving up
RESULTS = Path("results") / "reproduce"
INTERNAL = 1  # exit code of internal errors


@dataclasses.dataclass(frozen=True)
class Request:
    """Options of `ssd-edge reproduce`.

    Attributes:
        experiments: Experiments to run.
        budget: smoke, reduced or full; None for the default of each row.
        orders: Number of class orders; None for that of the budget.
        workers: Number of processes; 0 for one per usable core, or one with a GPU.
        out: Folder of results.md and results/.
        tiny_backbone: Backbone for Split Tiny-ImageNet, or None.
    """

    experiments: Sequence[Experiment]
    budget: str | None
    orders: int | None
    workers: int
    out: Path
    tiny_backbone: Path | None = None

    @property
    def results(self) -> Path:
        """Folder of stored results."""
        return self.out / RESULTS


def wanted(request: Request) -> list[cells.Setup]:
    """Return the distinct setups with their upper bounds, ordered by class order."""
    distinct: dict[str, cells.Setup] = {}
    for experiment in request.experiments:
        for stream in experiment.streams:
            for system in experiment.systems:
                budget = request.budget or default_budget(experiment, system)
                for setup in cells.setups(experiment, system, stream, budget, request.orders):
                    for cell in (setup, cells.upper_bound(setup)):
                        distinct.setdefault(cell.key(), cell)
    return sorted(distinct.values(), key=lambda setup: setup.order)


def missing_data(setups: Sequence[cells.Setup]) -> list[str]:
    """Return the files required by the setups that are missing under ``$SSD_EDGE_DATA``."""
    return sorted({data for setup in setups if locate(data := streams()[setup.stream].data) is None})


def plan(request: Request, sources: Sources, scratch: Path) -> tuple[list[Job], int]:
    """Return the jobs for cells that are not stored, and the number of stored cells; write their inputs to `scratch`.

    Raises:
        InputError: Data is missing, and the budget does not allow a stand-in.
    """
    setups = wanted(request)
    smoke = request.budget == "smoke"
    missing = missing_data(setups)
    if missing and not smoke:
        root = os.environ.get("SSD_EDGE_DATA")
        where = f"not under SSD_EDGE_DATA={root}" if root else "SSD_EDGE_DATA is not set"
        budget = f"the budget {request.budget}" if request.budget else "it"
        raise InputError(f"{budget} needs {', '.join(missing)}, but {where}; put the files there")
    jobs, stored = [], 0
    for setup in setups:
        stream = streams()[setup.stream]
        if _lacks_backbone(stream, sources):
            continue  # reported by `run`
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
    """Return the folder for unfinished cells; like the embeddings next to it, it can be deleted at any time."""
    return cache.folder().parent / "reproduce"


def run(request: Request, listener: Listener, cluster: Cluster | None = None) -> SSDEdgeError | None:
    """Run the cells that are not stored.

    Args:
        request: Options.
        listener: Receives progress events.
        cluster: Cluster that runs the cells; None for this machine.

    Returns:
        None, or an error with the worst exit code of the failed cells. The results of all others are stored.

    Raises:
        InputError: Data is missing; nothing was run.
    """
    device = pick_device("auto")
    set_threads(0)
    sources = Sources(device, listener, request.tiny_backbone)
    named = dict.fromkeys(stream for experiment in request.experiments for stream in experiment.streams)
    for stream in (name for name in named if _lacks_backbone(streams()[name], sources)):
        listener(
            Message(f"{stream}: skipped, because it needs a backbone that has not seen its classes (--tiny-backbone)")
        )
    shared = None
    if cluster is not None:  # its machines share the folder of the results
        request = dataclasses.replace(request, out=request.out.absolute())
        shared = request.results
        shared.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="ssd-edge-", dir=shared) as scratch:
        jobs, stored = plan(request, sources, Path(scratch))
        listener(Message(f"{len(jobs) + stored} cells, {stored} of them stored already"))
        workers = request.workers or (1 if device.type == "cuda" else usable_cores())
        if cluster is not None:
            outcomes = _on_cluster(jobs, cluster)
        else:
            workers = min(workers, max(1, len(jobs)))
            outcomes = _sequential(jobs) if workers == 1 else _parallel(jobs, workers)
        failures = _all(jobs, outcomes, listener)
    if not failures:
        return None
    error = SSDEdgeError(f"{len(failures)} of {len(jobs)} cells failed, see above; all others are stored")
    codes = [outcome.code for outcome in failures]
    error.exit_code = INTERNAL if INTERNAL in codes else max(codes)
    return error


def _lacks_backbone(stream: StreamSource, sources: Sources) -> bool:
    """Return True if the data exists but its backbone does not; digits replace missing data."""
    return stream.backbone != "shipped" and sources.tiny_backbone is None and locate(stream.data) is not None


def title(job: Job) -> str:
    """Return a short name of a cell."""
    asked = job.cell["asked"]
    readable = Path(cells.file_name(job.cell)).name.rsplit("-", 2)[0]
    return f"{asked['stream']} {readable}, order {job.cell['order']}"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Outcome of a job.

    Attributes:
        code: Exit code; 0 for success.
        text: Accuracy or error message.
        seconds: Duration.
    """

    code: int
    text: str
    seconds: float


def attempt(job: Job) -> Outcome:
    """Run one cell; errors are returned, so that other cells continue."""
    began = time.monotonic()
    try:
        result = work.run(job)
    except SSDEdgeError as error:
        return Outcome(error.exit_code, str(error), time.monotonic() - began)
    except Exception:
        return Outcome(INTERNAL, traceback.format_exc(), time.monotonic() - began)
    return Outcome(0, percent(result["accuracy"]), time.monotonic() - began)


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Delay interrupts until the end of the block; processes started inside ignore them."""
    received: list[int] = []
    # child processes inherit the mask, but other threads of this process could still receive the signal
    handler = signal.signal(signal.SIGINT, lambda number, frame: received.append(number))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGINT, handler)
    if received:
        raise KeyboardInterrupt


Outcomes: TypeAlias = Generator[tuple[Job, Outcome], None, None]


def _all(jobs: list[Job], outcomes: Outcomes, listener: Listener) -> list[Outcome]:
    """Report outcomes of the jobs as they come, and return those that failed."""
    failures, began = [], time.monotonic()
    width = len(str(len(jobs)))
    # closing ends the worker processes at once after an interrupt
    reporting = events.progress(listener, "reproduce", len(jobs), "cell", live_only=True)
    with contextlib.closing(outcomes), reporting as update:
        for done, (job, outcome) in enumerate(outcomes, 1):
            left = (time.monotonic() - began) / done * (len(jobs) - done)
            success = f"{outcome.text} in {duration(outcome.seconds)}"
            status = f"FAILED, {outcome.text.strip()}" if outcome.code else success
            listener(Message(f"[{done:>{width}}/{len(jobs)}] {title(job)}: {status}; {duration(left)} left"))
            update(done - 1, 1.0)
            if outcome.code:
                failures.append(outcome)
    return failures


def _sequential(jobs: Sequence[Job]) -> Outcomes:
    """Run jobs one after the other in this process."""
    threads = torch.get_num_threads()
    work.limit_threads()
    try:
        for job in jobs:
            yield job, attempt(job)
    finally:
        torch.set_num_threads(threads)


def _parallel(jobs: Sequence[Job], workers: int) -> Outcomes:
    """Run jobs in parallel processes; if one dies, a new pool runs the remaining jobs.

    Raises:
        EnvironmentUnfitError: Processes keep dying.
    """
    left = list(jobs)
    for _ in range(ATTEMPTS):
        pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), work.limit_threads)
        try:
            with _uninterrupted():
                waiting = {pool.submit(attempt, job): job for job in left}
            for future in as_completed(waiting):
                if isinstance(future.exception(), BrokenProcessPool):  # of all unfinished jobs
                    continue
                left.remove(waiting[future])
                yield waiting[future], future.result()
        except BrokenProcessPool:
            pass  # while jobs were being submitted
        finally:
            _end(pool)
        if not left:
            return
        left = left[workers:] + left[:workers]  # jobs that ran when the process died come last
    raise EnvironmentUnfitError(
        f"worker processes died {ATTEMPTS} times with {len(left)} cells left; memory may be short: lower --workers"
    )


def _on_cluster(jobs: Sequence[Job], cluster: Cluster) -> Outcomes:
    """Run jobs as tasks of a Ray cluster; one whose process dies is run again."""
    ray = cluster.ray
    task = ray.remote(num_cpus=1, max_retries=ATTEMPTS - 1)(_attempt_alone)
    waiting = {task.remote(job): job for job in jobs}
    while waiting:
        (done, *_), _ = ray.wait(list(waiting))
        yield waiting.pop(done), ray.get(done)


def _attempt_alone(job: Job) -> Outcome:
    """Run one cell on one core of a process that runs nothing else."""
    work.limit_threads()
    return attempt(job)


def _end(pool: ProcessPoolExecutor) -> None:
    """Stop a pool without waiting for running cells."""
    for process in multiprocessing.active_children():  # there are no others in this process
        process.terminate()
    pool.shutdown(wait=True, cancel_futures=True)
