"""A tiny configuration of any model type, by rule.

Every number of a configuration class is a field with a default, and what a field means shows in its name: a width, a
number of heads, of layers, of places, the id of a token.  A width that is the hidden size of any part becomes the
hidden size, so that parts that have to agree still do.  What a class makes of its fields it makes again, as it is
called with the small ones.  What the rule gets wrong stands in `exceptions`, by model type.
"""

import contextlib
import dataclasses
import math
import re
from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

HIDDEN, HEADS, HEAD_DIM, LAYERS, VOCABULARY, POSITIONS = 32, 4, 8, 2, 99, 64
INNER = 48
"""Of a feed-forward layer whose width is no multiple of the hidden size."""
FIRST_ID = 3
"""Of the tokens that a configuration names, after padding, begin and end."""

_HIDDEN = re.compile(r"^(hidden_size|d_model|n_embd|hidden_dim|dim|embed_dim|emb_dim|word_embed_proj_dim|model_dim)$")
_ID = re.compile(r"(_token_id|_token_index|_token_ids|_(?:start|end|pad|eos|bos|newline)_id)$")
_WIDTH = re.compile(
    r"(size|dim|dims|width|widths|channels|hidden_sizes|inner|dff|d_ff|n_embd|d_model|dim_ff|units|filters|rank|"
    r"num_latents|num_queries|features)$"
)
_NO_WIDTH = re.compile(
    r"(patch|image|kernel|window|stride|chunk|block|batch|grid|input|pool|step|position|cluster|group|memory_size|"
    r"temporal|conv_dim_kernel|type_vocab|merge|num_labels|audio_channels|frame|bins|state_size|d_state|"
    r"num_channels|_feature_size$|^feature_size|spatial|sampling|segment|tile|max_size|context|conv_kernel)"
)


def tiny(model_type: str, changes: dict[str, Any] | None = None) -> PreTrainedConfig:
    """A configuration of two layers and widths of some dozens.

    Args:
        model_type: A key of transformers' `CONFIG_MAPPING`.
        changes: Values to take instead of the rule's, by dotted name, and under "*" by the name of a field in any part.

    Raises:
        ValueError: A change names no field.
        whatever transformers raises.
    """
    return _Shrinking(model_type, changes or {}).config()


