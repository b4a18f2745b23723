"""Reading, overriding and writing config files: every mistake is reported as one line with its dotted path."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from warm_dist.config.explain import explain
from warm_dist.errors import ConfigError, redact

Model = TypeVar("Model", bound=BaseModel)
MOST_DIGITS = 100
"""Of a number in JSON."""


def read_tree(path: str | Path) -> dict[str, Any]:
    """Read a JSON file that holds an object, without validating it. Raises ConfigError."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")  # Windows' editors begin with a mark
    except FileNotFoundError:
        raise ConfigError(f"{path}: does not exist; name a config file, such as configs/quickstart.json") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); name a config file") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is not UTF-8 text, so it is not JSON; name a config file") from None
    return parse_json(text, str(path))


def parse_json(text: str, name: str) -> dict[str, Any]:
    """Parse a JSON object. Raises ConfigError, also for duplicate keys and numbers that are not finite."""

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for key, value in items:
            if key in out:
                raise ConfigError(f"{name}: the key {key!r} appears twice in one object")
            out[key] = value
        return out

    try:
        tree = _loads(text, name, object_pairs_hook=pairs)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{name}: not JSON, line {error.lineno} column {error.colno}: {error.msg}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{name}: holds {'null' if tree is None else f'a {type(tree).__name__}'}, needs an object")
    return tree


def _loads(text: str, name: str, **hooks: Any) -> Any:
    """As json.loads, but numbers that overflow, NaN and what is nested too deeply are a ConfigError, at any depth."""

    def number(digits: str, kind: type[float] | type[int] = float) -> float:
        if len(digits) > MOST_DIGITS or not math.isfinite(value := kind(digits)):
            text = digits if len(digits) <= 30 else f"{digits[:30]}…"
            raise ConfigError(
                f"{name}: {text} is no number here; it must be finite and of {MOST_DIGITS} digits or fewer"
            )
        return value

    try:
        return json.loads(text, parse_constant=number, parse_float=number, parse_int=partial(number, kind=int), **hooks)
    except RecursionError:
        raise ConfigError(f"{name}: nested too deeply") from None


def validate_as(model: type[Model], tree: dict[str, Any], name: str, given: Mapping[str, str] | None = None) -> Model:
    """Validate a tree as a `model`, strictly. Raises ConfigError with one line per mistake.

    name: where the tree comes from, for messages. given: dotted paths that were changed → where, such as "--set train.lr".
    """
    given = given or {}

    def origin(path: str, text: str = "") -> str:
        exact = [key for key in given if f"{path}.".startswith(f"{key}.")]
        made = [key for key in given if text.startswith("unknown key") and key.startswith(f"{path}.")]
        if found := exact[:1] or made or [key for key in given if _is_about(text, path, key)]:
            return ", ".join(dict.fromkeys(given[key] for key in found))
        added = [key for key in given if "." in path and key.rpartition(".")[0] == path.rpartition(".")[0]]
        return f"{name} with {given[added[0]]}" if added and text.startswith("missing key") else name

    for path, value in flatten(tree).items():
        if re.search("[\ud800-\udfff]", json.dumps([path, value], ensure_ascii=False)):
            where = origin(path)
            named = "" if where == f"--set {path}" else f"{path!r}: "
            raise ConfigError(f"{where}: {named}needs Unicode text, got {value!a}")
    try:
        # through JSON: lists become tuples, all other types stay strict
        return model.model_validate_json(json.dumps(tree, allow_nan=False))
    except ValidationError as error:
        raise ConfigError(explain(error, known_keys(model), origin, redact)) from None
    except (ValueError, ConfigError) as error:
        raise ConfigError(f"{origin('', str(error))}: {error}") from None


def _is_about(text: str, section: str, key: str) -> bool:
    """Whether a rule of a whole section ("": the config) names this key of it."""
    inside = key.removeprefix(f"{section}.") if section else key
    return (not section or inside != key) and bool(re.search(rf"(?<!\w){re.escape(inside)}(?!\w)", text))


def known_keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    """All keys as dotted paths that begin with `prefix`, sections included."""
    out = []
    for name, field in model.model_fields.items():
        out.append(prefix + (field.alias or name))
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                out += known_keys(kind, f"{prefix}{name}.")
    return out


def override(tree: dict[str, Any], text: str) -> None:
    """Apply one `a.b=VALUE` to the tree. Raises ConfigError, see `parse_setting` and `assign`."""
    path, value = parse_setting(text)
    assign(tree, path, value, f"--set {text!r}")


def parse_setting(text: str) -> tuple[str, Any]:
    """Split `a.b=VALUE` into the path and the value, which is JSON or else text.

    Raises ConfigError for another form or a non-finite value.
    """
    path, separator, value_text = text.partition("=")
    if not separator or not all(path.split(".")):
        raise ConfigError(f"--set {text!r}: needs the form a.b=VALUE")
    try:
        return path, _loads(value_text, f"--set {path}")
    except json.JSONDecodeError:
        return path, value_text


def assign(tree: dict[str, Any], path: str, value: Any, origin: str) -> None:
    """Set the value at a dotted path, creating sections on the way.

    Raises ConfigError that begins with `origin` if the path leads through a value.
    """
    *parents, leaf = path.split(".")
    for key in parents:
        child = tree.setdefault(key, {})
        if child is None:
            child = tree[key] = {}
        if not isinstance(child, dict):
            raise ConfigError(f"{origin}: {key!r} is not a section")
        tree = child
    tree[leaf] = value


def dump(config: BaseModel) -> dict[str, Any]:
    """The config as a JSON tree, defaults included; validating it gives an equal config."""
    return config.model_dump(mode="json", by_alias=True)


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} → {"a.b": 1}, as in `--set` and MLflow's parameters."""
    out: dict[str, Any] = {}
    for key, value in tree.items():
        out |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return out
