"""The fields of a request, each checked when it is read: what is wrong is a `RefusedError` that names the field.

A field that is absent or null is None, whatever it should be.  JSON has no integers and Python's booleans are some, so
`2.0` is an integer here and `true` is none.
"""

import json
import math
from collections.abc import Collection, Mapping, Sequence
from http import HTTPStatus
from typing import TypeAlias

from w8a8.errors import few
from w8a8.serving.mistakes import RefusedError

Body: TypeAlias = Mapping[str, object]

SHOWN = 60
"""Characters of a wrong value that are shown."""


def parsed(raw: bytes, content_type: str | None) -> Body:
    """The object that a body holds.

    Args:
        content_type: What the client says that it is; None where it says nothing.

    Raises:
        RefusedError: it is something else than JSON, or no object.
    """
    kind = "application/json" if content_type is None else content_type.partition(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        raise RefusedError(
            f"the body is said to be {kind or 'nothing'!r}, and a request is JSON: send the header "
            "Content-Type: application/json",
            status=HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
        )
    if not raw.strip():
        raise RefusedError("the body is empty; send a JSON object")
    try:
        found = json.loads(raw)
    except (ValueError, RecursionError) as error:  # what is no UTF-8 too
        raise RefusedError(f"the body is not JSON: {error}", code="invalid_json") from error
    if not isinstance(found, dict):
        raise RefusedError(f"the body is JSON, but {shown(found)}; send an object")
    return found


def shown(value: object) -> str:
    """A wrong value, short, and what it is."""
    words = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    told = json.dumps(value, default=str)
    told = told if len(told) <= SHOWN else told[:SHOWN] + "..."
    return f"{words.get(type(value), 'a number')}: {told}"


def wrong(name: str, value: object, expected: str) -> RefusedError:
    """What to raise over a field."""
    return RefusedError(f"{name} is {shown(value)}; expected {expected}", param=name)


def number(body: Body, name: str, *, low: float = -math.inf, high: float = math.inf) -> float | None:
    """A finite number within bounds, both of which it may be."""
    value = body.get(name)
    if value is None:
        return None
    span = f"a number from {low:g} to {high:g}" if math.isfinite(high) else f"a number of at least {low:g}"
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:  # NaN too
        raise wrong(name, value, span)
    return float(value)


def integer(body: Body, name: str, *, low: int = 0, high: int = 2**63 - 1) -> int | None:
    """A whole number within bounds, both of which it may be."""
    value = body.get(name)
    if value is None:
        return None
    whole = not isinstance(value, float) or value.is_integer()
    if isinstance(value, bool) or not isinstance(value, int | float) or not whole or not low <= value <= high:
        span = f"of at least {low}" if high >= 2**63 - 1 else f"from {low} to {high}"
        raise wrong(name, value, f"a whole number {span}")
    return int(value)


def flag(body: Body, name: str) -> bool | None:
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise wrong(name, value, "true or false")
    return value


def one_of(body: Body, name: str, known: Collection[str]) -> str | None:
    value = body.get(name)
    if value is not None and (not isinstance(value, str) or value not in known):
        raise wrong(name, value, f"one of {', '.join(known)}")
    return value


def text(body: Body, name: str) -> str | None:
    """A text that can be written as UTF-8, which half a pair of surrogates cannot."""
    value = body.get(name)
    return None if value is None else readable(value, name)


def readable(value: object, name: str) -> str:
    """A value that is to be a text."""
    if not isinstance(value, str):
        raise wrong(name, value, "a text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RefusedError(
            f"{name} holds half a pair of surrogates, which is no character: {error}", param=name
        ) from error
    return value


def texts(value: object, name: str, *, most: int) -> list[str]:
    """A list of texts, at least one."""
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise wrong(name, value, "a list of texts, at least one")
    if len(value) > most:
        raise RefusedError(
            f"{name} has {len(value)} entries; at most {most} are taken, send several requests", param=name
        )
    return [readable(entry, f"{name}[{place}]") for place, entry in enumerate(value)]


def only(body: Body, known: Collection[str], models: Sequence[str]) -> None:
    """Refuse fields that nothing here reads, since what is ignored would be believed, and another model than these."""
    unknown = [name for name in body if name not in known]
    if unknown:
        raise RefusedError(
            f"the body has {few(map(str, unknown))}, which is not known here; known are {', '.join(sorted(known))}",
            param=str(unknown[0]),
        )
    asked = text(body, "model")
    if asked is not None and asked not in models:
        raise RefusedError(
            f"the model {asked[:SHOWN]!r} is not served here; served is {models[0]!r}",
            param="model",
            status=HTTPStatus.NOT_FOUND,
            code="model_not_found",
        )
