"""What becomes of every tensor of a directory, known from headers and config.json alone, before a value is read.

The model is built without memory, and the layers are chosen by `Choice.of`, as for a model in memory.  A tensor
of the files is found in the model under its own name, or with the model's `base_model_prefix` before it, as some
files leave it out; the result has the names that `w8a8.save` writes.  Experts that are quantised have layers of their
own (`w8a8.model.experts`), which files have one by one, as on the hub, or stacked: then each is a range of a tensor's
bytes. A tensor that has no place in the model is dropped where transformers would ignore it, and an error elsewhere:
weights that transformers converts while loading, experts that stay stacked among them.  Values are cast to the dtype
that transformers would load them in, the config's, before anything else; a second copy of a tied weight is dropped.

Shards are cut by bytes in the order of the source, so that they are the same for any number of processes.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from w8a8.checkpoint.describe import config_of, describe
from w8a8.checkpoint.directory import Directory
from w8a8.checkpoint.files import CONFIG, SINGLE
from w8a8.checkpoint.headers import Entry, Told, each_once, in_order
from w8a8.checkpoint.layout import to_json
from w8a8.checkpoint.names import FileNames
from w8a8.checkpoint.skeleton import by_tensor, check_counts, empty_model, not_saved, saved
from w8a8.checkpoint.vllm import Finding, foresee_as_it_is
from w8a8.core.scheme import PerTensor, QuantSpec, Scheme
from w8a8.errors import CheckpointError, SchemeError, few
from w8a8.layers.linear import is_conv1d
from w8a8.model.choice import Choice
from w8a8.model.coverage import coverage
from w8a8.model.experts import Experts, unstacked
from w8a8.model.pretrained import Pretrained
from w8a8.model.swapping import empty_layer, swap
from w8a8.records.coverage import Coverage

PIECE = 8 << 20
"""Bytes of the source that are in memory at once, save for tensors that must be seen whole."""

SHARD_BYTES = 1 << 30
"""Of a file of the result, and so what a kill loses at most for each process."""

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class UnplacedError(CheckpointError):
    """The files hold other tensors than the model: it has to be loaded to be quantised, as transformers converts it."""


@dataclass(frozen=True)
class Step:
    """One tensor of the source, or a layer's range of one.

    name, place: In the result and in the model, of the tensor or, where it is quantised, of its layer.
    dtype: That the values are cast to first.
    spec: The grid of a weight that is quantised; None: it is copied.
    transposed: The weight is `Conv1D`'s, (K, N).
    in_words: Its codes are written in int32 words.
    outputs: Name, dtype and shape of what it becomes: itself, or codes and scales.
    """

    entry: Entry
    name: str
    place: str
    dtype: torch.dtype
    spec: QuantSpec | None
    transposed: bool
    in_words: bool
    outputs: tuple[Told, ...]

    @property
    def whole(self) -> bool:
        """Whether no part can be quantised without the rest: one scale for all, or a transposed file."""
        return self.spec is not None and (self.transposed or isinstance(self.spec.granularity, PerTensor))

    @property
    def rows(self) -> int:
        """Output rows of a weight, N."""
        return self.entry.shape[1 if self.transposed else 0]

    @property
    def bytes(self) -> int:
        return sum(math.prod(shape) * dtype.itemsize for _, dtype, shape in self.outputs)

    def pieces(self) -> Iterator[tuple[int, int]]:
        """Positions in the file, from and to, of what is read at once: rows where the tensor is quantised."""
        unit = self.entry.dtype.itemsize
        if self.spec is not None:
            unit = self.entry.bytes if self.whole else self.entry.shape[1] * self.entry.dtype.itemsize
        size = max(unit, PIECE // unit * unit) if unit else 1
        for begin in range(self.entry.begin, self.entry.end, size):
            yield begin, min(begin + size, self.entry.end)


@dataclass(frozen=True)
class Shard:
    """One file of the result."""

    file: str
    steps: tuple[Step, ...]

    @property
    def outputs(self) -> list[Told]:
        """Its tensors in the order of the file, the widest elements first, so that all lie aligned."""
        return in_order(output for step in self.steps for output in step.outputs)


@dataclass(frozen=True)
class Plan:
    """The whole job.

    choice: Made of an empty model, and enacted there.
    config: The config.json of the result.
    findings: What vLLM will make of it.
    unwanted: Tensors of the source that the model's class does without, and so the result.
    """

    source: Directory
    choice: Choice
    scheme: Scheme
    shards: tuple[Shard, ...]
    config: dict[str, object]
    coverage: Coverage
    findings: tuple[Finding, ...]
    unwanted: tuple[str, ...]

    @property
    def steps(self) -> list[Step]:
        return [step for shard in self.shards for step in shard.steps]


def make_plan(
    source: Directory,
    scheme: Scheme,
    *,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    head: str = "float",
    embeddings: str = "float",
    shard_bytes: int = SHARD_BYTES,
) -> Plan:
    """Decide what becomes of every tensor.

    Args:
        scheme, include, exclude, head, embeddings: As for `w8a8.quantize`.
        shard_bytes: Files of the result are not larger, save for a tensor that is.

    Raises:
        UnplacedError: the files hold tensors that have no place of their own in the model, or lack some of it.
        CheckpointError: the files are torn or missing.
        SchemeError: the scheme cannot be executed, or nothing is left to quantise.
        PatternError, ModelError: as `w8a8.quantize`.
    """
    if source.quantization is not None:
        raise SchemeError(f"{source.path} is quantised already: give the directory of the float model")
    check_counts(source)
    model = empty_model(source)
    stacks = unstacked(model, at_most=_most_experts(source))
    choice = Choice.of(model, scheme, include, exclude, head=head, embeddings=embeddings, stacks=stacks)
    swap(model, choice.taken)
    selection, tables = choice.selection, choice.tables
    schemes = dict.fromkeys(selection.chosen, scheme) | tables.schemes
    names = FileNames(model)
    found, unwanted = _sources(source, model)
    chosen = {f"{name}.weight": name for name in schemes}
    copies = _copies(model, found, set(chosen)) | not_saved(model)
    dtypes = _dtypes(model)
    steps = []
    for parameter, entry in found.items():
        dtype = dtypes.get(parameter, entry.dtype)
        if parameter in chosen:
            name = chosen.pop(parameter)
            steps.append(_quantized(model, names, name, schemes[name], dtype, entry))
        elif parameter not in copies:
            steps.append(_copied(names, parameter, dtype, entry))
    for parameter, name in chosen.items():  # tied: the files have it under the other name only
        others = selection.together.get(name) or tables.tied.get(name) or (selection.untied[name],)
        entry = next(found[f"{other}.weight"] for other in others if f"{other}.weight" in found)
        steps.append(_quantized(model, names, name, schemes[name], dtypes.get(parameter, entry.dtype), entry))
    layers = {name: empty_layer(model, name, each) for name, each in schemes.items()}
    aliases = {name: names for names, _ in by_tensor(model) if len(names) > 1 for name in names}  # by each of them
    choice.enact(layers)
    there = {f"{step.place}.weight" if step.place in layers else step.place for step in steps}
    for name in _apart(model, aliases, there):
        entry = found[next(alias for alias in aliases[name] if alias in found)]
        steps.append(_copied(names, name, dtypes.get(name, entry.dtype), entry))
    config = config_of(model, _stated_dtype(model, steps)) | {"quantization_config": to_json(describe(model))}
    shards = _cut(steps, shard_bytes)
    told = coverage(model, selection.reasons)
    return Plan(source, choice, scheme, shards, config, told, foresee_as_it_is(model), unwanted)


def _most_experts(source: Directory) -> int:
    """How many a layer can have: each is a tensor of the files, or one matrix of a stack."""
    stacks = (entry.shape[0] for entry in source.entries.values() if len(entry.shape) == 3)
    return max([len(source.entries), *stacks])


def _sources(source: Directory, model: Pretrained) -> tuple[dict[str, Entry], tuple[str, ...]]:
    """Where each parameter and buffer of the model lies in the files, in their order; and what the class leaves out."""
    tensors, names = set(model.state_dict()), FileNames(model)
    experts = {name: module for name, module in model.named_modules() if isinstance(module, Experts)}
    prefix = f"{model.base_model_prefix}." if model.base_model_prefix else ""
    placed: list[tuple[str, Entry]] = []
    lost, unwanted = [], []
    for name, whole in source.entries.items():
        here = names.in_model(name)
        if here in tensors and not names.converted(name):
            parts = {here: whole}
        else:
            parts = _taken_apart(experts, (here, prefix + here, here.removeprefix(prefix)), whole)
        if not parts and names.unwanted(here):
            unwanted.append(name)
        elif not parts and not names.ignored(here):
            lost.append(f"{whole.file.name}: {name}")
        placed += parts.items()
    found = each_once(placed)
    if lost:
        raise UnplacedError(
            f"{source.path}: {len(lost)} tensors have no place of their own in {type(model).__name__} ({lost[0]}); "
            "transformers converts them while loading, so this model can only be quantised in memory (--no-stream)"
        )
    _check_complete(source, model, found)
    return found, tuple(unwanted)


def _taken_apart(experts: Mapping[str, Experts], places: Sequence[str], whole: Entry) -> dict[str, Entry]:
    """The layers' ranges of a tensor that has the weights of all experts of a layer; nothing for another tensor.

    Raises:
        UnplacedError: it lies in another way there than in the model.
    """
    for stack, _, parameter in (place.rpartition(".") for place in places):
        module = experts.get(stack)
        if module is None or parameter not in module.stacked:
            continue
        e, h, i = module.num_experts, module.hidden_dim, module.intermediate_dim
        *inner, down = module.names
        names, shape = (inner, (i, h)) if parameter == module.stacked[0] else ([down], (h, i))
        wanted = (e, len(names) * shape[0], shape[1])
        if whole.shape != wanted:
            raise UnplacedError(
                f"{whole.where} has shape {whole.shape}, {CONFIG} says {wanted}; transformers may turn it round "
                "while loading, so this model can only be quantised in memory (--no-stream)"
            )
        layers = [f"{stack}.{number}.{name}.weight" for number in range(e) for name in names]
        size = whole.bytes // len(layers)
        begins = range(whole.begin, whole.end, size)
        return {
            layer: replace(whole, shape=shape, begin=begin, end=begin + size)
            for layer, begin in zip(layers, begins, strict=True)
        }
    return {}


def _check_complete(source: Directory, model: nn.Module, found: Mapping[str, Entry]) -> None:
    """Every parameter is in the files, or is one with another that is, and has the shape of the model's.

    Raises:
        UnplacedError: some are not in the files: transformers may have a way to make them while loading.
        CheckpointError: another shape.
    """
    wanted = saved(model)
    for name, tensor in ((name, tensor) for names, tensor in wanted for name in names if name in found):
        if tuple(tensor.shape) != found[name].shape:
            raise CheckpointError(
                f"{found[name].file}: {name} has shape {found[name].shape}, {CONFIG} says {tuple(tensor.shape)}"
            )
    missing = [names[0] for names, _ in wanted if not any(name in found for name in names)]
    if missing:
        raise UnplacedError(
            f"{source.path}: {len(missing)} tensors are missing: {few(missing, 4)}; where transformers makes them "
            f"while loading {type(model).__name__}, it can be quantised in memory (--no-stream)"
        )


def _dtypes(model: Pretrained) -> dict[str, torch.dtype]:
    """What transformers loads each float tensor in: the config's dtype, save where the architecture keeps its own.

    Nothing where the config does not say: then files are taken as they are.
    """
    if getattr(model.config, "dtype", None) is None:
        return {}
    return {name: tensor.dtype for name, tensor in model.state_dict().items() if tensor.is_floating_point()}


def _stated_dtype(model: nn.Module, steps: Iterable[Step]) -> torch.dtype:
    """What `save_pretrained` would have config.json say: the dtype of the first parameter that is float still."""
    written = {step.place: step.dtype for step in steps if step.spec is None}
    name, first = next((name, each) for name, each in model.named_parameters() if each.is_floating_point())
    return written.get(name, first.dtype)


def _copies(model: nn.Module, found: Mapping[str, Entry], chosen: set[str]) -> set[str]:
    """Names in the files whose tensor is tied to one that is there under an earlier name of the model.

    Raises:
        UnplacedError: the two are not equal, so that it is transformers' to say which of them counts.
    """
    copies = set()
    for names, _ in by_tensor(model):
        there = [name for name in names if name in found and name not in chosen]
        for name in there[1:]:
            if not _same_bytes(found[there[0]], found[name]):
                raise UnplacedError(
                    f"{found[name].file}: {name} and {there[0]} are one weight by {CONFIG}, and two in the files; "
                    "transformers decides while loading, so this model can only be quantised in memory (--no-stream)"
                )
            copies.add(name)
    return copies


def _same_bytes(a: Entry, b: Entry) -> bool:
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    with a.file.open("rb") as file, b.file.open("rb") as file_b:
        file.seek(a.begin)
        file_b.seek(b.begin)
        sizes = [min(PIECE, a.bytes - start) for start in range(0, a.bytes, PIECE)]
        return all(file.read(size) == file_b.read(size) for size in sizes)


def _apart(model: nn.Module, aliases: Mapping[str, list[str]], there: set[str]) -> Iterator[str]:
    """What has several names in the files' model, and is written under none of those that it still has: one of these.

    A quantised layer's bias is its own (BERT's head has that of another module, FLAVA's modules that of their heads).

    Args:
        model: With quantised layers in their places.
        aliases: Of the float model.
        there: The names in the model that are written already.
    """
    for names, _ in saved(model):
        several = [name for name in names if name in aliases]
        if several and there.isdisjoint(several):
            yield several[0]


def _copied(names: FileNames, place: str, dtype: torch.dtype, entry: Entry) -> Step:
    name = names.in_file(place)
    return Step(entry, name, place, dtype, None, False, False, ((name, dtype, entry.shape),))


def _quantized(model: nn.Module, names: FileNames, name: str, scheme: Scheme, dtype: torch.dtype, entry: Entry) -> Step:
    if entry.dtype not in _FLOATS:
        raise CheckpointError(f"{entry.where} is {entry.dtype}, which is no weight of a float model")
    linear = model.get_submodule(name)
    layer = empty_layer(model, name, scheme)
    kept = {key: value for key, value in layer.state_dict().items() if key != "bias"}
    told = names.of_layer(name)
    outputs = tuple((f"{told}.{key}", value.dtype, tuple(value.shape)) for key, value in kept.items())
    return Step(entry, told, name, dtype, scheme.weights, is_conv1d(linear), layer.in_words, outputs)


def _cut(steps: list[Step], shard_bytes: int) -> tuple[Shard, ...]:
    groups: list[list[Step]] = [[]]
    for step in steps:
        if groups[-1] and sum(s.bytes for s in groups[-1]) + step.bytes > shard_bytes:
            groups.append([])
        groups[-1].append(step)
    return (Shard(SINGLE, tuple(groups[0])),) if len(groups) == 1 else numbered(groups)


def numbered(groups: Sequence[Sequence[Step]]) -> tuple[Shard, ...]:
    """Files by the names that those of several have."""
    count = len(groups)
    return tuple(Shard(f"model-{i:05d}-of-{count:05d}.safetensors", tuple(g)) for i, g in enumerate(groups, start=1))
