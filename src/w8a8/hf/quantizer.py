"""The quantizer that transformers calls while it loads a model: layers are put in place before, and looked at after.

Weights of a float model are quantised one by one as they come from the files, each to what `w8a8.quantize` would make
of it.

Experts that the files have one by one get layers of their own before anything is loaded, and transformers is kept from
stacking them; stacked in the files, they stay float.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from w8a8 import kernels
from w8a8.checkpoint.describe import describe
from w8a8.checkpoint.files import CONFIG
from w8a8.checkpoint.headers import each_once, read_header
from w8a8.checkpoint.layout import from_json, to_json
from w8a8.checkpoint.names import remember
from w8a8.checkpoint.reader import quantize_heads, quantize_missing_tables
from w8a8.checkpoint.skeleton import as_stored, insert_quant_linears
from w8a8.core.scheme import AUTO, Scheme
from w8a8.errors import CheckpointError, SchemeError, noted
from w8a8.hf.arriving import Arriving, arriving_of
from w8a8.layers.buffers import quant_layers
from w8a8.layers.embedding import share_codes
from w8a8.layers.linear import quant_linears
from w8a8.layers.weights import make_weight
from w8a8.model.choice import Choice
from w8a8.model.experts import holds_experts, mark_arriving
from w8a8.model.pretrained import Conversion, Pretrained, stacks_experts
from w8a8.model.roles import Embeddings, Head
from w8a8.model.selection import pattern_list
from w8a8.model.swapping import build, empty_layer, swap
from w8a8.model.tables import quantize_tables

_LOG = logging.getLogger(__name__)
METHOD = "w8a8"  # in memory; files say compressed-tensors


@register_quantization_config(METHOD)
class W8A8Config(QuantizationConfigMixin):
    """What `from_pretrained` is given as `quantization_config`.

    Args:
        scheme: A scheme that integers can run, or a weight-only one, by value or by name, without static activations;
            "auto" is what is usual for the model.
        include, exclude: As for `w8a8.quantize`.
        head: "int8" quantises the output head too.
        embeddings: "int8" quantises lookup tables too, when the model is loaded: until then they are float.
        kernel, strict: As for `w8a8.quantize`; of this process, and in no file.

    Raises:
        SchemeError: the scheme is unknown, needs calibration, or cannot be executed.
        PatternError: `include` or `exclude` is no list of strings.
        ModelError: `head` or `embeddings` is neither "float" nor "int8".
        KernelError: no kernel has this name.
    """

    def __init__(
        self,
        scheme: Scheme | str = AUTO,
        *,
        include: Sequence[str] = ("*",),
        exclude: Sequence[str] = (),
        head: str = "float",
        embeddings: str = "float",
        kernel: str = kernels.AUTO,
        strict: bool = False,
    ) -> None:
        kernels.check_name(kernel)
        self.quant_method: Any = METHOD
        self.checkpoint: dict[str, object] | None = None  # what a file says; then nothing else counts
        self.scheme = scheme if scheme == AUTO else Scheme.of(scheme)
        self.include, self.exclude = pattern_list(include, "include"), pattern_list(exclude, "exclude")
        self.head, self.embeddings = Head.of(head), Embeddings.of(embeddings)
        self.kernel, self.strict = kernel, strict
        if isinstance(self.scheme, Scheme):
            way_out = "load the float model and call w8a8.quantize(model, scheme, calibration=...)"
            self.scheme.check_without_data(way_out)

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, object], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """From the `quantization_config` of a file, and how it is to be run, as for `w8a8.load`."""
        ours = ("head", "embeddings", "kernel", "strict")
        config = cls(**{name: kwargs.pop(name) for name in ours if name in kwargs})
        config.checkpoint = dict(config_dict)
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, object]:
        """What goes into config.json: once a model is loaded, the compressed-tensors description of its layers."""
        if self.checkpoint is not None:
            return dict(self.checkpoint)
        return {
            "quant_method": METHOD,
            "scheme": str(self.scheme),
            "include": self.include,
            "exclude": self.exclude,
            "head": self.head.value,
            "embeddings": self.embeddings.value,
            "kernel": self.kernel,
            "strict": self.strict,
        }

    @property
    def running(self) -> dict[str, Any]:
        """How the layers are to be run, as `QuantLinear` takes it."""
        return {"kernel": self.kernel, "strict": self.strict}


@register_quantizer(METHOD)
class W8A8Quantizer(HfQuantizer):
    """What transformers calls while it loads a model whose configuration is a `W8A8Config`."""

    quantization_config: W8A8Config

    def __init__(self, quantization_config: W8A8Config, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._dtype: torch.dtype | None = None
        self._quantized: set[str] = set()  # parameters that a QuantLinear takes
        self._arriving: list[Arriving] = []
        self._unstacked = False  # the model's experts have layers of their own
        self._stored_scheme: Scheme | None = None  # the first that a file has

    def param_needs_quantization(self, model: Pretrained, param_name: str, **kwargs: object) -> bool:
        """Whether a tensor of the files goes into a `QuantLinear`: then it is ours to shape."""
        name, _, key = param_name.rpartition(".")
        return name in self._quantized and (self.pre_quantized or key == "weight")

    def update_weight_conversions(self, weight_conversions: list[Conversion], *model: Pretrained) -> list[Conversion]:
        """What transformers converts while it loads: all but experts, where those have layers of their own.

        Args:
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
        self, model: Pretrained, dtype: torch.dtype | None = None, checkpoint_files: Any = None, **kwargs: object
    ) -> None:
        """Put empty `QuantLinear` in their places."""
        self._dtype = dtype
        files = [Path(file) for file in checkpoint_files or ()]
        stored = each_once(pair for file in files for pair in read_header(file).items())
        experts, config = as_stored(model, stored), self.quantization_config
        if config.checkpoint is not None:
            where = str(files[0].parent / CONFIG) if files else "quantization_config"
            quantization = from_json(config.checkpoint, where)
            swap(model, experts)
            another = bool(stored) and type(model).__name__ not in (model.config.architectures or ())
            packed = insert_quant_linears(model, quantization, where, stored, of_another=another, **config.running)
            self._stored_scheme = quantization.groups[0].scheme
            self._quantized = {name for name, _ in quant_layers(model)}
            self._arriving = arriving_of(model, stored, packed)
        else:  # tables come later
            choice = Choice.of(model, config.scheme, config.include, config.exclude, stacks=(experts, {}))
            choice = _untied(model, choice, config.include)
            swap(model, choice.taken)
            layers = {name: empty_layer(model, name, each, **config.running) for name, each in choice.schemes.items()}
            for layer in layers.values():
                # transformers before 5.23 casts a weight to the dtype of what it is loaded into, and then quantises it
                layer.as_stored({"weight": layer.codes.to(dtype or torch.get_default_dtype())})
            swap(model, layers)
            self._quantized = set(layers)
        self._unstacked = holds_experts(model)
        mark_arriving(model, arriving=True)

    def _process_model_after_weight_loading(self, model: Pretrained, **kwargs: object) -> Pretrained:
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
        config = self.quantization_config
        if config.head is Head.INT8 and self._stored_scheme is not None:
            quantize_heads(model, self._stored_scheme, **config.running)
        elif config.head is Head.INT8:
            choice = Choice.of(model, config.scheme, [], head=Head.INT8)
            choice.enact(build(model, choice.schemes, **config.running))
        if self.pre_quantized:
            share_codes(model)
            quantize_missing_tables(model, config.embeddings)
        else:
            quantize_tables(model, config.embeddings, config.exclude)
        config.checkpoint = to_json(describe(model))
        remember(model)
        layers = [layer for _, layer in quant_linears(model)]
        told = layers[0].extra_repr().partition("scheme=")[2] if layers else "none"
        _LOG.info("w8a8: %d linear layers run as %s", len(layers), told)
        return model


