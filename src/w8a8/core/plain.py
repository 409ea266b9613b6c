"""Values as JSON has them: where records, the command and a saved result leave Python."""

import dataclasses
import enum
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

from w8a8.core.scheme import PerChannel, PerColumn, PerGroup, PerTensor, PerToken

Json: TypeAlias = Mapping[str, Any]
"""An object as JSON has it, read to any depth."""


def plain(value: Any) -> Any:
    """Dataclasses, enums and paths as JSON values; NaN, which JSON has not, as null."""
    if isinstance(value, PerTensor | PerChannel | PerColumn | PerToken | PerGroup):
        return str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
