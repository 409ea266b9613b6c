"""What a model by name is, before anything is done with it: what is quantised, could be folded, is fused."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from w8a8.checkpoint.opening import Named, NamedModel, open_model
from w8a8.checkpoint.skeleton import empty_layers
from w8a8.checkpoint.vllm import Finding, foresee_as_it_is
from w8a8.core.scheme import Scheme
from w8a8.dataflow import Dataflow, observe, probe
from w8a8.errors import ModelError, SchemeError
from w8a8.evaluation.samples import UNITS, random_inputs
from w8a8.fusing.models import Fusions, fusions, optimize
from w8a8.layers.linear import QuantLinear
from w8a8.model.choice import Choice
from w8a8.model.coverage import coverage
from w8a8.model.kinds import kind_of_model
from w8a8.model.pretrained import Pretrained
from w8a8.pipeline import quantize
from w8a8.records.coverage import Coverage


@dataclass(frozen=True)
class Inspected:
    """A directory, seen without its weights.

    schemes: Of its groups; none where it is float.
    vllm: What vLLM will make of it, where it is quantised.
    coverage: What is quantised, or would be, and what is not and why.
    """

    directory: Path
    quantized: bool
    schemes: tuple[Scheme, ...]
    vllm: tuple[Finding, ...]
    coverage: Coverage

    def to_dict(self) -> dict[str, object]:
        """For JSON."""
        return {**{k: v for k, v in vars(self).items() if k != "coverage"}, **self.coverage.to_dict()}


def inspect_model(model: Named) -> Inspected:
    """What of a model is quantised, or would be by default: what `w8a8 inspect` shows.  No weight is read.

    Raises:
        CheckpointError: it cannot be read.
        SchemeError: of a float one `w8a8.quantize` could take nothing.
    """
    directory = NamedModel.of(model).directory
    quantization = directory.quantization
    try:
        built, packed = empty_layers(directory)
    except SchemeError:  # one that cannot run can still be shown
        built, packed = empty_layers(directory, simulated=True)
    if quantization is None:
        choice = Choice.of(built, "w8a8")
        chosen = dict.fromkeys([*choice.schemes, *choice.taken], "float now; `w8a8 quantize` takes it")
        return Inspected(directory.path, False, (), (), coverage(built, choice.selection.reasons | chosen))
    schemes = tuple(group.scheme for group in quantization.groups)
    return Inspected(directory.path, True, schemes, foresee_as_it_is(built, packed), coverage(built, {}))


def observe_model(model: Named) -> Dataflow:
    """What could be folded into what, seen on a few random tokens: what `w8a8 inspect --pairs` shows.

    Raises:
        ModelError, CheckpointError: as `open_model` and `w8a8.dataflow.observe`.
    """
    opened = open_model(model).model
    return observe(opened, probe(opened))


@torch.no_grad()
def fuse_model(model: Named) -> Fusions:
    """What `w8a8.optimize` fuses of a model, seen in a forward: what `w8a8 inspect --fused` shows.

    A float one is quantised for that, in the usual scheme, in memory.
    The forward is of random tokens, pictures or sounds.

    Raises:
        ModelError: it reads something else; as `open_model`, `w8a8.quantize` and `w8a8.optimize`.
        CheckpointError: it cannot be read.
    """
    opened = open_model(model).model
    inputs = _inputs(opened)
    if not any(isinstance(module, QuantLinear) for module in opened.modules()):
        quantize(opened)
    optimize(opened)
    opened(**inputs)
    return fusions(opened)


def _inputs(model: Pretrained) -> dict[str, Tensor]:
    if kind_of_model(model) in UNITS:
        return random_inputs(model, 2)
    if model.main_input_name != "input_ids":
        raise ModelError(
            f"what is fused was to be seen in a forward, and {type(model).__name__} reads {model.main_input_name}, of "
            "which none can be made here: in Python, w8a8.optimize(model), call it, and print w8a8.fusions(model)"
        )
    found = probe(model)
    return found | {"attention_mask": torch.ones_like(found["input_ids"])}
