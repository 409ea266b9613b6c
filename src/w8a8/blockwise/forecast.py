"""What going block by block will take: `resources`, and the forward passes, smoothing, and what is kept between blocks.

Bytes follow from shapes.  Seconds follow from a trial on the block of most bytes, where memory is enough for it: it is
loaded, one batch passes through it as all will in the job, with the same observers and samplers; its groups are looked
at; it is compared once as the gate does; and alpha is searched on some rows of its largest layer.  What a trial took is
multiplied by what the job does: batches by their tokens, searches by the weights that are smoothed, blocks by their
bytes.  Each is timed twice where it is short, and the shorter time counts: the first is that of cold caches.
"""

import hashlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import psutil
import torch

from w8a8.blockwise.activations import state_bytes
from w8a8.blockwise.blocks import BlockWalk, State
from w8a8.blockwise.contents import layers_of, load
from w8a8.blockwise.request import Request
from w8a8.calibration.calibrate import checked_observer, collect
from w8a8.calibration.data import Calibration
from w8a8.layers.linear import float_operands
from w8a8.records.streaming import Prediction
from w8a8.smoothing.alpha import Product, search
from w8a8.smoothing.gate import Gate
from w8a8.smoothing.smoother import cut, observed, samples
from w8a8.smoothing.way import NONE
from w8a8.streaming.plan import Plan
from w8a8.streaming.resources import predict

_COPY = 512 << 20  # of the float64 copy in which smoothing compares a block with what it was, see `smoothing.gate`
_SPARE = 256 << 20  # samples, histograms, and what malloc keeps
_WIDTHS = 8  # tensors as wide as the widest layer that a block's forward holds at once
_TRIAL_WEIGHTS = 4 << 20  # elements of a weight on which alpha is searched
_TRIAL_HASH = 4 << 20  # bytes
_SHORT = 2.0  # seconds: what takes less is timed twice

T = TypeVar("T")


def predict_blocks(plan: Plan, walk: BlockWalk, target: Path, request: Request, *, unfinished: int) -> Prediction:
    """Look at the plan, and try.

    Args:
        plan: One shard per block, and one for what lies outside.
        walk: Checked: what passes between blocks is known.  A block of it is loaded, and dropped.

    Raises:
        CheckpointError: nothing can be written there.
        NonFiniteError: as in the job, where the trial meets it.
    """
    blocks, chains = plan.shards[:-1], len(request.chains)
    sizes = [sum(step.entry.bytes for step in shard.steps) for shard in blocks]
    largest = max(sizes)
    numbers = max(sum(step.entry.bytes // step.entry.dtype.itemsize for step in shard.steps) for shard in blocks)
    finished = sum(step.bytes for shard in blocks[: len(blocks) - unfinished] for step in shard.steps)
    found = predict(plan, target, finished_bytes=finished)
    one_batch = max((state_bytes([state]) for state in walk.states), default=0)
    steps = [step for shard in blocks for step in shard.steps if step.spec is not None]
    widest = max((max(s.entry.shape) / min(s.entry.shape) for s in steps), default=1.0)
    copies = largest + min(_COPY, 8 * numbers) if request.smoothing != NONE else largest // 2
    held = psutil.Process().memory_info().rss
    kept = state_bytes(walk.states)
    found = replace(
        found,
        peak_bytes=int(held + largest + copies + _WIDTHS * widest * one_batch + _SPARE),
        output_bytes=found.output_bytes + 2 * chains * kept,  # what enters a block, and what leaves it
    )
    if not unfinished or found.peak_bytes > found.memory_bytes:  # nothing to do, or to be refused
        return found
    written = found.write_seconds * chains * kept * unfinished
    hashed = _hashing() * (chains * kept * unfinished + found.output_bytes)
    measured = _trial(plan, walk, sizes.index(largest), request) * sum(sizes[len(sizes) - unfinished :]) / largest
    return replace(found, seconds=found.seconds + written + hashed + measured)


def _trial(plan: Plan, walk: BlockWalk, number: int, request: Request) -> float:
    """Seconds that a block will take, but for reading, quantising and writing it."""
    shard, prefix, block = plan.shards[number], walk.prefix(number), walk.blocks[number]
    names = layers_of(shard, plan)
    load(block, shard.steps, prefix)
    block.requires_grad_(False)
    try:
        one = Calibration(request.calibration.batches[:1], request.calibration.description)
        data = walk.calibration(one, number, None)
        batches = _tokens(walk.states) / max(1, _tokens(walk.states[:1]))
        seconds = 0.0
        if request.smoothing != NONE:
            seconds += _smoothing(walk, number, request, names, data, batches)
        if request.scheme.measured is not None:
            make = checked_observer(request.observer, request.scheme.measured)
            with walk.only(number, None):
                seconds += batches * _least(lambda: collect(walk.model, data, {name: make() for name in names}))[0]
        return seconds
    finally:
        block.to_empty(device="meta")


def _smoothing(
    walk: BlockWalk, number: int, request: Request, names: Sequence[str], data: Calibration, batches: float
) -> float:
    """Seconds to see a block's groups, pass the data for their samples, search their alphas, and compare."""
    block, prefix = walk.blocks[number], walk.prefix(number)
    inputs = request.calibration.batches[0]
    probe = walk.arguments(number, cut(inputs), None)
    seconds, flow = _least(lambda: observed(block, probe, lambda: walk.arguments(number, inputs, None)))
    compared, gate = _least(lambda: Gate(block, flow.groups, probe))
    states = 2 if not flow.groups or gate.unrounded(flow.groups[0]) is None else 3  # of the weights that are run
    readers = [[r.module for r in group.readers if prefix + r.module in names] for group in flow.groups]
    asked = {prefix + modules[0] for modules in readers if modules}  # what a group reads is sampled once
    with walk.only(number, None):
        passed, seen = _least(lambda: samples(walk.model, data, sorted(asked)))
    seconds += batches * passed + (1 + states) / 2 * compared  # a gate runs the block twice to begin with
    weights = [float_operands(block.get_submodule(module))[0] for modules in readers for module in modules]
    tried = {name: float_operands(block.get_submodule(name.removeprefix(prefix)))[0] for name in seen}
    if not tried:
        return seconds
    name = max(tried, key=lambda n: tried[n].numel())
    weight = tried[name][: max(1, _TRIAL_WEIGHTS // tried[name].shape[1])]
    product = Product(seen[name], weight, torch.arange(weight.shape[1], dtype=torch.int64, device="cpu"), reads=True)
    way, channels = request.smoothing, weight.shape[1]
    searched, _ = _least(lambda: search([product], channels, request.scheme, way.alphas, forced=way.forced))
    return seconds + searched * sum(w.numel() for w in weights) / weight.numel()


def _hashing() -> float:
    """Seconds per byte."""
    data = bytes(_TRIAL_HASH)
    return _least(lambda: hashlib.sha256(data).digest())[0] / len(data)


def _tokens(states: Sequence[State]) -> int:
    return sum(math.prod(shape[:-1]) for _, shape in states)


def _least(work: Callable[[], T]) -> tuple[float, T]:
    """How long it takes, and what it gives."""
    seconds = math.inf
    for _ in range(2):
        start = time.perf_counter()
        given = work()
        seconds = min(seconds, time.perf_counter() - start)
        if seconds > _SHORT:
            break
    return seconds, given
