"""The one exception users see: a sentence with the place and the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

Settings = TypeVar("Settings", bound=BaseModel)


class M3Error(ValueError):
    """Bad input (recipe, file, checkpoint, sample): the message is one sentence that names place and remedy."""


class Unlabelled(M3Error):
    """The data have no label that a task asks for; not a mistake where the task comes with a recipe for any data."""


@contextmanager
def within(path: str) -> Iterator[None]:
    """Put a key path in front of a mistake found inside: `masking.visibel: ...` becomes `objectives.x.masking.visibel`.

    Args:
        path: of the settings that are read inside.
    """
    try:
        yield
    except M3Error as error:
        begins_with_key = " " not in str(error).partition(":")[0]
        raise M3Error(f"{path}{'.' if begins_with_key else ': '}{error}") from error


def nearest(name: str, options: Iterable[str]) -> str:
    """Return ' Did you mean `x`?' for the closest of `options`, or the list of them when none is close."""
    options = sorted(options)
    close = difflib.get_close_matches(name, options, n=1, cutoff=0.5)
    if close:
        return f" Did you mean `{close[0]}`?"
    return f" Valid: {', '.join(f'`{option}`' for option in options)}." if options else ""


def read_settings(model: type[Settings], settings: dict[str, Any], where: str) -> Settings:
    """Fill a settings model from a part of a recipe; raise pydantic's first complaint as a sentence.

    Args:
        model: what the settings must fit.
        settings: key -> value.
        where: their key path, put in front.
    """
    try:
        return model(**settings)
    except ValidationError as error:
        raise explain(error, model, where) from error


def explain(error: ValidationError, model: type[BaseModel], where: str) -> M3Error:
    """Turn pydantic's first complaint into a sentence with the key path and the nearest valid name.

    Args:
        error: what pydantic raised.
        model: the settings model that was read, for the valid names.
        where: file and key path of the model, put in front.
    """
    first = error.errors(include_url=False)[0]
    path = ".".join([where, *(str(key) for key in first["loc"] if not _is_branch(str(key)))]).strip(".")
    if first["type"] == "extra_forbidden":
        return M3Error(f"{path}: unknown key.{nearest(str(first['loc'][-1]), _fields(model, first['loc'][:-1]))}")
    if first["type"] == "missing":
        return M3Error(f"{path}: this key is required; add it.")
    message = first["msg"].removeprefix("Value error, ")
    given = "" if isinstance(first["input"], dict) else f", got {first['input']!r}"
    return M3Error(f"{path}: {message[0].lower()}{message[1:]}{given}.")


def _fields(model: type[BaseModel], path: tuple[int | str, ...]) -> list[str]:
    """Return the field names of the settings model nested at `path`, as far as the annotations tell."""
    for key in path:
        field = model.model_fields.get(str(key))
        if field is None:
            continue
        inner = [field.annotation, *getattr(field.annotation, "__args__", ())]
        model = next((x for x in inner if isinstance(x, type) and issubclass(x, BaseModel)), model)
    return list(model.model_fields)


def _is_branch(key: str) -> bool:
    """Return True for the parts of pydantic's path that name a branch of a union, not a key."""
    return "[" in key or key in {"int", "float", "str", "bool", "constrained-int", "constrained-float"}
