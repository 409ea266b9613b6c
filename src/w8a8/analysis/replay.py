"""Forwards of nearly the same model: what one changed layer does to its answer, without running what is before it.

A forward is recorded: what each block (an element of an `nn.ModuleList`) returned.  When a layer of block b is then
swapped, all that ran before b returns its record, and the model computes from b on.  A sweep over all layers costs
half a forward each, and one window's block outputs in memory.

Which modules are blocks and in which order they run is observed.  A replay is exact only if blocks hand on nothing but
what they return, so each recording is checked: going on from the middle block and from the last must give the recorded
answer, bit for bit.  Where it does not, or a block runs twice, `Recording.outputs` is empty and every forward is whole.

The alternative, to call the blocks by themselves in a loop, needs to know how a model makes masks and positions.
"""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from w8a8.analysis.answers import Window
from w8a8.model.inputs import evaluating, watched
from w8a8.model.pretrained import Pretrained
from w8a8.model.swapping import swapped


@dataclass(frozen=True)
class Recording:
    """One forward of a window.

    window: What was asked.
    answer: What the model said.
    outputs: What each block returned, by name, in the order in which they ran; empty where replaying is not exact.
    """

    window: Window
    answer: Tensor
    outputs: dict[str, object]

    def divergence(self, answer: Tensor) -> float:
        """How far another answer is from the recorded one, which is the float model's; nats, over what is told."""
        return self.window.divergence(self.answer, answer)


def record(model: Pretrained, window: Window, layers: Mapping[str, nn.Module]) -> Recording:
    """Run a window through a model, some of its layers swapped, and keep what its blocks return.

    Args:
        model: Of the kind that the window was made for.  Not modified.
        window: What it is asked.
        layers: To put in the places of those of the same names.

    Raises:
        ModelError: as `Window.answer`.
    """
    outputs: dict[str, object] = {}
    calls: list[str] = []

    def keep(name: str, args: object, kwargs: object, output: object) -> None:
        calls.append(name)
        outputs[name] = _cloned(output)

    with evaluating(model), swapped(model, layers), watched(model, blocks_of(model), keep, after=True):
        answer = window.answer(model)
    whole = Recording(window, answer, {})
    if not outputs or len(calls) > len(outputs):
        return whole
    found, names = Recording(window, answer, outputs), list(outputs)
    resumed = (replay(model, found, layers, [f"{names[i]}."]) for i in {len(names) // 2, len(names) - 1})
    return found if all(torch.equal(again, answer) for again in resumed) else whole


def replay(model: Pretrained, recording: Recording, layers: Mapping[str, nn.Module], changed: Iterable[str]) -> Tensor:
    """The answer to the recorded window, in a model that differs from the recorded one in a few layers.

    Args:
        model: That of the recording.  Not modified.
        recording: What ran before the first changed layer is taken from it.
        layers: Everything to be swapped in, whether it was when recording or not.
        changed: The names of those layers that are not as they were when recording.
    """
    first = min((block_index(list(recording.outputs), name) or 0 for name in changed), default=0)
    before = dict(list(recording.outputs.items())[:first])
    with evaluating(model), swapped(model, layers), _returning(model, before):
        return recording.window.answer(model)


def block_index(blocks: list[str], name: str) -> int | None:
    """Which block holds a layer; None for a layer outside of all, before which nothing can be skipped."""
    return next((i for i, block in enumerate(blocks) if name.startswith(block + ".")), None)


def blocks_of(model: nn.Module) -> list[str]:
    """The elements of the outermost module lists that are more than one operation."""
    blocks: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(name.startswith(block + ".") for block in blocks):
            blocks += [f"{name}.{key}" for key, child in module.named_children() if any(True for _ in child.children())]
    return blocks


@contextlib.contextmanager
def _returning(model: nn.Module, outputs: Mapping[str, object]) -> Iterator[None]:
    """Have blocks return what they did, for the length of a `with` block, instead of running."""
    blocks = {name: model.get_submodule(name) for name in outputs}
    own = {name: block.__dict__["forward"] for name, block in blocks.items() if "forward" in block.__dict__}
    try:
        for name, block in blocks.items():
            block.__dict__["forward"] = lambda *args, name=name, **kwargs: _cloned(outputs[name])
        yield
    finally:
        for name, block in blocks.items():
            del block.__dict__["forward"]
            if name in own:  # accelerate and others put one there
                block.__dict__["forward"] = own[name]


def _cloned(value: object) -> object:
    """The tensors of a block's output copied, since some models add to them in place."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, tuple | list) and type(value) in (tuple, list):
        return type(value)(map(_cloned, value))
    return value
