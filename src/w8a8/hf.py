"""transformers, unmodified: a model is quantised while it is loaded, and W8A8 directories run in integers.

    AutoModelForCausalLM.from_pretrained(float_model, quantization_config=w8a8.W8A8Config("w8a8"))
    w8a8.enable(); AutoModelForCausalLM.from_pretrained(w8a8_directory)

Both are a quantizer that transformers calls while it loads.  In the first the weights are quantised one by one as they
come from the files, each to what `w8a8.quantize` would make of it.  In the
second the configuration class that transformers has for compressed-tensors is replaced by one that looks first: what
`w8a8.load` runs becomes ours, everything else stays theirs.  `disable` puts theirs back.

Experts that the files have one by one get layers of their own before anything is loaded, and transformers is kept from
stacking them; stacked in the files, they stay float.

The model's `save_pretrained` then writes the directory that `w8a8.save` writes.
"""

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from w8a8.checkpoint.describe import describe
from w8a8.checkpoint.files import CONFIG, mapped
from w8a8.checkpoint.headers import Entry, each_once, read_header
from w8a8.checkpoint.layout import from_json, runs_here, to_json
from w8a8.checkpoint.names import FileNames, remember
from w8a8.checkpoint.reader import QUANTIZED, check_superfluous, place_tensor, stored_keys
from w8a8.checkpoint.skeleton import insert_quant_linears, unstack_as_stored
from w8a8.core.packed import SHAPE
from w8a8.core.scheme import Scheme
from w8a8.errors import CheckpointError, SchemeError, W8A8Error
from w8a8.layers.linear import QuantLinear, quant_linears
from w8a8.layers.weights import make_weight
from w8a8.model.choice import Choice
from w8a8.model.experts import holds_experts, mark_arriving, stacks_experts, taken
from w8a8.model.roles import Head
from w8a8.model.selection import select
from w8a8.model.swapping import build, empty_layer, swap

_LOG = logging.getLogger(__name__)
METHOD = "w8a8"  # in memory; files say compressed-tensors
_THEIRS = "compressed-tensors"


@register_quantization_config(METHOD)
class W8A8Config(QuantizationConfigMixin):
    """What `from_pretrained` is given as `quantization_config`.

    Args:
        scheme: A scheme that integers can run, or a weight-only one, by value or by name, without static activations.
        include, exclude: As for `w8a8.quantize`.
        head: "int8" quantises the output head too.

    Raises:
        SchemeError: the scheme is unknown, needs calibration, or cannot be executed.
        ModelError: `head` is neither "float" nor "int8".
    """

    def __init__(
        self,
        scheme: Scheme | str = "w8a8",
        *,
        include: Sequence[str] = ("*",),
        exclude: Sequence[str] = (),
        head: str = "float",
    ) -> None:
        self.quant_method: Any = METHOD
        self.checkpoint: dict[str, Any] | None = None  # what a file says; then nothing else counts
        self.scheme = Scheme.of(scheme)
        self.include, self.exclude, self.head = list(include), list(exclude), Head.of(head)
        if self.scheme.static:
            raise SchemeError(
                f"the scheme {self.scheme.name} has static activation scales, which are measured on calibration data: "
                "load the float model and call w8a8.quantize(model, scheme, calibration=...)"
            )

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """From the `quantization_config` of a file."""
        config = cls()
        config.checkpoint = dict(config_dict)
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """What goes into config.json: once a model is loaded, the compressed-tensors description of its layers."""
        if self.checkpoint is not None:
            return dict(self.checkpoint)
        return {
            "quant_method": METHOD,
            "scheme": str(self.scheme),
            "include": self.include,
            "exclude": self.exclude,
            "head": self.head.value,
        }


