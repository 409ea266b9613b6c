"""What a quantised layer holds: its buffers, as a file has them and as a kernel wants them.

The buffers carry the names and shapes of a compressed-tensors file, so that `state_dict` is the file:

    weight             (N, K) int8 codes; where a simulated grid is wider than 8 bits, its float32 values,
                       and then there is no weight_scale and no weight_zero_point.  In the state dict of a weight-only
                       layer it is weight_packed and weight_shape (`w8a8.core.packed`)
    weight_scale       (1,), (N, 1), (N, G) or, per column, (1, K) float32
    weight_zero_point  as weight_scale, int32; only where weights are asymmetric
    bias               (N,) in the dtype of the float layer
    input_scale        (1,) float32, and input_zero_point (1,) int32: only where activations are static

`weight_sum` (N, G) int32 is derived from the weight and stays out of the state dict.

Where the native kernel runs the layer, the codes lie packed for it (`packed_weight`) instead of row-major: in memory
they exist once.  `layer.codes` and the state dict are then row-major copies, made when asked for.  For another kernel
that is asked for later, or in another process that reads a pickle, they are laid out anew once, not at each call.

`layer.weight` is not the codes but a `Weight`, which tells dtype and shape of the float weight and refuses the rest.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from w8a8 import kernels
from w8a8.core.affine import QParams, QTensor, dequantize
from w8a8.core.packed import SHAPE, WORDS, as_words, in_words, unpack_rows, words
from w8a8.core.scheme import CODE_REACH, MAX_CODE_BITS, PerGroup, Scheme, largest_k
from w8a8.errors import SchemeError
from w8a8.kernels import native
from w8a8.layers import saving
from w8a8.layers.weight import Weight
from w8a8.layers.weights import LayerWeight, scale_shape


class QuantLayer(nn.Module):
    """The buffers of a quantised layer: made empty, then filled, packed, moved, saved and loaded.

    They are those of a linear layer; of a lookup table (`w8a8.layers.embedding`) N are its rows.

    Args:
        integer: Whether the layer multiplies integers: it then has sums, and packs its codes for the native kernel.
        dtype: Of the float weight, which `weight` tells and `.to(dtype)` changes.
        Others: As for `QuantLinear`.
    """

    weight: Weight
    _empty: dict[str, Tensor | None] | None = None
    weight_scale: Tensor
    weight_sum: Tensor
    packed_weight: Tensor | None
    weight_zero_point: Tensor | None
    bias: Tensor | None
    input_scale: Tensor | None
    input_zero_point: Tensor | None
    weight_sqnr_db: float | None = None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        scheme: Scheme,
        *,
        bias: torch.dtype | None,
        integer: bool,
        kernel: str,
        device: torch.device | str,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.dtype = dtype
        self.in_features = in_features
        self.out_features = out_features
        self.scheme = scheme
        self._kernel = kernel
        self._integer = integer
        spec, measured = scheme.weights, scheme.measured

        def empty(dtype: torch.dtype, *shape: int) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        of_scale = scale_shape(spec.granularity, out_features, in_features)
        has_codes = spec.bits <= MAX_CODE_BITS
        buffers = {
            "weight": empty(torch.int8 if has_codes else torch.float32, out_features, in_features),
            "weight_scale": empty(torch.float32, *of_scale) if has_codes else None,
            "weight_zero_point": empty(torch.int32, *of_scale) if has_codes and not spec.symmetric else None,
            "bias": None if bias is None else empty(bias, out_features),
            "input_scale": None if measured is None else empty(torch.float32, 1),
            "input_zero_point": None if measured is None or measured.symmetric else empty(torch.int32, 1),
        }
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer)
        groups = of_scale[1] if isinstance(spec.granularity, PerGroup) else 1
        self.register_buffer("weight_sum", empty(torch.int32, self._summed, groups), persistent=False)
        self.register_buffer("packed_weight", None, persistent=False)

    @property
    def kernel(self) -> str:
        """The kernel to run, or "auto".  Setting it lays the codes out for it."""
        return self._kernel

    @kernel.setter
    def kernel(self, name: str) -> None:
        kernels.check_name(name)
        self._kernel = name
        self._lay_out()

    def _lay_out(self) -> None:
        """Pack the codes, or unpack them, where they do not lie as the kernel that is to run wants them."""
        packed, device = self.packed_weight, self.weight_sum.device
        if not self._integer or device.type == "meta":
            return
        as_panels = packed is not None and native.lies_as_here(packed, self.out_features, self.in_features)
        if not (as_panels if self._packs(device) else packed is None):
            self.set_codes(self.codes)

    def __setstate__(self, state: dict[str, object]) -> None:
        """Take what a copy or a pickle holds; what was laid out for another machine or process is laid out anew."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._lay_out()

    @property
    def _summed(self) -> int:
        """How many rows have a sum."""
        return self.out_features

    @property
    def in_words(self) -> bool:
        """Whether the state dict has the codes in int32 words."""
        return not self.arriving and in_words(self.scheme)

    @property
    def arriving(self) -> bool:
        """Whether others fill the layer now, see `as_stored`."""
        return self._empty is not None

    def as_stored(self, stored: Mapping[str, Tensor]) -> None:
        """Hold what a file has of the layer as it lies there, for others to fill, until `arrived`.

        Args:
            stored: A tensor on the meta device for each of the file's, by its name, of the file's dtype and shape.
                `weight` is until then the buffer of that name.
        """
        self._empty = dict(self._buffers)
        del self._buffers["weight"]
        self._buffers.update(stored)

    def arrived(self) -> dict[str, Tensor]:
        """End `as_stored`: what was filled, by name; the layer is empty again but for its bias."""
        assert self._empty is not None, "it was stored before"
        bias = self._buffers["bias"]
        kept = self._buffers.keys() - self._non_persistent_buffers_set - {"bias"}
        came = {key: tensor for key, tensor in self._buffers.items() if key in kept and tensor is not None}
        self._buffers.clear()
        self._buffers.update(self._empty | {"bias": bias})
        self._empty = None
        return came

    def take(self, key: str, tensor: Tensor) -> None:
        """Take one of the tensors that the module's docstring lists, which fits: codes are laid out for the kernel.

        Raises:
            SchemeError: as `set_codes`.
        """
        if key == "weight":
            self.set_codes(tensor)
        else:
            self._buffers[key] = tensor

    def take_weight(self, made: LayerWeight) -> None:
        """Take a weight from where it was made; `SchemeError` as `set_codes`."""
        for key, tensor in made.named().items():
            self.take(key, tensor)
        self.weight_sqnr_db = made.sqnr_db

    def set_codes(self, codes: Tensor) -> None:
        """Take a weight: derive its sums, and pack it where the native kernel is to run the layer.

        Args:
            codes: (N, K) int8, row-major; float32 where a simulated grid is wider than 8 bits.  Kept, not copied,
                unless it is packed.

        Raises:
            SchemeError: K is so large that the sums of these codes might not fit in int32; nothing is changed then.
        """
        if self._integer and not codes.is_meta:
            self._check_sums(codes)
        self._buffers["packed_weight"] = None
        self._buffers["weight"] = codes
        groups = self.weight_sum.shape[1]
        if codes.is_meta or not self._integer:
            self.weight_sum = codes.new_zeros((self._summed, groups), dtype=torch.int32)
        elif self._packs(codes.device):
            self._buffers["packed_weight"], self.weight_sum = native.pack(codes)
            del self._buffers["weight"]
        else:
            self.weight_sum = _sums(codes.view(self.out_features, groups, self.in_features // groups))

    def _check_sums(self, codes: Tensor) -> None:
        """Codes that were made elsewhere may reach further than those that are made here: -128, for one."""
        spec, activations = self.scheme.weights, self.scheme.activations
        assert activations is not None, "an integer layer has integer activations"
        reach = activations.reach
        first, last = (0, 0) if spec.symmetric else (spec.qmin, spec.qmax)  # zero points

        def limit_of(lowest: int, highest: int) -> int:
            return largest_k(reach, max(1, highest - first, last - lowest))

        if not codes.numel() or self.in_features <= limit_of(-CODE_REACH, CODE_REACH - 1):
            return
        lowest, highest = (int(end) for end in codes.aminmax())
        limit = limit_of(lowest, highest)
        if self.in_features > limit:
            raise SchemeError(
                f"K={self.in_features} could overflow the int32 sum, which holds K up to {limit} for a weight with "
                f"codes from {lowest} to {highest}; use simulated=True"
            )

    def _packs(self, device: torch.device) -> bool:
        """Whether codes on the device are packed."""
        activations = self.scheme.activations
        assert activations is not None, "an integer layer has integer activations"
        groups = self.weight_sum.shape[1]
        return (
            device.type == "cpu"
            and self.scheme.weights.symmetric
            and native.can_pack(self.out_features, self.in_features, groups, activations)
            and kernels.first_choice(self._kernel) == native.NATIVE.name
        )

    @property
    def codes(self) -> Tensor:
        """(N, K) int8, row-major: a copy where they are packed; float32 where a simulated grid is wider than 8 bits."""
        packed = self._buffers.get("packed_weight")
        if packed is not None:
            return kernels.unpack(packed, self.out_features, self.in_features)
        codes = self._buffers.get("weight")
        assert codes is not None, "a layer has codes, or room for them"
        return codes

    def dequantized_weight(self) -> Tensor:
        """The weight that the codes stand for, a new (N, K) float32 tensor."""
        codes = self.codes
        if codes.dtype is torch.float32:
            return codes.clone()
        return dequantize(QTensor(codes, self.weight_scale, self.weight_zero_point))

    def __getattr__(self, name: str) -> Any:
        if name == "weight" and not self.arriving and (device := self._device) is not None:
            return Weight((self.out_features, self.in_features), self.dtype, device)
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuse a parameter in a buffer's place: it would be kept where no kernel looks."""
        if isinstance(value, nn.Parameter) and (name == "weight" or name in self.__dict__.get("_buffers", ())):
            raise SchemeError(
                f"{name} of a quantised layer is a buffer and was given a parameter; give it the tensor, value.detach()"
            )
        super().__setattr__(name, value)

    @property
    def _device(self) -> torch.device | None:
        """Of the codes; None before there are any, or room for them."""
        buffers = self.__dict__.get("_buffers", {})
        found = (buffers.get(name) for name in ("packed_weight", "weight"))
        return next((buffer.device for buffer in found if buffer is not None), None)

    def set_input_params(self, params: QParams | None) -> None:
        """Take the static grid of the input.

        Args:
            params: One scale, and a zero point where the activations are asymmetric.  Copied.  None where they are not
                static.

        Raises:
            SchemeError: there is none where one is needed, or one where none is; it does not fit the scheme.
        """
        activations = self.scheme.measured
        if activations is None:
            if params is not None:
                raise SchemeError(f"input_params were given, but the activations are not static: {self.scheme}")
            return
        if params is None:
            raise SchemeError(
                f"static activations need their grid: {self.scheme}; give input_params=QParams(scale, zero_point) "
                "measured on calibration data, or use a dynamic scheme"
            )
        if not bool((torch.isfinite(params.scale) & (params.scale > 0)).all()):
            raise SchemeError(f"input_params have the scale {params.scale.tolist()}, which is not positive and finite")
        zero_point = params.zero_point
        if zero_point is not None and bool(((zero_point < activations.qmin) | (zero_point > activations.qmax)).any()):
            raise SchemeError(
                f"input_params have the zero point {zero_point.tolist()}, "
                f"outside {activations.qmin}..{activations.qmax}"
            )
        if params.scale.numel() != 1 or (params.zero_point is None) != activations.symmetric:
            raise SchemeError(
                f"input_params have {params.scale.numel()} scales and "
                f"{'no' if params.zero_point is None else 'a'} zero point; {self.scheme} takes one scale and "
                f"{'no' if activations.symmetric else 'a'} zero point"
            )
        self.input_scale = params.scale.detach().to(self._device, torch.float32, copy=True).reshape(1)
        if params.zero_point is not None:
            self.input_zero_point = params.zero_point.detach().to(self._device, torch.int32, copy=True).reshape(1)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "QuantLayer":
        """Move with the model, but keep the grid float32 through `.half()` and `.to(dtype)`."""
        probe = fn(torch.empty(0, dtype=torch.int8, device=self.weight_sum.device))
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.weight_sum.device)).dtype
        if self.packed_weight is not None and probe.device.type != "cpu":
            self._buffers["weight"], self._buffers["packed_weight"] = self.codes, None
        before = {name: b for name, b in self._buffers.items() if b is not None and name != "bias"}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in before.items():
            after = self._buffers[name]
            assert after is not None, "a move does not drop buffers"
            if after.dtype is not buffer.dtype:
                self._buffers[name] = buffer.to(after.device)
        if self.packed_weight is None and self.weight_sum.device.type == "cpu":  # moved here, perhaps
            self.set_codes(self.codes)
        return self

    @property
    def _tied_weights_keys(self) -> None:
        """Nothing is tied; transformers asks each module that it saves, also where the state dict is given to it."""
        saving.check_given(self, QuantLayer)

    def _save_to_state_dict(self, destination: dict[str, Tensor], prefix: str, keep_vars: bool) -> None:
        saving.tell(destination)
        if self.packed_weight is not None:
            destination[prefix + "weight"] = self.codes
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.in_words:
            stored = as_words(destination.pop(prefix + "weight"))
            destination.update({prefix + key: value for key, value in stored.items()})

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Tensor],
        prefix: str,
        local_metadata: Mapping[str, object],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Take codes as int8 or in words; refuse a float weight, which a copy would truncate without telling."""
        if self.in_words and prefix + WORDS in state_dict:
            state_dict = dict(state_dict)
            stored, want = state_dict.pop(prefix + WORDS), (self.out_features, words(self.in_features, 8))
            shape = state_dict.pop(prefix + SHAPE, None)
            if stored.dtype is not torch.int32 or stored.shape != want:
                error_msgs.append(
                    f"{prefix}{WORDS} is {stored.dtype} of shape {tuple(stored.shape)}, expected int32 of shape {want}"
                )
                return
            if shape is not None and shape.tolist() != [self.out_features, self.in_features]:
                error_msgs.append(
                    f"{prefix}{SHAPE} is {shape.tolist()}, expected {[self.out_features, self.in_features]}"
                )
                return
            state_dict[prefix + "weight"] = unpack_rows(stored.contiguous(), 8, self.in_features)
        holds = torch.int8 if self.scheme.weights.bits <= MAX_CODE_BITS else torch.float32
        given = state_dict.get(prefix + "weight")
        if given is not None and given.dtype is not holds:
            error_msgs.append(
                f"{prefix}weight is {given.dtype}, this {type(self).__name__} holds {holds}: "
                "load the float weights into the float model and quantise that"
            )
            return
        if self.packed_weight is not None:
            self._buffers["weight"], self._buffers["packed_weight"] = self.codes, None
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        self.set_codes(self.codes)
        self.weight_sqnr_db = None


def quant_layers(model: nn.Module) -> Iterator[tuple[str, QuantLayer]]:
    """Name and layer of everything in the model that is quantised, each once: linear layers and tables."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, QuantLayer))


def _sums(codes: Tensor) -> Tensor:
    """Sums along the last axis, int32."""
    if codes.device.type != "cpu":
        return codes.sum(-1, dtype=torch.int32)
    # 6.5 GB/s where torch, which makes an int32 copy of the weight first, reads 0.24 GB/s (torch 2.13, one layer)
    return torch.from_numpy(np.add.reduce(codes.numpy(), axis=-1, dtype=np.int32))
