"""What pydantic found wrong with a configuration, in the words of the person who wrote it."""

from __future__ import annotations

import difflib
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from megafish.config_yaml import dump_yaml

NO_NUMBER = "a boolean"
"""What config_sections.py says of true and false in the place of a number: the words for the field say more."""
_SECTION_ERRORS = ("model_type", "model_attributes_type")


class _Place(NamedTuple):
    """Where a fault is: its dotted key, the field (None for an unknown key), the section around it."""

    key: str
    field: FieldInfo | None
    section: type[BaseModel] | None


def explain(error: ValidationError, root: type[BaseModel]) -> str:
    """Every fault in one phrase (field, value, what is allowed), joined by semicolons.

    Unions are reported by pydantic once for every member; here once for the field.
    """
    phrases: dict[str, str] = {}
    for fault in error.errors():
        place = _locate(fault["loc"] if fault["type"] != "invalid_key" else tuple(map(str, fault["loc"])), root)
        phrases.setdefault(place.key, _phrase(fault, place, root))
    return "; ".join(phrases.values())


def field_help(root: type[BaseModel]) -> dict[str, FieldInfo]:
    """Every dotted key below `root` with its field, in the order of declaration."""
    found: dict[str, FieldInfo] = {}

    def walk(section: type[BaseModel], prefix: str) -> None:
        for name, field in section.model_fields.items():
            found[prefix + name] = field
            if inner := section_in(field.annotation):
                walk(inner, f"{prefix}{name}.")

    walk(root, "")
    return found


def allowed(annotation: Any, limits: list[Any] | None = None) -> str:
    """What a type takes, in words: `a whole number, at least 2, or null`."""
    origin = get_origin(annotation)
    if origin is Annotated:
        base, *extra = get_args(annotation)
        return allowed(base, [m for item in extra for m in (item.metadata if isinstance(item, FieldInfo) else [item])])
    if origin in (Union, UnionType):
        return ", or ".join(allowed(member, limits) for member in get_args(annotation))
    if origin is Literal:
        return " or ".join(str(choice) for choice in get_args(annotation))
    if origin is tuple:
        return f"a list of {len(get_args(annotation))}, each {allowed(get_args(annotation)[0])}"
    if origin is list:
        inner = get_args(annotation)[0]
        entries = "a list of sections" if section_in(inner) else f"a list, each entry {allowed(inner)}"
        return ", ".join([entries, *_range(limits or [])])
    if annotation is NoneType:
        return "null"
    if annotation is bool:
        return "true or false"
    if origin is dict or section_in(annotation):
        return "a section (key: value)"
    name = {int: "a whole number", float: "a number", str: "text"}[annotation]
    return ", ".join([name, *_range(limits or [])])


def _range(limits: list[Any]) -> list[str]:
    words = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    found = [
        f"{text} {getattr(limit, name)}" for limit in limits for name, text in words.items() if hasattr(limit, name)
    ]
    found += ["not empty" for limit in limits if getattr(limit, "min_length", 0)]
    return found + ["of the form described" for limit in limits if getattr(limit, "pattern", None)]


def section_in(annotation: Any) -> type[BaseModel] | None:
    """The section that a field holds, alone, in a list or beside null."""
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
        if get_args(candidate) and candidate is not annotation and (inner := section_in(candidate)):
            return inner
    return None


def _locate(location: tuple[int | str, ...], root: type[BaseModel]) -> _Place:
    key, field, section = "", None, None
    inside: type[BaseModel] | None = root
    for part in location:
        if isinstance(part, int):
            key += f"[{part}]"
        elif inside is None:
            continue  # pydantic names the member of a union here
        else:
            key += f".{part}" if key else part
            section, field = inside, inside.model_fields.get(part)
            inside = section_in(field.annotation) if field else None
    return _Place(key, field, section)


def _phrase(fault: Any, place: _Place, root: type[BaseModel]) -> str:
    if fault["type"] in ("extra_forbidden", "invalid_key"):
        return f"unknown key {place.key}{_nearest(place, root)}"
    help_text = (place.field.description or "").rstrip(".") if place.field else ""
    if fault["type"] == "missing" and isinstance(fault["loc"][-1], str):
        return f"{place.key} is not set ({help_text})"
    own_words = fault["msg"].removeprefix("Value error, ") if fault["type"] == "value_error" else ""
    if place.field is None:
        return own_words or fault["msg"]
    # A rule between the keys of a section speaks for itself; its value is the whole section.
    if own_words and (section_in(place.field.annotation) or isinstance(fault["input"], dict)):
        return f"{place.key}: {own_words}"
    if own_words and own_words != NO_NUMBER:
        return f"{place.key}={_shown(fault['input'])}: {own_words} ({help_text})"
    must = allowed(place.field.annotation, place.field.metadata)
    if fault["type"] in _SECTION_ERRORS:
        must = "a section (key: value)"
    if fault["type"] == "string_type" and not isinstance(fault["input"], (list, dict, type(None))):
        must += "; put quotes around it"
    return f"{place.key}={_shown(fault['input'])}: must be {must} ({help_text})"


def _shown(value: Any) -> str:
    """A value as it would stand in the file, not longer than a glance."""
    text = dump_yaml(value, flow=True)
    return text if len(text) <= 60 else text[:57] + "..."


def _nearest(place: _Place, root: type[BaseModel]) -> str:
    """A hint at the key that was meant: one that is spelt alike here, else one of that name elsewhere."""
    name = place.key.rpartition(".")[2]
    here = list(place.section.model_fields) if place.section else []
    if near := difflib.get_close_matches(name, here, n=1):
        return f": did you mean {place.key[: -len(name)]}{near[0]}?"
    by_name: dict[str, str] = {}
    for key in field_help(root):
        by_name.setdefault(key.rpartition(".")[2], key)
    if near := difflib.get_close_matches(name, by_name, n=1, cutoff=0.75):
        return f": did you mean {by_name[near[0]]}?"
    return f": known there are {', '.join(here)}"
