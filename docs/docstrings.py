"""How the API pages read our docstrings: a Griffe extension."""

from __future__ import annotations

import ast
import linecache
import re
from typing import Any

import griffe

NAMES = re.compile(r"\w+(, \w+)*")
DEFAULT = re.compile(r",? \(default: (?P<value>.*)\)$")
SHAPE = re.compile(r"(?<=\w), shape (?=\()")


class Docstrings(griffe.Extension):
    """Show attributes that a ``#:`` comment explains, and each default once."""

    def on_attribute_instance(
        self, *, node: ast.AST | griffe.ObjectNode, attr: griffe.Attribute, **_: Any
    ) -> None:
        """Take the ``#:`` comment above an attribute as its docstring."""
        lines: list[str] = []
        number = (attr.lineno or 1) - 1
        while (line := linecache.getline(str(attr.filepath), number).strip()).startswith("#:"):
            lines.insert(0, line.removeprefix("#:").strip())
            number -= 1
        if lines and attr.docstring is None:
            attr.docstring = griffe.Docstring(" ".join(lines), parent=attr, lineno=number + 1)

    def on_object(self, *, obj: griffe.Object, loader: griffe.GriffeLoader, **_: Any) -> None:
        """Take types and defaults from the docstring where it names them, else the signature."""
        if obj.docstring is None or not isinstance(obj, griffe.Class | griffe.Function):
            return
        signature = obj.parameters
        # "ndarray, shape (n,)" would be read as a tuple of Python expressions.
        obj.docstring.value = SHAPE.sub(" of shape ", obj.docstring.value)
        obj.docstring.parser = obj.docstring.parser or griffe.Parser.numpy
        untyped = {name for line in obj.docstring.lines if NAMES.fullmatch(line)
                   for name in line.split(", ")}  # fmt: skip
        for section in obj.docstring.parsed:
            if section.kind is not griffe.DocstringSectionKind.parameters:
                continue
            for parameter in section.value:
                own = next((p for p in signature if p.name == parameter.name), None)
                parameter.default = str(own.default) if own and own.default is not None else None
                if own and parameter.name in untyped:
                    parameter.annotation = own.annotation
                if found := DEFAULT.search(str(parameter.annotation or "")):
                    parameter.annotation = DEFAULT.sub("", str(parameter.annotation))
                    parameter.default = found["value"]
