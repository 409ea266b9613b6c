"""With data: each block is loaded, measured, smoothed, quantised, written and dropped in turn.

    outside of the blocks    mapped from the files: embeddings, the last norm, the head
    block i                  in memory, on what block i - 1 returned (`activations`, on the disk)
        pass 1               samples for smoothing, or ranges for static grids; what it returns is recorded
        smoothing            groups that lie within the block: `smooth_observed` on the block as if it were all
        pass 2               where both are asked for: ranges, on what the smoothed blocks before returned
        codes                written as one shard, recorded in the journal
    the end                  layers outside of the blocks, what is beside the weights, the name of the directory

Every block reads what the *float* blocks before it returned, as in calibration of the whole model, and by the same
calls in the same order: scales, codes and smoothed weights are those of `w8a8.quantize` in memory, bit for bit, with a
fixed alpha, a searched one, or none.  After smoothing with static scales two chains of activations are kept, since the
samples come from the model before any fold and the ranges from the folded one.

Smoothing "auto" chooses among whole quantised models, which is what does not fit; here it is "searched", and so it is
reported.  A fold whose source and readers lie in different blocks, or outside of all, is not made.

After a kill the finished blocks are skipped.  The activations that enter the first unfinished one are on the disk until
it is recorded; where they are damaged the job goes back to the last that are whole.
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import cast

from torch import Tensor, nn

from w8a8.blockwise.activations import Reader, Recorder
from w8a8.blockwise.blocks import BlockWalk
from w8a8.blockwise.contents import by_blocks, layers_of, load, quantized
from w8a8.blockwise.forecast import predict_blocks
from w8a8.blockwise.request import PLAIN, Request, told_of
from w8a8.calibration.calibrate import static_grids
from w8a8.calibration.data import Calibration
from w8a8.calibration.sampling import Sample
from w8a8.checkpoint.skeleton import empty_model
from w8a8.core.affine import QParams
from w8a8.core.progress import Progress, tell
from w8a8.errors import noted
from w8a8.model.experts import Experts
from w8a8.model.swapping import swap, swapped
from w8a8.records.smoothing import GroupReport, SmoothReport
from w8a8.records.streaming import Prediction
from w8a8.smoothing.smooth import smooth_observed
from w8a8.smoothing.smoother import Smoother, cut, observed, samples
from w8a8.smoothing.way import NONE
from w8a8.streaming.job import Work
from w8a8.streaming.journal import Journal, write_whole
from w8a8.streaming.plan import Plan, Shard
from w8a8.streaming.shard import growing, write_tensors
from w8a8.streaming.team import Team


class Blocks(Work):
    """The blocks of one model, in turn.

    Args:
        plan: For a calibrated scheme; its shards are cut anew, one for each block.
        request: What is asked of every block.
        decides: As for `Work`; the data and what is done with it come to it.

    Raises:
        ModelError: the model has no blocks that are called one after another.
        CalibrationError: a batch does not fit the model.
    """

    def __init__(self, plan: Plan, request: Request, decides: Mapping[str, str]) -> None:
        model = empty_model(plan.source)
        choice = plan.choice.on(model)
        self.outside = frozenset(choice.outside)
        self.stacks = swap(model, choice.taken)  # of experts that have layers of their own, by name
        self.walk = BlockWalk(model)
        self.request = request
        plan = by_blocks(plan, self.walk)
        load(model, plan.shards[-1].steps, "")
        model.tie_weights()
        self.walk.check(request.calibration)
        self.outer = layers_of(plan.shards[-1], plan)
        self.first = 0  # the first block to be made: not finished, or needed for what enters the first that is not
        super().__init__(plan, {**decides, **told_of(request)})

    def go_on(self, journal: Journal) -> None:
        super().go_on(journal)
        n = len(self.walk)
        unfinished = next((i for i in range(n) if not self._is_finished(i)), n)
        if unfinished == n and (self.plan.shards[-1].file in self.finished or not self._last_is_read):
            self.first = n
        else:
            self.first = next(i for i in range(unfinished, -1, -1) if i == 0 or journal.done(self._unit(i)))

    def _is_finished(self, number: int) -> bool:
        told = self.request.smoothing == NONE or self._report_file(number).is_file()
        return told and self.plan.shards[number].file in self.finished

    def predict(self, target: Path, us: Team) -> Prediction:
        unfinished = len(self.walk) - self.first
        return predict_blocks(self.plan, self.walk, target, self.request, unfinished=unfinished)

    def make(self, us: Team, progress: Progress | None) -> SmoothReport | None:
        n = len(self.walk)
        for number in range(self.first, n):
            self._block(number)
            self._forget(number)
            tell(progress, number + 1, n, self.walk.prefix(number).removesuffix("."))
        if self.plan.shards[-1].file not in self.finished:
            self._outside()
        return self._report()

    def _report(self) -> SmoothReport | None:
        """What smoothing did to all blocks, also those of an earlier run."""
        if self.request.smoothing == NONE:
            return None
        told = [json.loads(self._report_file(i).read_text(encoding="utf-8")) for i in range(len(self.walk))]

        def groups(key: str) -> tuple[GroupReport, ...]:
            return tuple(GroupReport(**{**g, "readers": tuple(g["readers"])}) for t in told for g in t[key])

        change, bound = max(t["change"] for t in told), max(t["bound"] for t in told)
        scheme, way, data = self.request.scheme.name, self.request.smoothing.told, self.request.calibration.description
        return SmoothReport(scheme, way, data, groups("groups"), groups("refused"), change, bound)

    @property
    def _last_is_read(self) -> bool:
        return bool(self.outer) and self.request.scheme.static

    def _block(self, number: int) -> None:
        shard, prefix, block = self.plan.shards[number], self.walk.prefix(number), self.walk.blocks[number]
        chosen = layers_of(shard, self.plan)
        stacks = {name.removeprefix(prefix): stack for name, stack in self.stacks.items() if name.startswith(prefix)}
        for name, stack in stacks.items():  # the layers are views of what smoothing sees
            stack.to_empty(device="cpu")
            swap(block, {name: Experts(stack, cast(Experts, block.get_submodule(name)).names)})
        load(block, shard.steps, prefix)
        block.requires_grad_(False)
        is_read = number + 1 < len(self.walk) or self._last_is_read
        with noted(f"while quantising {prefix.removesuffix('.')} of {self.plan.source.path}"), ExitStack() as files:
            recorders = {
                chain: files.enter_context(growing(Recorder(self._activations(number + 1, chain), self.walk.states)))
                for chain in (self.request.chains if is_read else ())
            }
            grids = self._measured(number, chosen, stacks, recorders)
            tensors, lost = quantized(block, shard.steps, prefix, grids)
            digests = {recorder.path.name: recorder.finish() for recorder in recorders.values()}
        if digests:
            self.journal.record(self._unit(number + 1), digests)
        self._keep(shard, tensors, lost)
        block.to_empty(device="meta")
        for stack in stacks.values():
            stack.to_empty(device="meta")

    def _measured(
        self, number: int, chosen: tuple[str, ...], stacks: Mapping[str, nn.Module], recorders: Mapping[str, Recorder]
    ) -> dict[str, QParams] | None:
        """Smooth a block, and measure what its layers read."""
        scheme = self.request.scheme
        record = {chain: recorder.take for chain, recorder in recorders.items()}
        read = {chain: self._reader(number, chain) for chain in self.request.chains}
        plain = self.walk.calibration(self.request.calibration, number, read[PLAIN], record.get(PLAIN))
        if self.request.smoothing != NONE:
            outside = [name for name in chosen if name in self.outside]
            with swapped(self.walk.blocks[number], stacks):
                self._keep_report(number, self._smoothed(number, outside, plain, read[PLAIN]))
        if not scheme.static:
            return None
        chain = self.request.chains[-1]
        calibration = self.walk.calibration(self.request.calibration, number, read[chain], record.get(chain))
        with self.walk.only(number, None):
            if not chosen:  # the pass is made all the same, for what it returns
                calibration.run(self.walk.model)
                return None
            return self._grids(chosen, calibration)

    def _smoothed(self, number: int, chosen: Sequence[str], data: Calibration, enters: Reader | None) -> SmoothReport:
        """Smooth a block as if it were all; what was done, by names within it.

        It is called alone, with what the model calls it with on some tokens of the first batch: to see its groups, and
        to compare.  The samples come from the calls of the model, as in calibration of the whole.
        """
        walk, block, prefix = self.walk, self.walk.blocks[number], self.walk.prefix(number)
        first = None if enters is None else enters(0)
        inputs = self.request.calibration.batches[0]
        probe = walk.arguments(number, cut(inputs), first)

        def sampled(names: Sequence[str]) -> dict[str, Sample]:
            with walk.only(number, None):
                found = samples(walk.model, data, [prefix + name for name in names])
            return {name.removeprefix(prefix): sample for name, sample in found.items()}

        scheme = self.request.scheme
        flow = observed(block, probe, lambda: walk.arguments(number, inputs, first))
        smoother = Smoother(block, flow, probe, sampled, {name.removeprefix(prefix): scheme for name in chosen})
        return smooth_observed(smoother, self.request.smoothing, scheme, data.description)[0]

    def _grids(self, names: Sequence[str], data: Calibration) -> dict[str, QParams]:
        """The static grids of what these layers read, by their names in the model."""
        assert self.request.scheme.measured is not None, "whoever measures has a static scheme"
        return static_grids(self.walk.model, names, self.request.scheme.measured, data, self.request.observer)

    def _outside(self) -> None:
        """What lies outside of the blocks: the layers there are measured on what the last block returned."""
        n, shard, grids = len(self.walk), self.plan.shards[-1], None
        if self._last_is_read:
            reader = self._reader(n, self.request.chains[-1])
            calibration = self.walk.calibration(self.request.calibration, n, reader)
            grids = self._grids(self.outer, calibration)
        self._keep(shard, *quantized(self.walk.model, shard.steps, "", grids))

    def _keep(self, shard: Shard, tensors: Mapping[str, Tensor], lost: Mapping[str, float]) -> None:
        """Write a shard and record it."""
        digest = write_tensors(self.journal.partial / shard.file, tensors)
        self.journal.record(shard.file, {shard.file: digest}, lost)

    def _unit(self, number: int) -> str:
        return f"activations that enter block {number}"

    def _activations(self, number: int, chain: str) -> Path:
        return self.journal.partial / f".activations-{number:05d}-{chain}.safetensors"

    def _reader(self, number: int, chain: str) -> Reader | None:
        return Reader(self._activations(number, chain)) if number else None

    def _forget(self, number: int) -> None:
        """Remove what entered a block that is finished."""
        for chain in self.request.chains:
            self._activations(number, chain).unlink(missing_ok=True)

    def _report_file(self, number: int) -> Path:
        return self.journal.partial / f".smooth-{number:05d}.json"

    def _keep_report(self, number: int, report: SmoothReport) -> None:
        """On the disk, by the names of the whole model."""
        prefix, told = self.walk.prefix(number), asdict(report)
        for group in (*told["groups"], *told["refused"]):
            group["source"] = (prefix + group["source"]).removesuffix(".")
            group["readers"] = [(prefix + name).removesuffix(".") for name in group["readers"]]
        write_whole(self._report_file(number), json.dumps(told))
