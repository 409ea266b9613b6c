"""What going block by block will take: `resources`, with the forward passes and what is kept between blocks."""

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import psutil
import torch

from w8a8.streaming.activations import state_bytes
from w8a8.streaming.blocks import BlockWalk
from w8a8.streaming.plan import Plan, Step
from w8a8.streaming.resources import Prediction, predict

_COPY = 512 << 20  # of the float64 copy in which smoothing compares a block with what it was, see `smoothing.gate`
_SPARE = 256 << 20  # samples, histograms, and what malloc keeps
_WIDTHS = 8  # tensors as wide as the widest layer that a block's forward holds at once
_TRIAL_TOKENS, _TRIAL_ROWS = 512, 4096


def predict_blocks(
    plan: Plan, walk: BlockWalk, target: Path, chains: Sequence[str], *, unfinished: int, smoothed: bool
) -> Prediction:
    """Bytes follow from shapes, seconds from `predict` and one timed product of the largest layer.

    Args:
        plan: One shard per block, and one for what lies outside.
        walk: Checked: what passes between blocks is known.
        target: Where the result will be.
        chains: Kinds of activations that are kept.
        unfinished: Blocks to be made.
        smoothed: Whether the blocks are smoothed, which copies a block.
    """
    blocks = plan.shards[:-1]
    largest = max(sum(step.entry.bytes for step in shard.steps) for shard in blocks)
    numbers = max(sum(step.entry.bytes // step.entry.dtype.itemsize for step in shard.steps) for shard in blocks)
    finished = sum(step.bytes for shard in blocks[: len(blocks) - unfinished] for step in shard.steps)
    found = predict(plan, target, finished_bytes=finished)
    one_batch = max((state_bytes([state]) for state in walk.states), default=0)
    steps = [step for shard in blocks for step in shard.steps if step.spec is not None]
    widest = max((max(s.entry.shape) / min(s.entry.shape) for s in steps), default=1.0)
    copies = largest + min(_COPY, 8 * numbers) if smoothed else largest // 2
    held = psutil.Process().memory_info().rss
    kept = 2 * len(chains) * state_bytes(walk.states)  # what enters a block, and what leaves it
    return replace(
        found,
        peak_bytes=int(held + largest + copies + _WIDTHS * widest * one_batch + _SPARE),
        output_bytes=found.output_bytes + kept,
        seconds=found.seconds + len(chains) * unfinished / max(1, len(blocks)) * _forward_seconds(steps, walk),
    )


def _forward_seconds(steps: Sequence[Step], walk: BlockWalk) -> float:
    """Of one pass of all batches through these layers, by the largest of them on random numbers."""
    tokens = sum(math.prod(shape[:-1]) for _, shape in walk.states)
    if not steps or not tokens:
        return 0.0
    largest = max(steps, key=lambda s: s.entry.bytes)
    dtype, (n, k) = walk.states[0][0], largest.entry.shape
    weight = torch.randn(min(n, _TRIAL_ROWS), k).to(dtype)
    x = torch.randn(min(tokens, _TRIAL_TOKENS), k).to(dtype)
    x @ weight.t()
    start = time.perf_counter()
    x @ weight.t()
    products = len(x) * weight.numel()
    weights = sum(math.prod(step.entry.shape) for step in steps)
    return (time.perf_counter() - start) / products * tokens * weights
