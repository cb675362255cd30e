"""Learns as jobs: one at a time in a thread of its own, with progress, the time left and cancel."""

from __future__ import annotations

import collections
import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np

from device_runtime.device import Device, require_torch
from device_runtime.results import LearnResult
from device_runtime.serve.asked import BusyError, UnknownError, meaning
from device_runtime.serve.events import Events
from ssd_edge.errors import GateRefusedError, SSDEdgeError

if TYPE_CHECKING:
    from device_runtime.learning.guard import Limits

log = logging.getLogger(__name__)

MOST_WAITING = 8  # jobs that wait, each with its images
MOST_BYTES = 256 * 2**20  # of the images of all jobs, beside those of captures
MOST_KEPT = 32  # jobs that are remembered
NICE = 5  # of the thread that learns: predictions go first
COLLECTING, SAVING = "collecting", "saving"  # stages before and after those of a learn
# Share of the time of each stage, until a job has measured it here.
SHARES = {COLLECTING: 0.0, "embedding": 0.6, "learning": 0.1, "trying": 0.2, "checking": 0.05, SAVING: 0.05}
WAITING, RUNNING, DONE, REFUSED, FAILED, CANCELLED = "waiting", "running", "done", "refused", "failed", "cancelled"

Gather = Callable[[Callable[[float], object]], Mapping[str, Sequence[np.ndarray]]]


def default_limits() -> Limits:
    """Return the default limits, with refusals that name no options of commands; imports PyTorch.

    Raises:
        EnvironmentUnfitError: It is not installed.
    """
    require_torch()
    from device_runtime.learning.guard import Limits

    return Limits(hints=False)


class CancelledError(Exception):
    """A job was cancelled before it changed anything."""


class Job:
    """A learn that was asked for.

    Args:
        number: Its number.
        labels: Names of the classes.
        gather: Gets a function to call with the share that is there, and returns the images by class.
        limits: Limits on forgetting; None for the defaults.
        ended: Called with its last state, before that is seen.
        held: Bytes of its images; 0 if they are not in memory for it alone.

    Attributes:
        id: Its number as a text.
        label: Names of the classes, joined by commas.
        state: ``waiting``, ``running``, ``done``, ``refused`` by the guard, ``failed`` or ``cancelled``.
        stage: What it does.
        share: Share of the whole that is done, 0..1.
        left: Seconds that it will still take; None if that is not known.
        result: What was learned; None unless it is done.
        error: Why it has not, with the exit code of a command; None otherwise.
    """

    def __init__(
        self,
        number: int,
        labels: Sequence[str],
        gather: Gather,
        limits: Limits | None,
        ended: Callable[[str], object],
        held: int,
    ) -> None:
        self.id, self.label = str(number), ", ".join(labels)
        self.state, self.stage, self.share = WAITING, "", 0.0
        self.left: float | None = None
        self.result: LearnResult | None = None
        self.error: dict[str, Any] | None = None
        self.gather: Gather | None = gather
        self.limits, self.ended, self.held = limits, ended, held
        self.claimed = False  # by what runs it, or ends it before
        self.cancelled = threading.Event()

    @property
    def over(self) -> bool:
        """True once it has ended."""
        return self.state not in (WAITING, RUNNING)

    def to_dict(self) -> dict[str, Any]:
        """Return the job as JSON values."""
        return {
            "id": self.id,
            "kind": "learn",
            "label": self.label,
            "state": self.state,
            "stage": self.stage,
            "share": round(self.share, 3),
            "seconds_left": None if self.left is None else round(self.left, 1),
            "result": None if self.result is None else self.result.to_dict(),
            "error": self.error,
        }


