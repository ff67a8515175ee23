"""Config keys as dataclass fields: how they are declared, read from flat keys, and checked."""

from __future__ import annotations

import difflib
import math
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import Field, field, fields, is_dataclass
from importlib import import_module
from typing import Any, Literal, TypeVar, get_type_hints

Scalar = bool | int | float | str
N = TypeVar("N", int, float)


class ConfigError(ValueError):
    """The run config cannot be used; the message lists every problem."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        super().__init__("invalid run config:\n" + "\n".join(f"  - {p}" for p in problems))


def option(
    default: Scalar,
    help: str,
    *,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    choices: tuple[str, ...] = (),
    each: type[int] | type[float] | None = None,
    named_in: str = "",
    or_number: bool = False,
    on_resume: Literal["fatal", "warn", "ignore"] = "warn",
) -> Any:
    """Declare a config key: its default, its help and what values it may take.

    ``named_in``, as in ``package.module:REGISTRY``, holds the names that the value may be; the
    tables of keys list them. The value of a key with ``each`` is a text of comma-separated
    numbers, each within the limits; one with ``or_number`` may be given as a number, and is a text
    all the same. ``on_resume`` says what it means that a resumed run has
    another value: a checkpoint's numbers depend on it, it is worth a warning, or it is nobody's
    business.
    """
    rules: dict[str, Any] = {
        "help": help,
        "low": low,
        "high": high,
        "above": above,
        "choices": choices,
    }
    rules |= {"each": each, "named_in": named_in, "on_resume": on_resume, "or_number": or_number}
    return field(default=default, metadata=rules)


def options(cls: type, prefix: str = "") -> Iterator[tuple[str, Field[Any]]]:
    """Yield every key of a config class with the field that declares it."""
    types = get_type_hints(cls)
    for f in fields(cls):
        if is_dataclass(types[f.name]):
            yield from options(types[f.name], f"{prefix}{f.name}.")
        else:
            yield prefix + f.name.replace("_", "-"), f


def help_of(f: Field[Any]) -> str:
    """Return the help of a key, with the names in its registry."""
    text: str = f.metadata["help"]
    module, _, registry = f.metadata["named_in"].partition(":")
    return f"{text}: {', '.join(getattr(import_module(module), registry))}" if module else text


def values_of(config: Any, prefix: str = "") -> Iterator[tuple[str, Scalar]]:
    """Yield every key of a config with its value."""
    for f in fields(config):
        value = getattr(config, f.name)
        if is_dataclass(value):
            yield from values_of(value, f"{prefix}{f.name}.")
        else:
            yield prefix + f.name.replace("_", "-"), value


def build(cls: type, flat: Mapping[str, Scalar], prefix: str, problems: list[str]) -> Any:
    """Return a config from flat keys; what is wrong with their values goes to ``problems``."""
    types = get_type_hints(cls)
    values: dict[str, Any] = {}
    for f in fields(cls):
        if is_dataclass(types[f.name]):
            values[f.name] = build(types[f.name], flat, f"{prefix}{f.name}.", problems)  # type: ignore[arg-type]
            continue
        key = prefix + f.name.replace("_", "-")
        if key in flat:
            value, problem = _check(key, flat[key], types[f.name], f.metadata)
            if problem:
                problems.append(problem)
            else:
                values[f.name] = value
    return cls(**values)


def _check(
    key: str, value: Scalar, kind: type, rules: Mapping[str, Any]
) -> tuple[Scalar, str | None]:
    """Return the value in its declared type, or what is wrong with it."""
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if rules["or_number"] and isinstance(value, int | float) and not isinstance(value, bool):
        value = f"{value:.12g}"
    if type(value) is not kind:
        return value, f"{key}: expected {kind.__name__}, got {value!r}"
    if isinstance(value, int) and abs(value) >= 2**63:  # what travels and seeds have 64 bits
        return value, f"{key}: must be below 2^63, got {value!r}"
    if isinstance(value, float) and not math.isfinite(value):
        return value, f"{key}: must be finite, got {value!r}"
    if rules["choices"] and value not in rules["choices"]:
        close = difflib.get_close_matches(str(value), rules["choices"], n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        return value, f"{key}: expected one of {', '.join(rules['choices'])}; got {value!r}{hint}"
    if not isinstance(value, str):
        limit = _beyond(value, rules)
        return value, f"{key}: must be {limit}, got {value!r}" if limit else None
    if rules["each"]:
        try:
            fits = not any(_beyond(x, rules) for x in each_of(value, rules["each"]))
        except ValueError:
            fits = False
        if not fits:
            whole = "whole " if rules["each"] is int else ""
            return value, (
                f"{key}: expected comma-separated {whole}numbers {_limits(rules)}, got {value!r}"
            )
    return value, None


def _beyond(value: float, rules: Mapping[str, Any]) -> str:
    """Return which limit a number is beyond; empty: none."""
    if rules["low"] is not None and not value >= rules["low"]:
        return f"at least {rules['low']}"
    if rules["above"] is not None and not value > rules["above"]:
        return f"above {rules['above']}"
    if rules["high"] is not None and not value <= rules["high"]:
        return f"at most {rules['high']}"
    return ""


def _limits(rules: Mapping[str, Any]) -> str:
    words = {"low": "of at least", "above": "above", "high": "up to"}
    return " and ".join(f"{word} {rules[k]}" for k, word in words.items() if rules[k] is not None)


def each_of(text: str, kind: Callable[[str], N]) -> list[N]:
    """Return the numbers of a comma-separated text; none of an empty one."""
    return [kind(part) for part in text.split(",")] if text.strip() else []


def key_values(text: str) -> Iterator[tuple[str, Scalar]]:
    """Read "a=1, b=0.5, c=word" with TOML's scalars; a word needs no quotes."""
    seen: set[str] = set()
    for part in filter(None, (p.strip() for p in text.split(","))):
        key, equals, value = (x.strip() for x in part.partition("="))
        if not (key and equals and value):
            raise ValueError(f"expected key=value, got {part!r}")
        if key in seen:
            raise ValueError(f"{key} is given twice; leave one of them")
        seen.add(key)
        try:
            yield key, tomllib.loads(f"x = {value}")["x"]
        except tomllib.TOMLDecodeError:
            yield key, value


def typed_value(text: str, default: Scalar | None) -> Scalar:
    """Read a value as TOML does, but take a text where one is meant without its quotes."""
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
    if isinstance(value, str) or (isinstance(value, Scalar) and not isinstance(default, str)):
        return value
    return text


def pair(text: str) -> tuple[str, str]:
    """Read "key=value" of a command line; a ValueError says what it is not."""
    key, equals, value = text.partition("=")
    if not (key and equals):
        raise ValueError(f"expected key=value, got {text!r}")
    return key.strip(), value.strip()


def unknown_key(key: str, known: list[str]) -> str:
    """Return the complaint about a key that does not exist, with the nearest that does."""
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    if not close:  # the right name in the wrong section
        close = [k for k in known if k.split(".")[-1] == key.split(".")[-1]][:1]
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"{key}: unknown key{hint}"
