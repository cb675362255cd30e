"""One epoch of SDMLP and SSD as one compiled function: lazy Top-K with a proof, losses, penalties, row updates.

Requires Numba (``pip install 'ssd-edge[fast]'``); the module `epoch` decides when it runs and owns the arrays. It
computes what `Trainer.touched_rows_epoch` computes, sample by sample, but evaluates only neurons that could be active,
and lets the steps that only a penalty takes wait until a row is looked at. docs/speed.md explains why that is exact.

Everything is in one file because Numba's cache on disk notices changes in the file of the outermost function only.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, cast

import numba
import numpy as np
from numpy.typing import NDArray

LANES = 64  # width of a block of always-evaluated keys, whose scores are computed together
REASSOCIATE = {"reassoc", "contract", "nsz"}  # sums may be vectorised; NaN and infinity are kept

# indices into the array of totals, sums over the batches of an epoch weighted by their size
NORM, CLIPPED, ACTIVE, CROSS_ENTROPY, LOGIT, HIDDEN, MISSES, EVALUATED, TOTALS = range(9)

# settings of an epoch, as `epoch.CompiledEpochs.run` passes them
LR, CLIP, CROSS_WEIGHT, LOGIT_WEIGHT, HIDDEN_WEIGHT, TEMPERATURE, SWITCH, WIDTH, RANK, SUBTRACT, LIMIT = range(11)
LOWEST, PENALTY, BETA, SETTINGS = range(11, 15)

SLACK = 1 + 1e-9  # covers the rounding of running sums in a bound

Array = NDArray[Any]
Function = TypeVar("Function", bound=Callable[..., Any])


class Weights(NamedTuple):
    """Keys and values with the sums of a penalty, as in `epoch.PenaltyArrays`."""

    keys: Array
    values: Array
    importance: Array
    anchored: Array
    value_importance: Array
    value_anchored: Array


class Rows(NamedTuple):
    """State of the rows that wait for steps of a penalty.

    Attributes:
        current: int64 ``(r,)``, the step before which a row stands.
        steep: ``(r,)``, largest curvature of the penalty.
        due: int64 ``(r,)``, the step before which a row without a lane must catch up.
        pull: ``(r,)``, bound on ‖∂penalty‖² until then.
        reserve: ``(r,)``, bound on the distance until then, included in `path`.
        path: ``(r,)``, as in `epoch.Caches`.
        rates: ``(steps,)``, learning rate after clipping.
        norms: ``(steps,)``, ‖gradient‖² as far as it is known.
        known: bool ``(steps,)``, True where `norms` includes the rows that wait.
        moving: bool ``(r,)``, rows that the penalty moves.
        lane: int32 ``(r,)``, as in `epoch.Lanes`.
        sums: ``(3,)``, sum of `pull`, the longest path of a key without a lane, and the least of their `due`.
    """

    current: Array
    due: Array
    steep: Array
    pull: Array
    reserve: Array
    path: Array
    rates: Array
    norms: Array
    known: Array
    moving: Array
    lane: Array
    sums: Array


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
def _gamma(counters: Array, neuron: int, switch: float) -> Any:
    """Return γ of a neuron, as `topk.gaba` does."""
    kind = counters.dtype.type
    return min(max(kind(2) * counters[neuron] / switch - kind(1), kind(-1)), kind(1))


@_inner
def _drop(level: float, top: Array, lowest: float) -> float:
    """Return how far the inhibition has fallen since a cache was filled; a rise counts only by the lowest γ."""
    drop: float = level - max(top[top.shape[0] - 1], 0.0)
    return drop if drop >= 0 else drop * lowest


@_inner
def _lane_of(neuron: int, limit: float, path: Array, lane: Array, listed: Array, counts: Array) -> int:
    """Return the lane of a neuron, a new one if its key has moved too far and there is room; -1 if it has none."""
    if lane[neuron] < 0 and not (path[neuron] <= limit or counts[0] >= listed.shape[0]):
        lane[neuron], listed[counts[0]] = counts[0], neuron
        counts[0] += 1
    given: int = lane[neuron]
    return given


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
def _hold(neuron: int, now: int, stale: int, key_squares: float, squares: float, settings: Array, rows: Rows) -> None:
    """Bound what a row can do while it waits, and choose how long it may: its key must not move far enough for a lane.

    A step moves a key by at most twice its gradient times the learning rate, as clamping and normalising do not more
    than double the distance; and a distance changes the gradient by at most the steepest curvature times itself.

    Args:
        now: the step before which the row stands.
        stale: 0 if the gradients are those of its position, 1 if they are of the step before.
        key_squares: ‖∂penalty/∂key‖²; infinite if the key was zero at the time of these gradients or later: a step
            normalises any positive entry that it gets to unit length, however small the gradient is.
        squares: ‖∂penalty/∂key‖² + ‖∂penalty/∂values‖².
    """
    lr, steep, free = settings[LR], rows.steep[neuron], rows.lane[neuron] < 0
    room = settings[LIMIT] - rows.path[neuron] + rows.reserve[neuron]
    wait = rows.rates.shape[0] - now if free else min(1, rows.rates.shape[0] - now)
    growth, held = 1.0, 0.0
    while wait:
        growth = (1 + 2 * lr * steep) ** (wait - 1 + stale)
        held = 2 * lr * (wait - 1) * math.sqrt(key_squares * SLACK) * growth if wait > 1 else 0.0
        if held <= room or wait == 1:
            break
        wait //= 2
    # no larger than needed: above the clip anyway
    bound = min(squares * growth * growth, 4 * settings[CLIP] * settings[CLIP])
    rows.sums[0] += bound - rows.pull[neuron]
    rows.pull[neuron] = bound
    rows.path[neuron] += held - rows.reserve[neuron]
    rows.reserve[neuron] = held
    rows.due[neuron] = now + wait
    if free:
        rows.sums[1] = max(rows.sums[1], rows.path[neuron])
        rows.sums[2] = min(rows.sums[2], now + wait)


@_inner
def _settle(neuron: int, now: int, settings: Array, weights: Weights, rows: Rows) -> float:
    """Let a row wait as `_hold` does, and return its ‖∂penalty‖²."""
    kind = weights.keys.dtype.type
    weight, of_key, of_value, length = kind(settings[PENALTY]), kind(0), kind(0), kind(0)
    key, omega, anchor = weights.keys[neuron], weights.importance[neuron], weights.anchored[neuron]
    for d in range(key.shape[0]):
        slope = weight * (omega[d] * key[d] - anchor[d])
        of_key += slope * slope
        length += key[d] * key[d]
    value = weights.values[neuron]
    omega, anchor = weights.value_importance[neuron], weights.value_anchored[neuron]
    for c in range(value.shape[0]):
        slope = weight * (omega[c] * value[c] - anchor[c])
        of_value += slope * slope
    squares, of_key = float(of_key) + float(of_value), float(of_key)
    _hold(neuron, now, 0, of_key if length > 0 or of_key == 0 else np.inf, squares, settings, rows)
    return squares


@_inner
def _catch_up(neuron: int, step: int, settings: Array, weights: Weights, rows: Rows, fresh: Array) -> None:
    """Take the steps of a row that it has waited, in which only the penalty moves it.

    They are taken one by one, so that the result is that of a row that never waits, but on data in the nearest cache.
    `path` grows by the distance between the first and the last position, which the sum of the steps exceeds.
    """
    kind = weights.keys.dtype.type
    weight, zero, inverse = kind(settings[PENALTY]), kind(0), kind(1)
    key, omega, anchor = weights.keys[neuron], weights.importance[neuron], weights.anchored[neuron]
    value = weights.values[neuron]
    value_omega, value_anchor = weights.value_importance[neuron], weights.value_anchored[neuron]
    of_key, of_value, length, alive = zero, zero, zero, True
    for d in range(key.shape[0]):
        fresh[d] = key[d]
        length += key[d] * key[d]
    for at in range(rows.current[neuron], step):
        alive = alive and length > 0
        rate, length, of_key, of_value = kind(rows.rates[at]), zero, zero, zero
        for d in range(key.shape[0]):
            here = key[d] * inverse  # normalises the step before
            slope = weight * (omega[d] * here - anchor[d])
            of_key += slope * slope
            after = here - rate * slope
            after = after if after > zero else zero
            length += after * after
            key[d] = after
        inverse = kind(1) / max(kind(math.sqrt(length)), kind(1e-12))
        for c in range(value.shape[0]):
            slope = weight * (value_omega[c] * value[c] - value_anchor[c])
            of_value += slope * slope
            after = value[c] - rate * slope
            value[c] = after if after > zero else zero
        if not rows.known[at]:
            rows.norms[at] += float(of_key) + float(of_value)
    distance = zero
    for d in range(key.shape[0]):
        key[d] *= inverse
        distance += (key[d] - fresh[d]) * (key[d] - fresh[d])
    rows.path[neuron] += 1.001 * math.sqrt(distance)
    rows.current[neuron] = step
    squares, of_key = float(of_key) + float(of_value), float(of_key)
    if of_key > 0 and not (alive and length > 0):
        squares = of_key = np.inf
    _hold(neuron, step, 1, of_key, squares, settings, rows)


@_inner
def _lazy(
    sample: Array,
    cached: Array,
    cached_excess: Array,
    bound: float,
    level: float,
    step: int,
    settings: Array,
    weights: Weights,
    rows: Rows,
    scores: Array,
    listed: Array,
    gammas: Array,
    margin: float,
    top: Array,
    winners: Array,
    opened: Array,
    open_scores: Array,
    fresh: Array,
) -> tuple[bool, int, int]:
    """Find the neurons of one sample that may be active, from its cache: the largest scores and the open switches.

    The scores of neurons in lanes are given. Cached neurons follow in descending order until no other can be active.

    Returns:
        True if the bound proves the result, the number of scores, and the number of neurons in `opened`.
    """
    keys, lane, path, sums = weights.keys, rows.lane, rows.path, rows.sums
    rank, filled, found = top.shape[0], 0, 0
    waits = settings[PENALTY] > 0
    for at in range(scores.shape[0]):
        if filled < rank or scores[at] > top[rank - 1]:
            filled = _insert(scores[at], listed[at], top, winners, filled)
    drop = level
    for place in range(cached.shape[0]):
        neuron = cached[place]
        if neuron < 0:
            break
        if filled == rank:
            drop = _drop(level, top, settings[LOWEST])
            if cached_excess[place] + sums[1] + drop + margin <= 0:
                return True, filled, found
        if lane[neuron] >= 0 or (filled == rank and cached_excess[place] + path[neuron] + drop + margin <= 0):
            continue
        if waits and rows.moving[neuron] and rows.current[neuron] < step:
            _catch_up(neuron, step, settings, weights, rows, fresh)
        score = _dot(sample, keys[neuron])
        if gammas[neuron] < 1:
            opened[found], open_scores[found] = neuron, score
            found += 1
        if filled < rank or score > top[rank - 1]:
            filled = _insert(score, neuron, top, winners, filled)
    if filled < rank:
        return False, filled, found
    return bound + sums[1] + _drop(level, top, settings[LOWEST]) + margin <= 0, filled, found


@_inner
def _full(
    samples: Array,
    missed: Array,
    step: int,
    settings: Array,
    weights: Weights,
    rows: Rows,
    gammas: Array,
    cached: Array,
    cached_excess: Array,
    bound: Array,
    level: Array,
    top: Array,
    winners: Array,
    filled: Array,
    opened: Array,
    open_scores: Array,
    open_count: Array,
    near: Array,
    near_winners: Array,
    fresh: Array,
) -> None:
    """Evaluate every neuron for the samples without a proof, and cache their best neurons anew.

    Args:
        samples: ``(Q, D)``, inputs.
        missed: ``(Q, 2)``, index of each sample in the task and in the batch.
        near: ``(m + 1,)``, buffer for scores; `near_winners` is the buffer for neurons.
    """
    keys, lane, reserve, path = weights.keys, rows.lane, rows.reserve, rows.path
    waits = settings[PENALTY] > 0
    for q in range(missed.shape[0]):  # neurons without a lane are added again below
        b, kept = missed[q, 1], 0
        for place in range(filled[b]):
            if lane[winners[b, place]] >= 0:
                top[b, kept], winners[b, kept] = top[b, place], winners[b, place]
                kept += 1
        filled[b] = kept
    last, rank = near.shape[0] - 1, top.shape[1]
    scores = np.empty((missed.shape[0], keys.shape[0]), keys.dtype)
    for neuron in range(keys.shape[0]):
        if lane[neuron] >= 0:
            continue
        if waits and rows.moving[neuron] and rows.current[neuron] < step:
            _catch_up(neuron, step, settings, weights, rows, fresh)
        key = keys[neuron]
        for q in range(missed.shape[0]):
            b, score = missed[q, 1], _dot(samples[q], key)
            scores[q, neuron] = score
            if filled[b] < rank or score > top[b, rank - 1]:
                filled[b] = _insert(score, neuron, top[b], winners[b], filled[b])
    for q in range(missed.shape[0]):
        sample, b, found, count = missed[q, 0], missed[q, 1], 0, 0
        height = max(top[b, rank - 1], keys.dtype.type(0)) if filled[b] == rank else keys.dtype.type(0)
        for neuron in range(keys.shape[0]):
            if lane[neuron] >= 0:
                continue
            score = scores[q, neuron]
            if gammas[neuron] < 1 and max(score, 0) > gammas[neuron] * height:
                opened[b, count], open_scores[b, count] = neuron, score
                count += 1
            # relative to the key at the time when all caches were filled, so that one bound holds for all
            excess = near.dtype.type(score - gammas[neuron] * height - (path[neuron] - reserve[neuron]))
            if found <= last or excess > near[last]:
                found = _insert(excess, neuron, near, near_winners, found)
        open_count[b], level[sample] = count, height
        for place in range(last):
            cached[sample, place] = near_winners[place] if place < found else -1
            cached_excess[sample, place] = near[place]
        bound[sample] = near[last] if found > last else -np.inf


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
def _likelihood(logits: Array, label: int, beta: float, scale: float, slope: Array) -> None:
    """Compute the gradient of the cross-entropy of softmax(β·logits) times a scale, for the paths of SI."""
    largest, total = logits[0], logits.dtype.type(0)
    for c in range(logits.shape[0]):
        largest = max(largest, logits[c])
    for c in range(logits.shape[0]):
        slope[c] = math.exp(beta * (logits[c] - largest))
        total += slope[c]
    for c in range(logits.shape[0]):
        slope[c] *= scale / total
    slope[label] -= scale


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
def _reach(
    slope: Array,
    to_active: float,
    value: float,
    positive: int,
    sample: Array,
    values: Array,
    key_slope: Array,
    value_slope: Array,
) -> None:
    """Add the gradients of a sample's loss for one active neuron to those of its key and values.

    Args:
        slope: ∂L/∂logits, ``(C,)``.
        to_active: ∂L/∂a of loss terms on the activation itself.
        value: its activation a.
        positive: 0 where the inhibition lets no gradient pass.
        values: values of the neuron, ``(C,)``.
    """
    for c in range(slope.shape[0]):
        to_active += slope[c] * values[c]
        value_slope[c] += value * slope[c]
    if positive:
        for d in range(sample.shape[0]):
            key_slope[d] += to_active * sample[d]


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
    scores: Array,
    listed: Array,
    gammas: Array,
    any_open: bool,
    opened: Array,
    open_scores: Array,
    margin: float,
    sample: Array,
    keys: Array,
    active: Array,
    value: Array,
    positive: Array,
) -> int:
    """Find the active neurons of one sample after inhibition; return their number.

    Args:
        scores: scores of the lanes.
        any_open: True if a neuron has an open switch.
        opened: neurons without a lane whose switch is open and that may be active, with `open_scores`.
    """
    rank, found = top.shape[0], 0
    zero = top.dtype.type(0)
    inhibition = max(zero, top[rank - 1]) if subtract else zero
    for place in range(min(filled, rank - subtract)):
        if top[place] > inhibition and gammas[winners[place]] >= 1:
            active[found], value[found], positive[found] = winners[place], top[place] - inhibition, 1
            found += 1
    if not any_open:
        return found
    for at in range(scores.shape[0]):
        neuron = listed[at]
        gamma = gammas[neuron]
        if gamma >= 1 or max(scores[at], zero) + margin <= gamma * inhibition:
            continue
        score = _dot(sample, keys[neuron])
        answer = max(score, zero) - gamma * inhibition
        if answer > 0:
            active[found], value[found], positive[found] = neuron, answer, score > 0
            found += 1
    for at in range(opened.shape[0]):
        answer = max(open_scores[at], zero) - gammas[opened[at]] * inhibition
        if answer > 0:
            active[found], value[found], positive[found] = opened[at], answer, open_scores[at] > 0
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
    penalty: tuple[Array, ...],
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
        state: fields of `epoch.Caches`; excesses are reduced by the distance that the key had moved when cached.
        lanes: fields of `epoch.Lanes`.
        loss: fields of `epoch.TeacherArrays`.
        penalty: fields of `epoch.PenaltyArrays`.
        settings: float64 ``(SETTINGS,)``: learning rate, clip, weights of the three losses, temperature, C of the
            switch, width n of the table, rank (number of scores that the inhibition uses), 1 if it subtracts, the
            distance that a key may move before it gets a lane, the lowest γ without a lane, twice the weight of the
            penalty (0 for none), and β of SI (0 for none).
        totals: float64 ``(TOTALS,)``; overwritten with means over the epoch, `MISSES` and `EVALUATED` with counts.
    """
    cached, cached_excess, bound, level, slack, path = state
    lane, listed, blocks, counts = lanes
    outputs, wanted, entropy, table, slots, hidden, rest, hidden_entropy = loss
    importance, anchored, value_importance, value_anchored, steep, moved, key_paths, value_paths = penalty
    kind, size, dim, neurons, classes = keys.dtype.type, x.shape[0], x.shape[1], keys.shape[0], values.shape[1]
    clip, width, rank = settings[CLIP], int(settings[WIDTH]), int(settings[RANK])
    temperature, subtract, limit = kind(settings[TEMPERATURE]), int(settings[SUBTRACT]), settings[LIMIT]
    waits, tracks, beta = settings[PENALTY] > 0, settings[BETA] > 0, kind(settings[BETA])
    pressure = kind(settings[PENALTY])
    margin = 3.0 * dim * np.finfo(keys.dtype).eps  # rounding errors of two scores and of the sums with them
    steps = (size + batch - 1) // batch
    # γ of every neuron, and whether any switch is open
    gammas, any_open, switch = np.ones(neurons, keys.dtype), False, kind(settings[SWITCH])
    if switch > 0:
        for neuron in range(neurons):
            gammas[neuron] = _gamma(counters, neuron, switch)
            any_open = any_open or gammas[neuron] < 1
    most = neurons if any_open else rank
    rows_most = min(neurons, batch * most)
    top, winners, filled = (
        np.empty((batch, rank), keys.dtype),
        np.empty((batch, rank), np.int32),
        np.zeros(batch, np.int64),
    )
    wide = neurons if any_open else 1
    opened, open_scores = np.empty((batch, wide), np.int32), np.empty((batch, wide), keys.dtype)
    open_count = np.zeros(batch, np.int64)
    active, value = np.empty(most, np.int32), np.empty(most, keys.dtype)
    positive, to_active = np.empty(most, np.int8), np.zeros(most, keys.dtype)
    logits, slope, buffer = np.empty(classes, keys.dtype), np.empty(classes, keys.dtype), np.full(width, -1.0)
    key_slope, value_slope = np.empty((rows_most, dim), keys.dtype), np.empty((rows_most, classes), keys.dtype)
    likely, tracked = np.empty(classes, keys.dtype), rows_most if tracks else 0
    key_likely, value_likely = np.empty((tracked, dim), keys.dtype), np.empty((tracked, classes), keys.dtype)
    slot, touched, active_count = (
        np.full(neurons, -1, np.int32),
        np.empty(rows_most, np.int32),
        np.empty(rows_most, np.int64),
    )
    fresh, former, missed = np.empty(dim, keys.dtype), np.empty(dim, keys.dtype), np.empty((batch, 2), np.int64)
    used, nonzero = np.empty((batch, dim + 1), np.uint32), np.empty(batch, np.int64)
    scores = np.empty((batch, blocks.shape[0] * LANES), keys.dtype)
    loss_weights = np.empty(2, keys.dtype)
    # rows that a penalty moves: the step at which each is current, and bounds for the steps it waits
    waiting = neurons if waits else 0
    current, due = np.zeros(waiting, np.int64), np.zeros(waiting, np.int64)
    pull, reserve = np.zeros(waiting), np.zeros(neurons)
    rates, norms, known = np.zeros(steps), np.zeros(steps), np.zeros(steps, np.bool_)
    sums = np.array([0.0, 0.0, np.inf])
    moving = moved & ~frozen if waits else moved
    weights = Weights(keys, values, importance, anchored, value_importance, value_anchored)
    rows = Rows(current, due, steep, pull, reserve, path, rates, norms, known, moving, lane, sums)
    diverged = False
    if waits:
        for neuron in range(neurons):
            if moving[neuron]:
                _settle(neuron, 0, settings, weights, rows)
    for neuron in range(neurons):
        if lane[neuron] < 0:
            sums[1] = max(sums[1], path[neuron])
    totals[:] = 0
    for step in range(steps):
        start = step * batch
        count, misses, reached, placed = min(batch, size - start), 0, 0, 0
        loss_weights[0] = kind(settings[CROSS_WEIGHT] / count)
        loss_weights[1] = kind(settings[LOGIT_WEIGHT] / count)
        if waits and step:
            for at in range(counts[0]):
                neuron = listed[at]
                if moving[neuron] and current[neuron] < step:
                    _catch_up(neuron, step, settings, weights, rows, fresh)
                    touched[placed] = at
                    placed += 1
                    if placed == rows_most:
                        _place(touched[:placed], keys, listed, blocks)
                        placed = 0
            _place(touched[:placed], keys, listed, blocks)
            if sums[2] <= step:
                sums[2] = np.inf
                for neuron in range(neurons):
                    if lane[neuron] >= 0 or not moving[neuron]:
                        continue
                    if current[neuron] < step and due[neuron] <= step:
                        _catch_up(neuron, step, settings, weights, rows, fresh)
                        touched[0] = _lane_of(neuron, limit, path, lane, listed, counts)
                        if touched[0] >= 0:
                            _place(touched[:1], keys, listed, blocks)
                    else:
                        sums[2] = min(sums[2], due[neuron])
        # Top-K
        _lane_scores(x, order[start : start + count], used, nonzero, blocks, counts[0], scores)
        for b in range(count):
            i = order[start + b]
            proved, filled[b], open_count[b] = _lazy(
                x[i], cached[i], cached_excess[i], bound[i], level[i], step, settings, weights, rows,
                scores[b, : counts[0]], listed, gammas, margin, top[b], winners[b], opened[b], open_scores[b],
                fresh,
            )  # fmt: skip
            if not proved:
                missed[misses, 0], missed[misses, 1] = i, b
                misses += 1
        if misses:
            near = np.empty(cached.shape[1] + 1, keys.dtype)
            near_winners = np.empty(cached.shape[1] + 1, np.int32)
            _full(
                x[missed[:misses, 0]], missed[:misses], step, settings, weights, rows, gammas, cached,
                cached_excess, bound, level, top, winners, filled, opened, open_scores, open_count, near, near_winners,
                fresh,
            )  # fmt: skip
        # losses and gradients
        for b in range(count):
            i = order[start + b]
            slack[i] = -bound[i] - _drop(level[i], top[b], settings[LOWEST])
            totals[EVALUATED] += open_count[b]
            _rescore(x[i], keys, lane, top[b], winners[b], filled[b])
            found = _active(
                top[b], winners[b], filled[b], subtract, scores[b, : counts[0]], listed, gammas, any_open,
                opened[b, : open_count[b]], open_scores[b], margin, x[i], keys, active, value, positive,
            )  # fmt: skip
            logits[:] = 0
            for e in range(found):
                for c in range(classes):
                    logits[c] += value[e] * values[active[e], c]
            entropy_loss, distilled = _logits_loss(
                logits, labels[i], wanted[i], entropy[i], outputs, loss_weights, temperature, slope
            )
            totals[CROSS_ENTROPY] += entropy_loss
            totals[LOGIT] += distilled
            totals[ACTIVE] += found
            if width:
                totals[HIDDEN] += _hidden_loss(
                    active[:found], value, table, width, slots[i], hidden[i], rest[i], hidden_entropy[i],
                    settings[HIDDEN_WEIGHT] / count, settings[TEMPERATURE], buffer, to_active,
                )  # fmt: skip
            if tracks:
                _likelihood(logits, labels[i], beta, beta / kind(count), likely)
            for e in range(found):
                neuron = active[e]
                at = slot[neuron]
                if at < 0:
                    at, slot[neuron], touched[reached] = reached, reached, neuron
                    active_count[at] = 0
                    key_slope[at, :] = 0
                    value_slope[at, :] = 0
                    if tracks:
                        key_likely[at, :] = 0
                        value_likely[at, :] = 0
                    reached += 1
                active_count[at] += 1
                if frozen[neuron]:
                    continue
                _reach(slope, to_active[e], value[e], positive[e], x[i], values[neuron], key_slope[at], value_slope[at])
                if tracks:
                    _reach(
                        likely, kind(0), value[e], positive[e], x[i], values[neuron], key_likely[at], value_likely[at]
                    )
        # the step
        squares = 0.0
        for at in range(reached):
            neuron = touched[at]
            if waits and not frozen[neuron]:
                sums[0] -= pull[neuron]
                pull[neuron] = 0
                for d in range(dim):
                    key_slope[at, d] += pressure * (importance[neuron, d] * keys[neuron, d] - anchored[neuron, d])
                for c in range(classes):
                    value_slope[at, c] += pressure * (
                        value_importance[neuron, c] * values[neuron, c] - value_anchored[neuron, c]
                    )
            squares += _dot(key_slope[at], key_slope[at]) + _dot(value_slope[at], value_slope[at])
        norms[step] += squares
        if waits and not math.sqrt(max(squares + max(sums[0], 0.0) * SLACK, 0.0)) + 2e-6 <= clip * (1 - 1e-7):
            # the bounds do not prove that the gradient is short enough: compute its length
            for neuron in range(neurons):
                if moving[neuron] and slot[neuron] < 0:
                    if current[neuron] < step:
                        _catch_up(neuron, step, settings, weights, rows, fresh)
                    norms[step] += _settle(neuron, step, settings, weights, rows)
            known[step] = True
        length = math.sqrt(norms[step])
        rates[step] = settings[LR]
        if known[step] or not waits:
            rates[step] = settings[LR] * min(1.0, clip / (length + 1e-6))
            totals[CLIPPED] += (length > clip) * count
        rate = kind(rates[step])
        totals[MISSES] += misses
        placed = 0
        for at in range(reached):
            neuron = touched[at]
            slot[neuron] = -1
            counters[neuron] += active_count[at]
            if gammas[neuron] < 1:
                gammas[neuron] = _gamma(counters, neuron, switch)
            if frozen[neuron]:
                continue
            for c in range(classes):
                after = max(values[neuron, c] - rate * value_slope[at, c], kind(0))
                if tracks:
                    value_paths[neuron, c] -= value_likely[at, c] * (after - values[neuron, c])
                values[neuron, c] = after
            if tracks:
                former[:] = keys[neuron]
            distance, finite = _move(keys[neuron], key_slope[at], rate, fresh)
            if tracks:
                for d in range(dim):
                    key_paths[neuron, d] -= key_likely[at, d] * (keys[neuron, d] - former[d])
            diverged = diverged or not finite
            path[neuron] += distance
            if waits:
                moved[neuron] = moving[neuron] = True
                current[neuron] = step + 1
                _settle(neuron, step + 1, settings, weights, rows)
            given = _lane_of(neuron, limit, path, lane, listed, counts)
            if given < 0:
                sums[1] = max(sums[1], path[neuron])
                continue
            touched[placed] = given
            placed += 1
        _place(touched[:placed], keys, listed, blocks)
    if waits:
        for neuron in range(neurons):
            if moving[neuron] and current[neuron] < steps:
                _catch_up(neuron, steps, settings, weights, rows, fresh)
                touched[0] = _lane_of(neuron, limit, path, lane, listed, counts)
                if touched[0] >= 0:
                    _place(touched[:1], keys, listed, blocks)
    for step in range(steps):
        totals[NORM] += math.sqrt(norms[step]) * min(batch, size - step * batch)
    if diverged:
        totals[NORM] = np.nan
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