class Jobs:
    """The jobs of a device.

    Args:
        device: An open device.
        events: Where every change of a job is published.
        changing: Held while the device is changed.
        ended: Called with the last state of every job, and the seconds that it took.
    """

    def __init__(
        self,
        device: Device,
        events: Events,
        changing: threading.Lock,
        ended: Callable[[str, float], object] = lambda state, seconds: None,
    ) -> None:
        self._device, self._events, self._changing, self._ended = device, events, changing, ended
        self._thread = ThreadPoolExecutor(1, "learn")
        self._lock = threading.Lock()
        self._jobs: collections.OrderedDict[str, Job] = collections.OrderedDict()
        self._number = 0
        self._shares = dict(SHARES)

    def start(
        self,
        labels: Sequence[str],
        gather: Gather,
        limits: Limits | None = None,
        ended: Callable[[str], object] = lambda state: None,
        held: int = 0,
    ) -> Job:
        """Add a job; see `Job`.

        Raises:
            BusyError: Too many wait already.
        """
        with self._lock:
            if sum(job.state == WAITING for job in self._jobs.values()) >= MOST_WAITING:
                raise BusyError(f"{MOST_WAITING} classes wait to be learned already; try again when some are done")
            if held and held + sum(job.held for job in self._jobs.values() if not job.over) > MOST_BYTES:
                raise BusyError("too many images wait to be learned already; try again when some are done")
            self._number += 1
            job = Job(self._number, labels, gather, limits, ended, held)
            self._jobs[job.id] = job
            over = [old.id for old in self._jobs.values() if old.over]
            for old in over[: max(0, len(self._jobs) - MOST_KEPT)]:
                del self._jobs[old]
        self._tell(job)
        self._thread.submit(self._run, job)
        return job

    def get(self, name: str) -> Job:
        """Return a job.

        Raises:
            UnknownError: There is none of this id, or it was long ago.
        """
        with self._lock:
            if (job := self._jobs.get(name)) is None:
                raise UnknownError(
                    f"there is no job '{name[:40]}'; the last {MOST_KEPT} are kept, until the next start"
                )
            return job

    def list(self) -> Sequence[Job]:
        """Return the jobs, newest first."""
        with self._lock:
            return list(reversed(self._jobs.values()))

    @property
    def current(self) -> Job | None:
        """The job that runs, or else the next one; None if there is none."""
        return next((job for job in reversed(self.list()) if not job.over), None)

    def cancel(self, name: str) -> Job:
        """Cancel a job, unless its result is being saved: then it will be done. One that waits ends at once.

        Raises:
            UnknownError: See `get`.
        """
        job = self.get(name)
        job.cancelled.set()
        if self._claim(job):
            self._end(job, CANCELLED, 0.0)
        return job

    def _claim(self, job: Job) -> bool:
        """Return True for the first who asks: the one that runs a job or ends it before."""
        with self._lock:
            first, job.claimed = not job.claimed, True
        return first

    def close(self) -> None:
        """Cancel all jobs and wait for the thread."""
        for job in self.list():
            job.cancelled.set()
        self._thread.shutdown(cancel_futures=True)

    def _run(self, job: Job) -> None:
        if not self._claim(job):
            return
        with contextlib.suppress(OSError, AttributeError):  # not on every system
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
        began, clock = time.monotonic(), _Clock(job, self._shares, self._tell)
        state, error, result = FAILED, None, None
        try:
            clock.check()
            job.state = RUNNING
            assert job.gather is not None
            images = job.gather(lambda share: clock.watch(COLLECTING, share, None))
            limits = job.limits or default_limits()
            with self._changing:
                result = self._device.learn_all(images, limits, None, clock.watch)
            state = DONE
            self._shares = clock.measured()
        except CancelledError:
            state = CANCELLED
        except GateRefusedError as refused:
            state, error = REFUSED, _told(refused)
        except Exception as failure:
            known = meaning(failure)
            if known is None:
                log.error("internal error: %s", failure, exc_info=failure, extra={"code": "internal_error"})
                known = SSDEdgeError(f"internal error: {type(failure).__name__}; the log of the device says more")
            error = _told(known)
        finally:
            job.result, job.error = result, error
            self._end(job, state, time.monotonic() - began)

    def _end(self, job: Job, state: str, seconds: float) -> None:
        log.info("learn '%s': %s in %.1f s", job.label, state, seconds, extra={"code": "job"})
        self._ended(state, seconds)
        job.ended(state)
        job.gather, job.left, job.share = None, None, 1.0 if state == DONE else job.share
        job.state = state  # last: whoever sees it sees all of it, and what follows from it
        self._tell(job)

    def _tell(self, job: Job) -> None:
        self._events.publish("job", **job.to_dict())


class _Clock:
    """Progress of a job over all its stages.

    Args:
        job: The job.
        shares: Expected share of the time of each stage.
        tell: Called after a change of the job.
    """

    def __init__(self, job: Job, shares: Mapping[str, float], tell: Callable[[Job], object]) -> None:
        self._job, self._shares, self._tell = job, shares, tell
        self._began = time.monotonic()
        self._starts: dict[str, float] = {}

    def check(self) -> None:
        """Stop here if the job was cancelled.

        Raises:
            CancelledError: It was.
        """
        if self._job.cancelled.is_set():
            raise CancelledError

    def watch(self, stage: str, share: float, left: float | None) -> None:
        """Report the share of a stage that is done; see `budget.Watcher`.

        Raises:
            CancelledError: The job was cancelled; nothing has changed.
        """
        self.check()  # after the last call of a learn nothing stops it: its commit begins
        job = self._job
        if stage == "checking" and share >= 1:
            stage, share = SAVING, 0.0
        now = time.monotonic()
        self._starts.setdefault(stage, now)
        stages = list(self._shares)
        before = stages[: stages.index(stage)] if stage in stages else []
        # collecting takes as long as someone shows something: its time says nothing about the rest
        whole = sum(self._shares.values()) or 1.0
        done = (sum(self._shares[one] for one in before) + share * self._shares.get(stage, 0.0)) / whole
        job.stage, job.share = stage, max(job.share, min(done, 1.0))
        spent = now - self._starts.get("embedding", now)
        if stage == COLLECTING or job.share <= 0 or spent <= 0:
            job.left = None
        else:
            job.left = spent * (1 - job.share) / job.share
        self._tell(job)

    def measured(self) -> dict[str, float]:
        """Return the share of the time that each stage has taken, to be expected of the next job."""
        now, stages = time.monotonic(), [stage for stage in SHARES if stage in self._starts and stage != COLLECTING]
        ends = [*(self._starts[stage] for stage in stages[1:]), now]
        took = {stage: end - self._starts[stage] for stage, end in zip(stages, ends, strict=True)}
        whole = sum(took.values()) or 1.0
        return {stage: took.get(stage, 0.0) / whole for stage in SHARES}


def _told(error: SSDEdgeError) -> dict[str, Any]:
    return {"error": str(error), "code": error.exit_code}
