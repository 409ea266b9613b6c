"""Docstrings as mkdocstrings wants them: an extension of griffe, named in mkdocs.yml."""

import re
from typing import Any

import griffe

_FIELD = re.compile(r"(\w+(?:, \w+)*): ")


class Docstrings(griffe.Extension):
    """What reads well in the source, made to read well on a page."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """A section that has one example is headed so; griffe knows the plural alone."""
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)

    def on_class(self, *, cls: griffe.Class, **_: Any) -> None:
        """Fields are told in lines of their own, `scheme: Of the new layers.`: these are a list of attributes."""
        if cls.docstring is not None:
            paragraphs = cls.docstring.value.split("\n\n")
            cls.docstring.value = "\n\n".join(_listed(paragraph, set(cls.members)) for paragraph in paragraphs)


def _listed(paragraph: str, fields: set[str]) -> str:
    """A paragraph that begins with a field, as a section of a docstring; another as it is."""
    if not _tells_a_field(paragraph, fields):
        return paragraph
    lines = [line if _tells_a_field(line, fields) else f"    {line}" for line in paragraph.split("\n")]
    return "\n".join(["Attributes:", *(f"    {line}" for line in lines)])


def _tells_a_field(line: str, fields: set[str]) -> bool:
    found = _FIELD.match(line)
    return found is not None and set(found[1].split(", ")) <= fields