class _Quantize(ConversionOps):
    """One float weight of the files becomes codes and scales."""

    def __init__(self, quantizer: W8A8Quantizer) -> None:
        self.hf_quantizer = quantizer

    def convert(self, input_dict: dict[str, Any], *args: object, **kwargs: Any) -> Any:
        """Codes and scales by their names in the model; `NonFiniteError` where the weight has a NaN or an infinity."""
        name = kwargs["full_layer_name"].removesuffix(".weight")
        layer = kwargs["model"].get_submodule(name)
        (value,) = input_dict.values()
        weight: Tensor = value[0] if isinstance(value, list) else value
        weight = weight if self.hf_quantizer._dtype is None else weight.to(self.hf_quantizer._dtype)
        with noted(f"while quantising {name}"):
            made = make_weight(weight.t() if layer.was_conv1d else weight, layer.scheme.weights)
        layer.weight_sqnr_db = made.sqnr_db
        named = {f"{name}.{key}": tensor for key, tensor in made.named().items()}
        for key in named:
            kwargs["missing_keys"].discard(key)
        return named


def _untied(model: Pretrained, choice: Choice, include: Sequence[str]) -> Choice:
    """The choice without layers whose weight the files do not have under its own name.

    Raises:
        SchemeError: one that is tied was chosen by its very name.
    """
    ties = {*model.all_tied_weights_keys, *model.all_tied_weights_keys.values()}
    tied = [name for name in choice.schemes if f"{name}.weight" in ties]
    named = [name for name in tied if name in include]
    if named:
        raise SchemeError(
            f"{named[0]} is tied to another layer, so the files do not have it: quantise the head with head='int8', "
            "or the loaded model with w8a8.quantize"
        )
    return replace(choice, schemes={name: each for name, each in choice.schemes.items() if name not in tied})
