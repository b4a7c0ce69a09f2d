"""A mistake in words: file, key, what was found, what is legal, the nearest legal name."""

import difflib
import re
import types
import typing
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

from mole.config.sections import Config, is_section, keys


def explain(detail: Any, origin: dict[str, str]) -> str:
    """One mistake as: file, key, what was found, what is legal, the nearest legal name."""
    parts = [str(part) for part in detail["loc"] if part not in ("float", "int", "str", "none")]
    key = ".".join(parts)
    source = next((origin[k] for k in _ancestors(parts) if k in origin), "configuration")
    if detail["type"] == "extra_forbidden":
        legal = sorted(_fields_at(parts[:-1]))
        near = difflib.get_close_matches(parts[-1], legal, 1)
        everywhere = [k for k in keys() if k.endswith(f".{parts[-1]}")]
        hint = f"; did you mean {'.'.join([*parts[:-1], near[0]])}?" if near else ""
        if not near and everywhere:
            hint = f"; did you mean {everywhere[0]}?"
        return f"{source}: {key}: unknown key; legal here: {', '.join(legal)}{hint}"
    if detail["type"] == "value_error":
        where = f"{key}: " if key else ""
        return f"{source}: {where}{detail['msg'].removeprefix('Value error, ')}"
    found, legal = detail["input"], _legal(parts) or detail["msg"]
    hint = ""
    if detail["type"] == "literal_error" and isinstance(found, str):
        near = difflib.get_close_matches(found, re.findall(r"'([^']*)'", str(detail["ctx"]["expected"])), 1)
        hint = f"; did you mean {near[0]}?" if near else ""
    if isinstance(found, float) and found.is_integer() and "a whole number" in legal:
        hint = f"; write {int(found)}, without a point or an exponent" if abs(found) < 1e18 else ""
    return f"{source}: {key}: found {show(found)}; legal: {legal}{hint}"


def show(value: Any) -> str:
    """A value and its type, in at most 60 characters or so."""
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"


def _ancestors(parts: list[str]) -> Iterator[str]:
    return (".".join(parts[:end]) for end in range(len(parts), 0, -1))


def _fields_at(parts: Sequence[str]) -> dict[str, Any]:
    model: Any = Config
    for part in parts:
        field = model.model_fields.get(part)
        if field is None or not is_section(field.annotation):
            return {}
        model = field.annotation
    return model.model_fields


def _legal(parts: list[str]) -> str:
    """What may stand at a key, read off its type: `a whole number of at least 1`."""
    names = [part for part in parts if not part.isdigit()]
    field = _fields_at(names[:-1]).get(names[-1]) if names else None
    if field is None:
        return ""
    if is_section(field.annotation):
        return f"a mapping with {', '.join(field.annotation.model_fields)}"
    return _describe(field.annotation, field.metadata)


def _describe(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    origin = typing.get_origin(annotation)
    if origin is Annotated:
        inner, *rest = typing.get_args(annotation)
        extra = [m for r in rest for m in (getattr(r, "metadata", None) or [r])]
        return _describe(inner, extra)
    if origin is Literal:
        return "one of " + ", ".join(str(value) for value in typing.get_args(annotation))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_describe(part, metadata) for part in typing.get_args(annotation))
    if origin is list:
        return "a list of, each, " + _describe(typing.get_args(annotation)[0])
    names = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", type(None): "null"}
    words = {"ge": "of at least", "gt": "above", "le": "up to", "lt": "below", "pattern": "matching"}
    limits = [f"{words[k]} {getattr(m, k)}" for m in metadata for k in words if getattr(m, k, None) is not None]
    return " ".join([names.get(annotation, str(annotation)), *([] if annotation is type(None) else limits)])
