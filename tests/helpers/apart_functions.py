"""Functions that the tests of `ssd_edge.ort.apart` call in a child process."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import numpy as np

from ssd_edge.errors import InputError


def twice(arrays, options):
    print("this must not mix with the reply")
    os.write(1, b"nor this")
    return {name: 2 * array for name, array in arrays.items()}


def refuse(arrays, options):
    raise InputError(f"it has {options['what']}")


def hang(arrays, options):
    Path(options["pid"]).write_text(str(os.getpid()))
    while True:
        time.sleep(1)


def swell(arrays, options):
    kept = []
    while True:
        kept.append(np.empty(2**27, np.uint8))


def crash(arrays, options):
    os.write(2, b"something about a driver\n")
    os.kill(os.getpid(), signal.SIGSEGV)


def babble(arrays, options):
    return {"zeros": np.zeros(2**27, np.uint8)}
