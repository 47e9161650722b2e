"""Makes Markdown of docstrings that were written for readers of the sources, before griffe parses them."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Module, Object

STAR = re.compile(r"\(\*(?=batch|event_shape)")  # of a shape, (*batch, D): no emphasis begins there


class Docstrings(Extension):
    """Names the section of examples as griffe knows it, and escapes the stars of shapes."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring is None:
            return
        text = obj.docstring.value.replace("\nExample:\n", "\nExamples:\n")
        if not isinstance(obj, Module):  # whose formulas are blocks of code
            lines = [line if "`" in line else STAR.sub(r"(\\*", line) for line in text.split("\n")]
            text = "\n".join(lines)
        obj.docstring.value = text
