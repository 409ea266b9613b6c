"""One block of a model at a time, called exactly as the whole model calls it.

The blocks are the members of the `nn.ModuleList` that holds most parameters.  All but one are replaced by stand-ins
that return what they are given, and the model's own forward is run: embeddings, masks, rotary tables and whatever
differs from block to block (Gemma's sliding and full attention) are made by the code that makes them in the whole
model.  The one real block is handed its true input by a hook, and a second hook takes its output and ends the forward.
What this rests on is checked on the first batch: the blocks are called once each, in their order, and each is given
what the one before returned.  No list of models exists.

The alternative, capturing the arguments of each block and calling the blocks alone, needs memory for masks per block
and batch, and loses what a calibration hook on the model sees (the mask of tokens that do not count).  The price of
this one is the embedding and the masks, made again for each block.
"""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from w8a8.calibration.data import Calibration
from w8a8.errors import ModelError
from w8a8.model.inputs import ModelInputs, as_inputs, call, check_inputs, evaluating

State = tuple[torch.dtype, tuple[int, ...]]

Form: TypeAlias = Callable[[Tensor], object]
"""What a block returns of the tensor that it works on."""

_FORMS: tuple[Form, ...] = (lambda h: h, lambda h: (h,), lambda h: (h, None))
_WRONG_FORM = (TypeError, ValueError, RuntimeError, IndexError, AttributeError)  # what a model says of another one


class StandIn(nn.Module):
    """In the place of a block: returns what it is given, in the form in which the model takes a block's output."""

    def __init__(self, block: nn.Module, number: int, walk: "BlockWalk") -> None:
        super().__init__()
        self._block = (block,)  # not a child: its parameters are not here
        self._walk = (walk,)
        self.number = number

    def forward(self, *args: object, **kwargs: object) -> object:
        walk = self._walk[0]
        hidden = walk.entering(self.number, _hidden(args, kwargs))
        return walk.form(hidden)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:  # what the model asks of a block besides calling it: the type of its attention
            return getattr(self.__dict__["_block"][0], name)

    def __deepcopy__(self, memo: dict[int, object]) -> "StandIn":
        return self


class _Reached(Exception):  # noqa: N818 - not an error: the forward has shown what was asked for
    """Ends a forward."""


