"""The YAML dialect of configuration files, and how one tree of settings is laid over another.

YAML 1.2's plain values: `true` and `false` are the only booleans (`no` and `off` are text), 3e-4 is a number, 12:30 and
2024-01-01 are text. A key that stands twice in a section is refused.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from megafish.errors import InputError

Tree = dict[str, Any]

_NUMBERS = {
    "tag:yaml.org,2002:int": re.compile(r"^[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F]+)$"),
    "tag:yaml.org,2002:float": re.compile(
        r"^(?:[-+]?(?:[0-9][0-9_]*(?:\.[0-9_]*)?(?:[eE][-+]?[0-9]+)?|\.[0-9]+(?:[eE][-+]?[0-9]+)?|\.(?:inf|Inf|INF))"
        r"|\.(?:nan|NaN|NAN))$"
    ),
}
_BOOLEAN = re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$")


class _Loader(yaml.SafeLoader):
    """Safe YAML with the plain values of the module's docstring."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"key {key.value!r} stands twice in one section", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


_REPLACED = {*_NUMBERS, "tag:yaml.org,2002:bool", "tag:yaml.org,2002:timestamp"}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _REPLACED]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", _BOOLEAN, list("tTfF"))
for _tag, _pattern in _NUMBERS.items():
    _Loader.add_implicit_resolver(_tag, _pattern, list("-+.0123456789"))


class _Dumper(yaml.SafeDumper):
    """Quotes what this dialect or YAML 1.1 would read as something else than text."""


_Dumper.yaml_implicit_resolvers = {k: list(v) for k, v in yaml.SafeDumper.yaml_implicit_resolvers.items()}
for _tag, _pattern in _NUMBERS.items():
    _Dumper.add_implicit_resolver(_tag, _pattern, list("-+.0123456789"))


def dump_yaml(value: Any, *, flow: bool = False) -> str:
    """A value as YAML text that `parse_yaml` reads back equal. `flow`: on one line."""
    text: str = yaml.dump(
        value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=flow, width=float("inf")
    )
    return text.removesuffix("...\n").rstrip("\n") if flow else text


def parse_yaml(text: str) -> Any:
    """A value from YAML text. Raises yaml.YAMLError."""
    try:
        return yaml.load(text, Loader=_Loader)
    except (ValueError, RecursionError) as error:
        raise yaml.YAMLError(str(error)) from None


def read_tree(path: Path) -> Tree:
    """The settings in a file. InputError with the line when it is no YAML mapping in UTF-8."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start}): save it as UTF-8") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        tree = parse_yaml(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise InputError(f"{path}: {line}not valid YAML: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if tree is None:
        raise InputError(f"{path}: empty: a configuration has sections such as model: and train:")
    if not isinstance(tree, dict):
        raise InputError(f"{path}: expected sections (key: value) at the top level, found a {type(tree).__name__}")
    return tree


def parse_overrides(overrides: list[str] | tuple[str, ...], text_keys: frozenset[str]) -> Tree:
    """One tree from ``section.key=value`` strings; of two for one key the later one counts.

    Values are YAML, except those of `text_keys`, which are taken as they are unless quoted (name=007).
    """
    tree: Tree = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        parts = key.split(".")
        if not equals or not all(parts):
            raise InputError(f"{override!r} is not of the form section.key=value (e.g. optimizer.lr=3e-4)")
        if any(part.isdigit() for part in parts[1:]):
            raise InputError(f"{override!r}: entries of a list are not set one by one: give the whole list, key=[...]")
        if key in text_keys and text and text not in ("null", "~") and text[0] not in "'\"":
            value: Any = text
        else:
            value = _parse_value(override, text)
        for part in reversed(parts):
            value = {part: value}
        tree = overlay(tree, value)
    return tree


def _parse_value(override: str, text: str) -> Any:
    try:
        return parse_yaml(text)
    except yaml.YAMLError:
        raise InputError(f"{override!r}: not a valid YAML value: quote text with : [ ] {{ }} or #") from None


def overlay(below: Tree, above: Tree) -> Tree:
    """`above` on top of `below`: sections are joined key by key, everything else is replaced."""
    joined = dict(below)
    for key, value in above.items():
        under = joined.get(key)
        joined[key] = overlay(under, value) if isinstance(under, dict) and isinstance(value, dict) else value
    return joined
