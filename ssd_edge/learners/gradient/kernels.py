"""One epoch of SDMLP and SSD as one compiled function: lazy Top-K with a proof, losses, touched-row update.

Requires Numba (``pip install 'ssd-edge[fast]'``); the module `epoch` decides when it runs and owns the arrays. It
computes what `SDMLP.forward`, `SDMLP.gradients` and `SDMLP.apply` compute, sample by sample, but evaluates only neurons
that could enter a sample's Top-K. docs/speed.md explains why that is exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
import numpy as np
from numpy.typing import NDArray

LANES = 64  # width of a block of always-evaluated keys, whose scores are computed together
REASSOCIATE = {"reassoc", "contract", "nsz"}  # sums may be vectorised; NaN and infinity are kept

# indices into the array of totals, sums over the batches of an epoch weighted by their size
NORM, CLIPPED, ACTIVE, CROSS_ENTROPY, LOGIT, HIDDEN, MISSES, TOTALS = range(8)

Array = NDArray[Any]
Function = TypeVar("Function", bound=Callable[..., Any])


def _inner(function: Function) -> Function:
    """Compile a function that other compiled functions call; mypy sees its Python signature."""
    return cast(Function, numba.njit(fastmath=REASSOCIATE, inline="never")(function))


@_inner
def _dot(a: Array, b: Array) -> Any:
    total = a.dtype.type(0)
    for d in range(a.shape[0]):
        total += a[d] * b[d]
    return total


@_inner
def _insert(score: float, neuron: int, scores: Array, neurons: Array, filled: int) -> int:
    """Insert a score into a descending list of fixed capacity; return its new number of elements."""
    length: int = scores.shape[0]
    place = min(filled, length - 1)
    while place > 0 and scores[place - 1] < score:
        scores[place] = scores[place - 1]
        neurons[place] = neurons[place - 1]
        place -= 1
    scores[place] = score
    neurons[place] = neuron
    return min(filled + 1, length)


@_inner
def _place(changed: Array, keys: Array, listed: Array, blocks: Array) -> None:
    """Copy the keys of some lanes to the transposed blocks ``(blocks, D, LANES)``, a few cache lines at a time."""
    dim = keys.shape[1]
    for first in range(0, dim, 16):
        for at in range(changed.shape[0]):
            lane = changed[at]
            key, block, column = keys[listed[lane]], lane // LANES, lane % LANES
            for d in range(first, min(first + 16, dim)):
                blocks[block, d, column] = key[d]


@_inner
def _lane_scores(x: Array, batch: Array, used: Array, nonzero: Array, blocks: Array, lanes: int, scores: Array) -> None:
    """Compute the scores ``(B, lanes)`` of a batch with the keys in lanes.

    A block stays in the cache while all samples are multiplied with it. Only nonzero entries of an input are processed,
    eight at a time.
    """
    for b in range(batch.shape[0]):
        sample, found = x[batch[b]], 0
        for d in range(sample.shape[0]):
            used[b, found] = d
            found += sample[d] != 0
        nonzero[b] = found
    for number in range((lanes + LANES - 1) // LANES):
        block = blocks[number]
        for b in range(batch.shape[0]):
            sample, u, total, n = x[batch[b]], used[b], scores[b, number * LANES : (number + 1) * LANES], 0
            for lane in range(LANES):
                total[lane] = 0
            while n + 8 <= nonzero[b]:
                a0, a1, a2, a3 = u[n], u[n + 1], u[n + 2], u[n + 3]
                b0, b1, b2, b3 = u[n + 4], u[n + 5], u[n + 6], u[n + 7]
                x0, x1, x2, x3 = sample[a0], sample[a1], sample[a2], sample[a3]
                y0, y1, y2, y3 = sample[b0], sample[b1], sample[b2], sample[b3]
                for lane in range(LANES):
                    first = x0 * block[a0, lane] + x1 * block[a1, lane] + x2 * block[a2, lane] + x3 * block[a3, lane]
                    other = y0 * block[b0, lane] + y1 * block[b1, lane] + y2 * block[b2, lane] + y3 * block[b3, lane]
                    total[lane] += first + other
                n += 8
            while n < nonzero[b]:
                a0 = u[n]
                x0 = sample[a0]
                for lane in range(LANES):
                    total[lane] += x0 * block[a0, lane]
                n += 1


@_inner
def _lazy(
    sample: Array,
    keys: Array,
    cached: Array,
    cached_scores: Array,
    bound: float,
    path: Array,
    lane: Array,
    scores: Array,
    listed: Array,
    delta: float,
    margin: float,
    top: Array,
    winners: Array,
) -> tuple[bool, int]:
    """Find the largest scores of one sample from its cache.

    The scores of neurons in lanes are given. Cached neurons follow in descending order until no other can enter.

    Returns:
        True if the bound proves the result, and the number of scores.
    """
    rank, filled = top.shape[0], 0
    for at in range(scores.shape[0]):
        if filled < rank or scores[at] > top[rank - 1]:
            filled = _insert(scores[at], listed[at], top, winners, filled)
    for place in range(cached.shape[0]):
        neuron = cached[place]
        if neuron < 0:
            break
        if filled == rank and cached_scores[place] + delta + margin <= top[rank - 1]:
            return True, filled
        if lane[neuron] >= 0 or (filled == rank and cached_scores[place] + path[neuron] + margin <= top[rank - 1]):
            continue
        score = _dot(sample, keys[neuron])
        if filled < rank or score > top[rank - 1]:
            filled = _insert(score, neuron, top, winners, filled)
    return filled == rank and bound + delta + margin <= top[rank - 1], filled


@_inner
def _full(
    samples: Array,
    missed: Array,
    keys: Array,
    path: Array,
    lane: Array,
    cached: Array,
    cached_scores: Array,
    bound: Array,
    top: Array,
    winners: Array,
    filled: Array,
    near: Array,
    near_winners: Array,
) -> None:
    """Evaluate every neuron for the samples without a proof, and cache their best neurons anew.

    Args:
        samples: ``(Q, D)``, inputs.
        missed: ``(Q, 2)``, index of each sample in the task and in the batch.
        near: ``(Q, m + 1)``, buffer for scores; `near_winners` is the buffer for neurons.
    """
    for q in range(missed.shape[0]):  # neurons without a lane are added again below
        b, kept = missed[q, 1], 0
        for place in range(filled[b]):
            if lane[winners[b, place]] >= 0:
                top[b, kept], winners[b, kept] = top[b, place], winners[b, place]
                kept += 1
        filled[b] = kept
    last, rank = near.shape[1] - 1, top.shape[1]
    found = np.zeros(missed.shape[0], np.int64)
    for neuron in range(keys.shape[0]):
        if lane[neuron] >= 0:
            continue
        key = keys[neuron]
        for q in range(missed.shape[0]):
            b, score = missed[q, 1], _dot(samples[q], key)
            if filled[b] < rank or score > top[b, rank - 1]:
                filled[b] = _insert(score, neuron, top[b], winners[b], filled[b])
            # relative to the key at the time when all caches were filled, so that one bound holds for all
            score = near.dtype.type(score - path[neuron])
            if found[q] <= last or score > near[q, last]:
                found[q] = _insert(score, neuron, near[q], near_winners[q], found[q])
    for q in range(missed.shape[0]):
        sample = missed[q, 0]
        for place in range(last):
            cached[sample, place] = near_winners[q, place] if place < found[q] else -1
            cached_scores[sample, place] = near[q, place]
        bound[sample] = near[q, last] if found[q] > last else -np.inf


@_inner
def _logits_loss(
    logits: Array,
    label: int,
    wanted: Array,
    entropy: float,
    outputs: Array,
    weights: Array,
    temperature: float,
    slope: Array,
) -> tuple[Any, Any]:
    """Compute ∂L/∂logits of one sample into `slope`; return its cross-entropy and logit distillation."""
    one = logits.dtype.type(1)
    largest, total = logits[0], logits.dtype.type(0)
    for c in range(logits.shape[0]):
        largest = max(largest, logits[c])
    for c in range(logits.shape[0]):
        slope[c] = math.exp(logits[c] - largest)
        total += slope[c]
    loss = math.log(total) + largest - logits[label]
    for c in range(logits.shape[0]):
        slope[c] *= weights[0] / total
    slope[label] -= weights[0]
    if not wanted.shape[0]:
        return loss, one * 0
    largest, total, crossed = logits[outputs[0]], logits.dtype.type(0), logits.dtype.type(0)
    for c in outputs:
        largest = max(largest, logits[c])
    for c in outputs:
        total += math.exp((logits[c] - largest) / temperature)
    shift = math.log(total) + largest / temperature
    for at in range(outputs.shape[0]):
        log_q = logits[outputs[at]] / temperature - shift
        crossed += wanted[at] * log_q
        slope[outputs[at]] += weights[1] * temperature * (math.exp(log_q) - wanted[at])
    return loss, temperature * temperature * (entropy - crossed)


@_inner
def _hidden_loss(
    active: Array,
    value: Array,
    table: Array,
    width: int,
    slots: Array,
    wanted: Array,
    rest: float,
    entropy: float,
    weight: float,
    temperature: float,
    buffer: Array,
    slope: Array,
) -> Any:
    """Compute ∂L/∂a of one sample's active neurons into `slope`; return its hidden distillation.

    All zero entries of the table have the same probability (`rest` for the teacher), so they need no work. The loss is
    a small difference of large numbers, therefore float64.
    """
    largest, inside = 0.0, 0
    for e in range(active.shape[0]):
        if table[active[e]] >= 0:
            largest, inside = max(largest, value[e] / temperature), inside + 1
    total = (width - inside) * math.exp(-largest)
    for e in range(active.shape[0]):
        if table[active[e]] >= 0:
            total += math.exp(value[e] / temperature - largest)
    shift = math.log(total) + largest
    for at in range(slots.shape[0]):
        if slots[at] < width:
            buffer[slots[at]] = wanted[at]
    crossed = -shift
    for e in range(active.shape[0]):
        slot = table[active[e]]
        slope[e] = 0
        if slot >= 0:
            p = buffer[slot] if buffer[slot] >= 0 else rest
            scaled = value[e] / temperature
            crossed += p * scaled
            slope[e] = weight * temperature * (math.exp(scaled - shift) - p)
    for at in range(slots.shape[0]):
        if slots[at] < width:
            buffer[slots[at]] = -1
    return temperature * temperature * (entropy - crossed)


@_inner
def _rescore(sample: Array, keys: Array, lane: Array, top: Array, winners: Array, filled: int) -> None:
    """Compute the scores of chosen neurons in lanes as for all others, so that equal keys give equal bits."""
    for place in range(filled):
        neuron, score = winners[place], top[place]
        if lane[neuron] >= 0:
            score = _dot(sample, keys[neuron])
        at = place
        while at > 0 and top[at - 1] < score:
            top[at], winners[at] = top[at - 1], winners[at - 1]
            at -= 1
        top[at], winners[at] = score, neuron


@_inner
def _active(
    top: Array,
    winners: Array,
    filled: int,
    subtract: int,
    lane: Array,
    listed: Array,
    gammas: Array,
    sample: Array,
    keys: Array,
    active: Array,
    value: Array,
    positive: Array,
) -> int:
    """Find the active neurons of one sample after inhibition; return their number."""
    rank, found = top.shape[0], 0
    zero = top.dtype.type(0)
    inhibition = max(zero, top[rank - 1]) if subtract else zero
    for place in range(min(filled, rank - subtract)):
        at = lane[winners[place]]
        if 0 <= at < gammas.shape[0]:
            continue  # open switch, handled below
        if top[place] > inhibition:
            active[found], value[found], positive[found] = winners[place], top[place] - inhibition, 1
            found += 1
    for at in range(gammas.shape[0]):
        score = _dot(sample, keys[listed[at]])
        answer = max(score, zero) - gammas[at] * inhibition
        if answer > 0:
            active[found], value[found], positive[found] = listed[at], answer, score > 0
            found += 1
    return found


@_inner
def _move(key: Array, slope: Array, rate: float, fresh: Array) -> tuple[float, bool]:
    """Update, clamp and normalise one key; return the distance moved (rounded up) and whether it is finite."""
    zero, squares, moved = key.dtype.type(0), key.dtype.type(0), key.dtype.type(0)
    for d in range(key.shape[0]):
        fresh[d] = max(key[d] - rate * slope[d], zero)
        squares += fresh[d] * fresh[d]
    norm = max(math.sqrt(squares), key.dtype.type(1e-12))
    for d in range(key.shape[0]):
        after = fresh[d] / norm
        moved += (after - key[d]) * (after - key[d])
        key[d] = after
    return 1.001 * math.sqrt(moved), np.isfinite(squares)


def _epoch(
    x: Array,
    labels: Array,
    order: Array,
    batch: int,
    keys: Array,
    values: Array,
    counters: Array,
    frozen: Array,
    state: tuple[Array, ...],
    lanes: tuple[Array, ...],
    loss: tuple[Array, ...],
    settings: Array,
    totals: Array,
) -> None:
    """Run one pass over a task, in place.

    Args:
        x: ``(N, D)``, prepared inputs.
        labels: int64 ``(N,)``.
        order: int64 ``(N,)``.
        batch: samples per step.
        keys: ``(r, D)``; changed, like `values` ``(r, C)`` and `counters` ``(r,)``.
        frozen: bool ``(r,)``, neurons whose keys and values stay.
        state: fields of `epoch.Caches`; scores are reduced by the distance that the key had moved when cached.
        lanes: fields of `epoch.Lanes`.
        loss: fields of `epoch.TeacherArrays`.
        settings: float64 ``(11,)``: learning rate, clip, weights of the three losses, temperature, C of the switch,
            width n of the table, rank (number of scores that the inhibition uses), 1 if it subtracts, and the distance
            that a key may move before it gets a lane.
        totals: float64 ``(TOTALS,)``; overwritten with means over the epoch, `MISSES` with a count.
    """
    cached, cached_scores, bound, slack, path = state
    lane, listed, blocks, counts = lanes
    outputs, wanted, entropy, table, slots, hidden, rest, hidden_entropy = loss
    kind, size, dim, neurons, classes = keys.dtype.type, x.shape[0], x.shape[1], keys.shape[0], values.shape[1]
    clip, switch, width, rank = settings[1], kind(settings[6]), int(settings[7]), int(settings[8])
    temperature, subtract, limit, opened = kind(settings[5]), int(settings[9]), settings[10], counts[1]
    margin = 3.0 * dim * np.finfo(keys.dtype).eps  # rounding errors of two scores and of the sums with them
    near_size, most = cached.shape[1] + 1, rank + opened
    rows = min(neurons, batch * most)
    top, winners, filled = (
        np.empty((batch, rank), keys.dtype),
        np.empty((batch, rank), np.int32),
        np.zeros(batch, np.int64),
    )
    active, value = np.empty(most, np.int32), np.empty(most, keys.dtype)
    positive, to_active = np.empty(most, np.int8), np.zeros(most, keys.dtype)
    logits, slope, buffer = np.empty(classes, keys.dtype), np.empty(classes, keys.dtype), np.full(width, -1.0)
    key_slope, value_slope = np.empty((rows, dim), keys.dtype), np.empty((rows, classes), keys.dtype)
    slot, touched, active_count = np.full(neurons, -1, np.int32), np.empty(rows, np.int32), np.empty(rows, np.int64)
    fresh, missed = np.empty(dim, keys.dtype), np.empty((batch, 2), np.int64)
    used, nonzero = np.empty((batch, dim + 1), np.uint32), np.empty(batch, np.int64)
    scores = np.empty((batch, blocks.shape[0] * LANES), keys.dtype)
    weights, gammas, delta = np.empty(2, keys.dtype), np.empty(opened, keys.dtype), 0.0
    for neuron in range(neurons):
        if lane[neuron] < 0:
            delta = max(delta, path[neuron])
    totals[:] = 0
    for start in range(0, size, batch):
        count, misses, reached = min(batch, size - start), 0, 0
        weights[0], weights[1] = kind(settings[2] / count), kind(settings[3] / count)
        for at in range(opened):
            gammas[at] = min(max(kind(2) * counters[listed[at]] / switch - kind(1), kind(-1)), kind(1))
        # Top-K
        _lane_scores(x, order[start : start + count], used, nonzero, blocks, counts[0], scores)
        for b in range(count):
            i = order[start + b]
            proved, filled[b] = _lazy(
                x[i], keys, cached[i], cached_scores[i], bound[i], path, lane, scores[b, : counts[0]], listed,
                delta, margin, top[b], winners[b],
            )  # fmt: skip
            if not proved:
                missed[misses, 0], missed[misses, 1] = i, b
                misses += 1
        if misses:
            near, near_winners = np.empty((misses, near_size), keys.dtype), np.empty((misses, near_size), np.int32)
            _full(
                x[missed[:misses, 0]], missed[:misses], keys, path, lane, cached, cached_scores, bound,
                top, winners, filled, near, near_winners,
            )  # fmt: skip
        # losses and gradients
        for b in range(count):
            i = order[start + b]
            slack[i] = top[b, rank - 1] - bound[i]
            _rescore(x[i], keys, lane, top[b], winners[b], filled[b])
            found = _active(
                top[b], winners[b], filled[b], subtract, lane, listed, gammas, x[i], keys, active, value, positive
            )
            logits[:] = 0
            for e in range(found):
                for c in range(classes):
                    logits[c] += value[e] * values[active[e], c]
            entropy_loss, distilled = _logits_loss(
                logits, labels[i], wanted[i], entropy[i], outputs, weights, temperature, slope
            )
            totals[CROSS_ENTROPY] += entropy_loss
            totals[LOGIT] += distilled
            totals[ACTIVE] += found
            if width:
                totals[HIDDEN] += _hidden_loss(
                    active[:found], value, table, width, slots[i], hidden[i], rest[i], hidden_entropy[i],
                    settings[4] / count, settings[5], buffer, to_active,
                )  # fmt: skip
            for e in range(found):
                neuron = active[e]
                at = slot[neuron]
                if at < 0:
                    at, slot[neuron], touched[reached] = reached, reached, neuron
                    active_count[at] = 0
                    key_slope[at, :] = 0
                    value_slope[at, :] = 0
                    reached += 1
                active_count[at] += 1
                if frozen[neuron]:
                    continue
                pull = to_active[e]
                for c in range(classes):
                    pull += slope[c] * values[neuron, c]
                    value_slope[at, c] += value[e] * slope[c]
                if positive[e]:
                    sample, row = x[i], key_slope[at]
                    for d in range(dim):
                        row[d] += pull * sample[d]
        # the step
        squares = 0.0
        for at in range(reached):
            squares += _dot(key_slope[at], key_slope[at]) + _dot(value_slope[at], value_slope[at])
        norm = math.sqrt(squares)
        rate = kind(settings[0] * min(1.0, clip / (norm + 1e-6)))
        totals[NORM] += norm * count
        totals[CLIPPED] += (norm > clip) * count
        totals[MISSES] += misses
        placed = 0
        for at in range(reached):
            neuron = touched[at]
            slot[neuron] = -1
            counters[neuron] += active_count[at]
            if frozen[neuron]:
                continue
            for c in range(classes):
                values[neuron, c] = max(values[neuron, c] - rate * value_slope[at, c], kind(0))
            moved, finite = _move(keys[neuron], key_slope[at], rate, fresh)
            if not finite:
                totals[NORM] = np.nan
            path[neuron] += moved
            if lane[neuron] < 0:
                if path[neuron] <= limit or counts[0] >= listed.shape[0]:
                    delta = max(delta, path[neuron])
                    continue
                lane[neuron], listed[counts[0]] = counts[0], neuron
                counts[0] += 1
            touched[placed] = lane[neuron]
            placed += 1
        _place(touched[:placed], keys, listed, blocks)
    for place in range(MISSES):
        totals[place] /= size


def _compiled(cache: bool) -> Callable[..., None]:
    return numba.njit(fastmath=REASSOCIATE, nogil=True, cache=cache)(_epoch)


CACHED = True  # True if machine code is cached for the next process
try:
    _kernel = _compiled(True)
except RuntimeError:  # no folder for the cache: read-only installation and no home folder
    _kernel, CACHED = _compiled(False), False


def epoch(*args: Any) -> None:
    """Run `_epoch` compiled; if its machine code cannot be cached, the next process compiles it again."""
    global _kernel
    try:
        _kernel(*args)
    except OSError:  # raised while compiling, so no array has been changed yet
        _kernel = _compiled(False)
        _kernel(*args)