@register_quantizer(METHOD)
class W8A8Quantizer(HfQuantizer):
    """What transformers calls while it loads a model whose configuration is a `W8A8Config`."""

    quantization_config: W8A8Config
    requires_calibration = False

    def __init__(self, quantization_config: W8A8Config, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._dtype: torch.dtype | None = None
        self._quantized: set[str] = set()  # parameters that a QuantLinear takes
        self._arriving: list[_Arriving] = []
        self._unstacked = False  # the model's experts have layers of their own

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Nothing is needed beside this package."""

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Whether a tensor of the files goes into a `QuantLinear`: then it is ours to shape."""
        name, _, key = param_name.rpartition(".")
        return name in self._quantized and (self.pre_quantized or key == "weight")

    def update_weight_conversions(self, weight_conversions: Any, *model: Any) -> Any:
        """What transformers converts while it loads: all but experts, where those have layers of their own.

        Args:
            weight_conversions: Of the model's class.
            model: Given by transformers 5.21 and later.
        """
        conversions = super().update_weight_conversions(weight_conversions, *model)  # type: ignore[no-untyped-call]
        return [each for each in conversions if not (self._unstacked and stacks_experts(each))]

    def get_quantize_ops(self) -> ConversionOps:
        """What quantises one weight as it comes from the file."""
        return _Quantize(self)

    def is_serializable(self) -> bool:
        """The layers' buffers are the tensors of the file."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Codes have no gradients."""
        return False

    @property
    def is_compileable(self) -> bool:
        """A layer is one opaque op."""
        return True

    def _process_model_before_weight_loading(
        self, model: Any, dtype: torch.dtype | None = None, checkpoint_files: Any = None, **kwargs: Any
    ) -> None:
        """Put empty `QuantLinear` in their places."""
        self._dtype = dtype
        files = [Path(file) for file in checkpoint_files or ()]
        stored = each_once(pair for file in files for pair in read_header(file).items())
        stacks = unstack_as_stored(model, stored)
        if self.quantization_config.checkpoint is not None:
            where = str(files[0].parent / CONFIG) if files else "quantization_config"
            quantization = from_json(self.quantization_config.checkpoint, where)
            another = bool(stored) and type(model).__name__ not in (model.config.architectures or ())
            packed = insert_quant_linears(model, quantization, where, stored, of_another=another)
            self._quantized = {name for name, _ in quant_linears(model)}
            self._arriving = _arriving(model, stored, packed)
            self._unstacked = holds_experts(model)
            mark_arriving(model, arriving=True)
            return
        config = self.quantization_config
        chosen = _untied(model, select(model, config.include, config.exclude).chosen, config.include)
        if not taken(stacks, chosen):  # as `w8a8.quantize` leaves them
            swap(model, stacks)
        self._unstacked = holds_experts(model)
        layers = {name: empty_layer(model, name, config.scheme) for name in chosen}
        for layer in layers.values():
            # transformers before 5.23 casts a weight to the dtype of what it is loaded into, and then has it quantised
            layer.as_stored({"weight": layer.codes.to(dtype or torch.get_default_dtype())})
        swap(model, layers)
        mark_arriving(model, arriving=True)
        self._quantized = set(layers)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        """Check what came, pack it for the kernel, and have the configuration say what the layers are."""
        for arriving in self._arriving:
            arriving.take()
        self._arriving.clear()
        mark_arriving(model, arriving=False)
        if not self.pre_quantized:
            for name, layer in quant_linears(model):
                came = layer.arrived()
                if came["weight"].is_floating_point():  # nothing came
                    raise CheckpointError(
                        f"{name} is to be quantised while the model is loaded, and its weight is not in the files; "
                        f"give the whole model, or exclude=['{name}'] to have transformers initialise the layer"
                    )
                for key, tensor in came.items():
                    layer.take(key, tensor)
        if self.quantization_config.head is Head.INT8:
            choice = Choice.of(model, self.quantization_config.scheme, [], head=Head.INT8)
            choice.enact(build(model, choice.schemes))
        self.quantization_config.checkpoint = to_json(describe(model))
        remember(model)
        layers = [layer for _, layer in quant_linears(model)]
        _LOG.info("w8a8: %d linear layers run as %s", len(layers), layers[0].extra_repr().partition("scheme=")[2])
        return model


class _Arriving:
    """A layer of a file while transformers fills it: what the file holds of it is held by the layer as it lies there.

    Otherwise transformers would fill in what is missing, convert dtypes without a word, and refuse shapes and words
    that `load` takes.

    Args:
        layer: Empty; changed until `take`.
        found: Each tensor of the files by its key.
        packed: The codes lie in words.
    """

    def __init__(self, layer: QuantLinear, found: Mapping[str, Entry], *, packed: bool) -> None:
        self.layer, self.packed = layer, packed
        self._where = {key: entry.where for key, entry in sorted(found.items())}
        layer.as_stored(
            {key: torch.empty(entry.shape, dtype=entry.dtype, device="meta") for key, entry in found.items()}
        )
        if packed:  # GPT-2 initialises anew what it finds under that name, where a tied head is missing in the files
            placeholder: Any = torch.empty(0, dtype=torch.float32, device="cpu")
            placeholder._is_hf_initialized = True
            layer.__dict__["weight"] = placeholder

    def take(self) -> None:
        """Check what came, and pack it for the kernel.

        Raises:
            CheckpointError: it is not what the layer holds, or makes no sense; file and tensor are named.
        """
        self.layer.__dict__.pop("weight", None)
        came = self.layer.arrived()
        for key, where in self._where.items():
            place_tensor(self.layer, key, came.pop(key), where, packed=self.packed)


def _arriving(model: nn.Module, stored: Mapping[str, Entry], packed: set[str]) -> list[_Arriving]:
    """Every layer of the model, whose tensors are all in the files, once, which hold nothing else of it.

    Nor do they hold scales of a layer that is not quantised.

    Raises:
        CheckpointError: that is not so.
    """
    if not stored:
        raise CheckpointError(
            "quantised layers are filled from safetensors files, and none are given: load a directory"
        )
    names = FileNames(model)
    found = names.placed(stored)
    arriving, taken = [], set()
    for name, layer in quant_linears(model):
        keys = stored_keys(layer, packed=name in packed)
        missing = [f"{name}.{key}" for key in sorted(keys - {SHAPE}) if f"{name}.{key}" not in found]
        if missing:
            folder = next(iter(stored.values())).file.parent
            raise CheckpointError(f"{folder}: {missing[0]} is missing; copy the model again")
        taken |= {f"{name}.{key}" for key in keys}
        here = {key: found[f"{name}.{key}"] for key in keys if f"{name}.{key}" in found}
        arriving.append(_Arriving(layer, here, packed=name in packed))
    modules = dict(model.named_modules())
    for name in found.keys() - taken:
        prefix, _, key = name.rpartition(".")
        module = modules.get(prefix)
        unasked = isinstance(module, QuantLinear) and (key != "bias" or module.bias is None)
        if module is not None and (key in QUANTIZED or unasked):
            check_superfluous(names, module, name, mapped(found[name]), found[name].where)
    return arriving


class _Quantize(ConversionOps):
    """One float weight of the files becomes codes and scales."""

    def __init__(self, quantizer: W8A8Quantizer) -> None:
        self.hf_quantizer = quantizer

    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Codes and scales by their names in the model.

        Raises:
            NonFiniteError: the weight holds a NaN or an infinity.
        """
        name = kwargs["full_layer_name"].removesuffix(".weight")
        layer = kwargs["model"].get_submodule(name)
        (value,) = input_dict.values()
        weight: Tensor = value[0] if isinstance(value, list) else value
        weight = weight if self.hf_quantizer._dtype is None else weight.to(self.hf_quantizer._dtype)
        try:
            weight = weight.t() if layer.was_conv1d else weight
            made = make_weight(weight, layer.scheme.weights)
        except W8A8Error as error:
            error.add_note(f"while quantising {name}")
            raise
        layer.weight_sqnr_db = made.sqnr_db
        named = {f"{name}.{key}": tensor for key, tensor in made.named().items()}
        for key in named:
            kwargs["missing_keys"].discard(key)
        return named


def enable() -> None:
    """Let transformers run compressed-tensors directories by this package, in this process.

    Whatever `w8a8.load` runs: 8-bit integer layers in integers, and weight-only ones, packed or not, with a float
    product and their weights in int8, where transformers would keep them decompressed.  What `load` does not run (fp8,
    reordered groups, quantised caches) is loaded by transformers as before, and so is everything after `disable`.
    Calling it twice is calling it once.
    """
    theirs = AUTO_QUANTIZATION_CONFIG_MAPPING[_THEIRS]
    if not isinstance(theirs, _Ours):
        ours: Any = _Ours(theirs)
        AUTO_QUANTIZATION_CONFIG_MAPPING[_THEIRS] = ours


def disable() -> None:
    """Undo `enable`."""
    ours = AUTO_QUANTIZATION_CONFIG_MAPPING[_THEIRS]
    if isinstance(ours, _Ours):
        AUTO_QUANTIZATION_CONFIG_MAPPING[_THEIRS] = ours.theirs


@contextlib.contextmanager
def enabled() -> Iterator[None]:
    """`enable` for the length of a `with` block."""
    before = AUTO_QUANTIZATION_CONFIG_MAPPING[_THEIRS]
    enable()
    try:
        yield
    finally:
        AUTO_QUANTIZATION_CONFIG_MAPPING[_THEIRS] = before


class _Ours:
    """Stands where transformers has its class for compressed-tensors configurations, and makes ours where it can."""

    def __init__(self, theirs: Any) -> None:
        self.theirs = theirs

    def from_dict(self, config_dict: Mapping[str, Any], **kwargs: Any) -> Any:
        """The configuration that a file describes."""
        ours = runs_here(config_dict)
        _LOG.info("w8a8: this directory is run by %s", "w8a8" if ours else "transformers' own quantizer")
        return (W8A8Config if ours else self.theirs).from_dict(config_dict, **kwargs)


def _untied(model: Any, chosen: Sequence[str], include: Sequence[str]) -> list[str]:
    """The chosen layers whose weight the files have under its own name.

    Raises:
        SchemeError: one that is tied was chosen by its very name.
    """
    ties = {*model.all_tied_weights_keys, *model.all_tied_weights_keys.values()}
    tied = [name for name in chosen if f"{name}.weight" in ties]
    named = [name for name in tied if name in include]
    if named:
        raise SchemeError(
            f"{named[0]} is tied to another layer, so the files do not have it: quantise the head with head='int8', "
            "or the loaded model with w8a8.quantize"
        )
    return [name for name in chosen if name not in tied]