class BlockWalk:
    """A model whose blocks are there one at a time.

    Args:
        model: With its parameters on the meta device or not; its blocks are taken out, and stand-ins put in.

    name: Dotted name of the list of blocks.
    blocks: The real ones.
    states: Dtype and shape of what passes from block to block, for each batch, once `check` has run.

    Raises:
        ModelError: it has no list of at least two blocks, or an encoder and a decoder.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.name, self._list = _largest_list(model)
        self.blocks: list[nn.Module] = list(self._list)
        self.form = _FORMS[0]
        self.states: list[State] = []
        self._given: Callable[[], Tensor | None] = lambda: None
        self._seen: list[Tensor] | None = None
        self._in_loop = False
        for number, block in enumerate(self.blocks):
            self._list[number] = StandIn(block, number, self)

    def __len__(self) -> int:
        return len(self.blocks)

    def prefix(self, number: int) -> str:
        """What the names of a block's parameters begin with."""
        return f"{self.name}.{number}."

    @torch.no_grad()
    def check(self, calibration: Calibration) -> None:
        """Run the model without its blocks on every batch; what it needs outside of them must be loaded.

        Raises:
            ModelError: the blocks are not called one after another.
            CalibrationError: a batch does not fit the model.
        """
        for inputs in calibration.batches:
            check_inputs(self.model, inputs)
        self.form = self._observed_form(calibration.batches[0])
        with evaluating(self.model):
            for inputs in calibration.batches:
                hidden = self._passed(inputs)[0]
                self.states.append((hidden.dtype, tuple(hidden.shape)))

    def _observed_form(self, inputs: ModelInputs) -> Form:
        for form in _FORMS:
            self.form = form
            with contextlib.suppress(*_WRONG_FORM), evaluating(self.model):
                seen = self._passed(inputs)
                if len(seen) == len(self) and all(hidden is seen[0] for hidden in seen):
                    return form
        raise ModelError(
            f"the {len(self)} members of {self.name} in {type(self.model).__name__} are not called one after another, "
            "each with what the one before returned, so it cannot be quantised block by block; leave out --stream"
        )

    def _passed(self, inputs: ModelInputs) -> list[Tensor]:
        """What each stand-in was given, up to the last."""
        self._seen = []
        try:
            with contextlib.suppress(_Reached):
                call(self.model, inputs)
            return self._seen
        finally:
            self._seen = None

    def entering(self, number: int, hidden: Tensor) -> Tensor:
        """What a stand-in passes on."""
        if self._seen is not None:
            self._seen.append(hidden)
            if number == len(self) - 1:
                raise _Reached
        elif number == len(self) - 1:
            return self._true(hidden)
        return hidden

    def _true(self, hidden: Tensor) -> Tensor:
        """What the whole model would have here, as much of it as of `hidden`: a probe is smaller than a batch."""
        state = self._given()
        if state is None:
            return hidden
        return state[tuple(slice(size) for size in hidden.shape)].to(hidden.dtype, copy=True)

    @contextlib.contextmanager
    def only(self, number: int, first: Tensor | None) -> Iterator[None]:
        """One real block in its place for the length of a `with` block, handed its true input.

        Args:
            first: What it reads on the first batch, for calls outside of a calibration; None where the model makes
                that itself, before the first block.
        """
        block = self.blocks[number]

        def enter(
            module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
        ) -> tuple[tuple[object, ...], dict[str, object]]:
            hidden = _hidden(args, kwargs)
            true = self._true(hidden)
            return (
                tuple(true if value is hidden else value for value in args),
                {key: true if value is hidden else value for key, value in kwargs.items()},
            )

        with block.register_forward_pre_hook(enter, with_kwargs=True):
            stand_in, self._list[number] = self._list[number], block
            self._given = lambda: first
            try:
                yield
            finally:
                self._given = lambda: None
                self._list[number] = stand_in

    @torch.no_grad()
    def arguments(self, number: int, inputs: ModelInputs, first: Tensor | None) -> ModelInputs:
        """What a block is called with, to be called alone.

        Args:
            inputs: Of the model: the first batch, or a part of it from the front.
            first: What the block reads on the first batch; None for the first block.
        """
        seen: list[ModelInputs] = []

        def keep(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
            seen.append(as_inputs(module, args, kwargs))
            raise _Reached

        with self.only(number, first), evaluating(self.model):
            hook = self.blocks[number].register_forward_pre_hook(keep, with_kwargs=True)
            with hook, contextlib.suppress(_Reached):
                call(self.model, inputs)
        return seen[0]

    def calibration(
        self,
        base: Calibration,
        number: int,
        read: Callable[[int], Tensor] | None,
        record: Callable[[int, Tensor], None] | None = None,
    ) -> Calibration:
        """The data as the real block sees it; each forward ends behind it.

        Args:
            number: Of the block, or the number of blocks: the model behind the last.
            read: What enters there, by the number of the batch; None before the first block.
            record: Called with what the block returns.
        """

        def leave(module: nn.Module, args: tuple[object, ...], output: Any) -> None:
            if self._in_loop:
                if record is not None:
                    record(current, output if isinstance(output, Tensor) else output[0])
                raise _Reached

        current = 0

        def loop(model: nn.Module) -> None:
            nonlocal current
            before = self._given
            self._in_loop = True
            try:
                with contextlib.ExitStack() as hooks:
                    if number < len(self):
                        hooks.enter_context(self.blocks[number].register_forward_hook(leave))
                    for current, inputs in enumerate(base.batches):
                        self._given = (lambda: None) if read is None else partial(read, current)
                        with contextlib.suppress(_Reached):
                            call(model, inputs)
            finally:
                self._in_loop = False
                self._given = before

        return Calibration((), base.description, loop=loop)


def _largest_list(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The list of modules, itself in no other, that holds most parameters."""
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    outer = {name: m for name, m in lists.items() if not any(name.startswith(other + ".") for other in lists)}
    sizes = {name: sum(p.numel() for p in module.parameters()) for name, module in outer.items()}
    name = max(sizes, key=lambda n: sizes[n], default=None)
    two_streams = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    if name is None or len(lists[name]) < 2 or two_streams:
        found = "an encoder and a decoder" if two_streams else f"{len(lists)} lists of modules, none of two blocks"
        raise ModelError(
            f"to go block by block takes a list of at least two blocks that are called one after another, found "
            f"{found} in {type(model).__name__}; quantise it in memory: leave out --stream"
        )
    return name, lists[name]


def _hidden(args: tuple[object, ...], kwargs: dict[str, object]) -> Tensor:
    """What a block works on: the first tensor that it is given."""
    found = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
    if found is None:
        raise ModelError("a block was called without a tensor, so it cannot be quantised block by block")
    return found
