"""What of the files belongs to each block, how it comes into the model, and what it becomes."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from w8a8.blockwise.blocks import BlockWalk
from w8a8.checkpoint.files import mapped
from w8a8.core.affine import QParams
from w8a8.core.packed import as_words
from w8a8.errors import noted
from w8a8.layers.linear import float_operands
from w8a8.layers.weights import make_weight
from w8a8.streaming.plan import Plan, Shard, Step, numbered


def by_blocks(plan: Plan, walk: BlockWalk) -> Plan:
    """The plan with a shard for each block and one for all else."""
    groups: list[list[Step]] = [[] for _ in range(len(walk) + 1)]
    for step in plan.steps:
        number = _number(step.place, walk)
        groups[-1 if number is None else number].append(step)
    return replace(plan, shards=numbered(groups))


def layers_of(shard: Shard, plan: Plan) -> tuple[str, ...]:
    """The linear layers of a shard that are quantised, which read activations: not its tables."""
    return tuple(step.place for step in shard.steps if step.place in plan.choice.schemes)


def _number(name: str, walk: BlockWalk) -> int | None:
    """Of the block that a tensor belongs to."""
    if not name.startswith(walk.name + "."):
        return None
    return int(name[len(walk.name) + 1 :].split(".")[0])


def _place(root: nn.Module, step: Step, prefix: str) -> tuple[Tensor, nn.Module, str]:
    """The tensor of the model that a step fills, its module and its name there."""
    name = (step.place if step.spec is None else f"{step.place}.weight").removeprefix(prefix)
    path, _, key = name.rpartition(".")
    module = root.get_submodule(path)
    return getattr(module, key), module, key


@torch.no_grad()
def load(root: nn.Module, steps: tuple[Step, ...], prefix: str) -> None:
    """Put the values of the files into the model: a block's as copies, since they will be changed; else mapped."""
    for step in steps:
        _, module, key = _place(root, step, prefix)
        values = mapped(step.entry).to(step.dtype, copy=bool(prefix))
        held = module._parameters.get(key)
        if held is not None and not held.is_meta:  # a layer of an expert: a view of a stack that is there
            held.copy_(values)
        elif held is not None:
            module._parameters[key] = nn.Parameter(values, requires_grad=False)
        else:
            module._buffers[key] = values


def quantized(
    root: nn.Module, steps: tuple[Step, ...], prefix: str, grids: Mapping[str, QParams] | None
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """What the tensors of a block become, by their names in the result; and the SQNR in dB of its layers' weights."""
    tensors: dict[str, Tensor] = {}
    lost: dict[str, float] = {}
    for step in steps:
        if step.spec is None:
            tensors[step.name] = _place(root, step, prefix)[0].detach()
            continue
        with noted(f"while quantising {step.place}"):
            module = root.get_submodule(step.place.removeprefix(prefix))
            weight = module.weight.detach() if isinstance(module, nn.Embedding) else float_operands(module)[0]
            made = make_weight(weight, step.spec)
        lost[step.place] = made.sqnr_db
        kept = made.named()
        if grids is not None and step.place in grids:  # a table reads ids
            grid = grids[step.place]
            kept["input_scale"] = grid.scale.reshape(1)
            if grid.zero_point is not None:
                kept["input_zero_point"] = grid.zero_point.reshape(1)
        if step.in_words:
            kept |= as_words(kept.pop("weight"))
        tensors.update({f"{step.name}.{key}": value for key, value in kept.items()})
    return tensors, lost