class _Shrinking:
    def __init__(self, model_type: str, changes: dict[str, Any]) -> None:
        self.changes = {name: value for name, value in changes.items() if not name.startswith("*.")}
        self.anywhere = {name[2:]: value for name, value in changes.items() if name.startswith("*.")}
        self.cls = CONFIG_MAPPING[model_type]
        self.changed: set[str] = set()
        self.ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

    def config(self) -> PreTrainedConfig:
        default = self.cls()
        self.hidden = {
            value
            for part in _parts(default)
            for name, value in vars(part).items()
            if _HIDDEN.match(name) and isinstance(value, int)
        }
        fields = self._fields(default, "")
        lost = {*self.changes, *(f"*.{name}" for name in self.anywhere)} - self.changed
        if lost:
            raise ValueError(f"to change is what {self.cls.__name__} has no field for: {', '.join(sorted(lost))}")
        return self.cls(**fields)

    def _fields(self, part: PreTrainedConfig, prefix: str) -> dict[str, Any]:
        known = {f.name: f for f in dataclasses.fields(part)}
        made = vars(type(part)())
        fields: dict[str, Any] = {}
        for name in [*known, *(n for n, v in vars(part).items() if isinstance(v, PreTrainedConfig))]:
            path = prefix + name
            if name in fields or name in ("transformers_version", "architectures"):
                continue
            if path in self.changes or name in self.anywhere:
                fields[name] = self.changes.get(path, self.anywhere.get(name))
                self.changed |= {path, f"*.{name}"}
                continue
            value = _get(part, name)
            if isinstance(value, PreTrainedConfig):
                inner = self._fields(value, path + ".")
                fields[name] = {"model_type": value.model_type, **inner}
                continue
            field = known.get(name)
            if field is None or value is None:
                continue
            if field.default is None and made.get(name) == value and not self._given(name, value):
                continue  # made from others by the class, which makes it again
            small = self._value(name, value, part)
            if small != field.default:  # of a part, a class may have another value than its own default
                fields[name] = small
        return fields

    @staticmethod
    def _given(name: str, value: Any) -> bool:
        """Whether the class would not make this anew from small numbers: ids, tables, and what each layer is."""
        return bool(_ID.search(name)) or isinstance(value, dict) or _kinds(value)

    def _value(self, name: str, value: Any, part: PreTrainedConfig) -> Any:
        if isinstance(value, bool) or value is None or isinstance(value, str):
            return value
        if isinstance(value, float):
            return 0.0 if "drop" in name and value < 1 else value
        if isinstance(value, int):
            return self._number(name, value, part)
        if isinstance(value, dict):
            return {key: self._value(str(key), each, part) for key, each in value.items()}
        if name == "mrope_section":
            return [HEAD_DIM // 2 - 2, 1, 1]
        if isinstance(value, list | tuple) and value:
            return self._list(name, list(value), part)
        return value

    def _list(self, name: str, values: list[Any], part: PreTrainedConfig) -> Any:
        layers = next((n for n in ("num_hidden_layers", "num_layers", "n_layer", "n_layers") if _get(part, n)), None)
        staged = any(isinstance(_get(part, n), list | tuple) for n in ("depths", "hidden_sizes"))
        count = _get(part, layers) if layers and not staged else None
        if count and len(values) == count and count > LAYERS:
            kinds = list(dict.fromkeys(values)) if all(isinstance(v, str) for v in values) else []
            return (kinds * LAYERS)[:LAYERS] if len(kinds) > 1 else values[:LAYERS]
        if _ID.search(name):
            return [self._id(name)]
        if all(isinstance(v, int) and not isinstance(v, bool) for v in values):
            if name in ("depths", "depth", "layers_per_stage") or name.endswith("num_blocks"):
                return [1] * len(values)
            if "heads" in name:
                return [min(v, 2) for v in values]
            if _WIDTH.search(name) and not _NO_WIDTH.search(name) and min(values) > 8:
                return [_rounded(v * 16 / values[0]) for v in values]
            return [self._number(name, v, part) for v in values]
        return values

    def _id(self, name: str) -> int:
        name = name.removesuffix("s") if name.endswith("_ids") else name
        if name not in self.ids:
            self.ids[name] = FIRST_ID + len(self.ids) - 3
        return self.ids[name]

    def _number(self, name: str, value: int, part: PreTrainedConfig) -> int:
        if _ID.search(name) and value >= 0:
            return self._id(name)
        if value in (0, 1) or value < 0:
            return value
        if "type_vocab" in name:
            return value
        if name.endswith("codebook_size"):
            return min(value, 64)  # a power of two
        if "vocab" in name:
            return min(value, VOCABULARY)
        if "kv_heads" in name or "key_value_heads" in name:
            heads = _get(part, "num_attention_heads") or value
            return HEADS if value == heads else HEADS // 2
        if re.search(r"heads?$", name) and "mamba" not in name:
            return min(value, HEADS)
        if re.search(r"(?<!mamba_)(head_dim|d_kv|head_size|head_width|rotary_dim|key_dim|value_dim)$", name):
            return 2 * HEAD_DIM if name == "qk_head_dim" else min(value, HEAD_DIM)
        if re.search(r"(_layers|n_layers?|num_layers|depth|layers)$", name) and "conv" not in name:
            return min(value, LAYERS)
        if re.search(r"first_k_dense|num_dense_layers|dense_layers", name):
            return 1
        if re.search(r"(interval|pattern|period|every_n_layers|every|sparse_step|interleave\w*step)$", name):
            return min(value, LAYERS)
        if re.search(r"(experts|n_routed_experts|num_local_experts)$", name) and "shared" not in name:
            return min(value, 4)
        if re.search(
            r"(experts_per_tok\w*|experts_per_token|moe_topk|moe_k|top_k_experts|expert_topk|num_selected\w*)$", name
        ):
            return min(value, 2)
        if name == "mm_tokens_per_image":
            return 4
        if name in ("n_group", "topk_group"):
            return 2 if name == "n_group" else 1
        if re.search(r"(position|n_positions|n_ctx|context_length|max_seq|seq_len)", name):
            return min(value, POSITIONS)
        staged = isinstance(_get(part, "depths"), list | tuple)
        if re.search(r"(^|_)image_size$|^image_size", name):
            return min(value, 64 if staged else 32)
        if name == "window_size" and staged:
            return 2
        if name.endswith("groups") and value in self.hidden:
            return HIDDEN
        if name == "num_groups":
            return min(value, 8)
        if name in ("mamba_n_heads", "mamba_num_heads", "n_mamba_heads"):
            return 8
        if name in ("mamba_d_head", "mamba_headdim", "mamba_head_dim"):
            return 8
        if re.search(r"patch_size$|^patch_sizes?$", name):
            return min(value, 8)
        if re.search(r"(sliding_window|attention_window|window_size)$", name):
            return min(value, 8 if "window_size" not in name else 4)
        if _WIDTH.search(name) and not _NO_WIDTH.search(name) and value > 16:
            return self._width(value, part)
        return value

    def _width(self, value: int, part: PreTrainedConfig) -> int:
        if value in self.hidden:
            return HIDDEN
        own = next((v for n, v in vars(part).items() if _HIDDEN.match(n) and isinstance(v, int)), None)
        own = own or max(self.hidden, default=value)
        if value % own == 0:
            return HIDDEN * min(value // own, 4)
        if own % value == 0:
            return _rounded(HIDDEN * value / own)
        return min(value, INNER)


def _kinds(value: Any) -> bool:
    """Whether a list says of each layer what it is, and they are not all alike."""
    return isinstance(value, list) and all(isinstance(v, str) for v in value) and len(set(value)) > 1


def _get(part: PreTrainedConfig, name: str) -> Any:
    """A field as it is kept: reading one that differs between layers is an error."""
    return vars(part).get(part.attribute_map.get(name, name))


def _rounded(value: float) -> int:
    return max(8, 8 * math.floor(value / 8 + 0.5))


def _parts(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    yield config
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            yield from _parts(value)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No warnings of transformers, which says of some default configurations that their ids are too large."""
    import transformers

    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(before)
