"""What the job will take, known before its first byte is written: memory, disk and minutes.

Bytes follow from the plan.  Seconds come from a trial: a piece of the largest weight is read and quantised, and as
many bytes are written beside the target and removed.  The reads may come from a cache, so the time is the least that
it can be.
"""

import math
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import torch

from w8a8.errors import CheckpointError
from w8a8.layers.weights import quantize_weight
from w8a8.records.streaming import Prediction
from w8a8.streaming.plan import PIECE, Plan, Step

_TRIAL = 16 << 20  # bytes written in the trial
_SPARE = 160 << 20  # bytes of memory for all else: what malloc keeps for each thread, headers, the journal
_PIECES = 4  # of the source that are in memory at once: being read, being quantised, and waiting for the disk
_CGROUPS = Path("/sys/fs/cgroup")


def predict(plan: Plan, target: Path, *, processes: int = 1, here: int = 1, finished_bytes: int = 0) -> Prediction:
    """Look at the plan, and try.

    Args:
        target: Where the result will be; what is written in the trial lies beside it.
        processes: How many share the job.
        here: How many of them are on this machine.
        finished_bytes: Of the result, on the disk already.

    Raises:
        CheckpointError: nothing can be written there.
    """
    place = next(parent for parent in target.absolute().parents if parent.exists())
    output = sum(step.bytes for step in plan.steps)
    source = sum(step.entry.bytes for step in plan.steps)
    to_do = max(0.0, 1 - finished_bytes / output) if output else 0.0
    quantized = sum(step.entry.bytes for step in plan.steps if step.spec is not None)
    writing = _writing(place, output)
    seconds = (quantized * _quantising(plan) + source * _reading(plan) + output * writing) / processes
    held = psutil.Process().memory_info().rss
    return Prediction(
        peak_bytes=here * (held + max(map(_held, plan.steps), default=0) + _SPARE),
        memory_bytes=available_memory() + held,
        output_bytes=output - finished_bytes,
        free_bytes=shutil.disk_usage(place).free,
        source_bytes=source,
        seconds=seconds * to_do,
        write_seconds=writing,
    )


def available_memory() -> int:
    """Bytes that this process can still have: what the machine has free, or its control groups if that is less."""
    free = int(psutil.virtual_memory().available)
    for group in _control_groups():
        try:
            most = (group / "memory.max").read_text().strip()
            now = int((group / "memory.current").read_text())
            pages = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        except OSError:  # no such group, or none with a limit of memory
            continue
        if most != "max":
            given_up = int(pages.get("active_file", 0)) + int(pages.get("inactive_file", 0))  # cache of files
            free = min(free, int(most) - now + given_up)
    return max(0, free)


def _control_groups() -> list[Path]:
    """The group that this process is in and those around it (version 2); none where the system has none."""
    try:
        told = Path("/proc/self/cgroup").read_text()
    except OSError:
        return []
    path = next((line.removeprefix("0::") for line in told.splitlines() if line.startswith("0::")), "/")
    group = _CGROUPS / path.strip("/")
    return [group, *(parent for parent in group.parents if parent.is_relative_to(_CGROUPS))]


def _held(step: Step) -> int:
    """Bytes that are in memory at once while a tensor is made: of a whole one its values, and its codes twice."""
    if not step.whole:
        return _PIECES * PIECE
    cast = 0 if step.dtype is step.entry.dtype else math.prod(step.entry.shape) * step.dtype.itemsize
    return step.entry.bytes + cast + 2 * step.bytes


def _largest(steps: Sequence[Step]) -> Step | None:
    """The step that reads most; None where none reads anything."""
    return max((step for step in steps if step.entry.bytes), key=lambda step: step.entry.bytes, default=None)


def _reading(plan: Plan) -> float:
    """Seconds per byte, in a piece of the largest tensor."""
    step = _largest(plan.steps)
    if step is None:
        return 0.0
    begin, end = next(step.pieces())
    start = time.perf_counter()
    with step.entry.file.open("rb") as file:
        file.seek(begin)
        count = len(file.read(min(end - begin, PIECE)))
    return (time.perf_counter() - start) / max(count, 1)


def _quantising(plan: Plan) -> float:
    """Seconds per byte of the source."""
    step = _largest([step for step in plan.steps if step.spec is not None])
    if step is None:
        return 0.0
    assert step.spec is not None, "chosen so"
    rows, width = step.entry.shape
    rows = max(1, min(rows, (4 << 20) // width))
    sample = torch.randn(rows, width, dtype=torch.float32, device="cpu").to(step.entry.dtype)
    quantize_weight(sample, step.spec)
    start = time.perf_counter()
    quantize_weight(sample, step.spec)
    return (time.perf_counter() - start) / (sample.numel() * sample.element_size())


def _writing(place: Path, output: int) -> float:
    """Seconds per byte, on the disk; never more than a quarter of what is free is tried."""
    data = bytes(max(1, min(_TRIAL, output, shutil.disk_usage(place).free // 4)))
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            start = time.perf_counter()
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            return (time.perf_counter() - start) / len(data)
    except OSError as error:
        raise CheckpointError(f"{place} cannot be written: {error.strerror}; choose another place") from error
