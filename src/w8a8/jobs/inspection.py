"""What a model by name is, before anything is done with it: what is quantised, and what could be folded into what."""

from dataclasses import dataclass
from pathlib import Path

from w8a8.checkpoint.opening import Named, NamedModel, open_model
from w8a8.checkpoint.skeleton import empty_layers
from w8a8.checkpoint.vllm import Finding, foresee_as_it_is
from w8a8.core.scheme import Scheme
from w8a8.dataflow import Dataflow, observe, probe
from w8a8.errors import SchemeError
from w8a8.model.choice import Choice
from w8a8.model.coverage import coverage
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
