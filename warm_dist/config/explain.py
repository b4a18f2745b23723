"""What is wrong with a config, in words: the key, what it needs, what it got, and where that was said."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from pydantic import ValidationError

SYNONYMS = {"learning_rate": "train.lr", "epochs": "train.total_nimg", "num_epochs": "train.total_nimg", "steps": "train.total_nimg",
            "max_steps": "train.total_nimg", "batch": "train.batch_size", "batchsize": "train.batch_size", "bs": "train.batch_size",
            "grad_clip": "train.clip", "ema": "train.ema_half_life_nimg", "fp16": "parallel.precision", "bf16": "parallel.precision",
            "precision": "parallel.precision", "seed": "train.seed", "dataset": "data.manifest", "image_size": "data.resolution",
            "num_workers": "data.reader_threads", "workers": "data.reader_threads", "zero": "parallel.zero_stage",
            "stage": "parallel.zero_stage", "nfe": "sampler.num_steps", "outdir": "output", "output_dir": "output",
            "run_name": "tracking.run_name"}  # fmt: skip
"""What people call a key elsewhere."""
UNION_TAGS = {"constrained-float", "function-after[_squarable(), constrained-float]", "literal['measured']", "grid name", "grid list",
              "number", "power", "table", "uniform", "log_uniform", "cold"}  # fmt: skip
"""Names of union branches, which pydantic puts between the keys in the location of an error."""
_MOST_CHARACTERS = 80  # of a value
_WORDS: dict[str, str] = {
    "greater_than": "needs more than {gt}",
    "greater_than_equal": "needs {ge} or more",
    "less_than": "needs less than {lt}",
    "less_than_equal": "needs {le} or less",
    "literal_error": "needs {expected}",
    "too_short": "needs a list of {min_length} or more",
    "too_long": "needs a list of {max_length}",
    "string_type": "needs a text",
    "string_too_short": "needs a text that is not empty",
    "bool_type": "needs true or false",
    "finite_number": "needs a finite number",
}
_PATTERNS = {
    "^[0-9a-f]{64}$": "needs a sha256, 64 hex digits",
    "^[0-9a-f]{32}$": "needs an id of 32 hex digits",
}
_KINDS = (
    (("int_",), "needs a whole number"),
    (("float_",), "needs a number"),
    (("tuple_", "list_"), "needs a list"),
    (("dict_", "model_", "dataclass_"), "needs an object, a section of keys"),
)


def explain(
    error: ValidationError, keys: Sequence[str], origin: Callable[[str, str], str], clean: Callable[[Any], Any]
) -> str:
    """One line for each mistake.

    keys: all known ones, by dotted path. origin: (path, what is wrong) → where that was given. clean: takes secrets out of
    a value.
    """
    items = [(_path(item), {**item, "input": clean(item["input"])}) for item in error.errors()]
    paths = [path for path, _ in items]
    # a list whose entries are wrong is also "too short" to pydantic, and a union's other branches did not fit either
    items = [
        (path, item)
        for path, item in items
        if not (item["type"] in ("too_short", "missing") and any(other.startswith(f"{path}.") for other in paths))
    ]
    lines: dict[str, list[str]] = {}
    for path, item in items:
        lines.setdefault(path, []).append(_needs(path, item, keys))
    out = []
    for path, needs in lines.items():
        item = next(item for other, item in items if other == path)
        where = origin(path, needs[0])
        named = "" if not path or f"{where}.".startswith(f"--set {path}.") else path
        out.append(f"{where}: {_line(named, list(dict.fromkeys(needs)), item)}")
    return "\n  ".join(dict.fromkeys(out))


def _path(item: Any) -> str:
    return ".".join(str(part) for part in item["loc"] if part not in UNION_TAGS)


def _line(path: str, needs: list[str], item: dict[str, Any]) -> str:
    text = needs[0] + "".join(f", or {other.removeprefix('needs ')}" for other in needs[1:])
    if item["type"] in ("extra_forbidden", "missing"):
        return text
    got = "" if isinstance(item["input"], dict) and item["type"] == "value_error" else f", got {shown(item['input'])}"
    if item["type"] == "string_type" and isinstance(item["input"], int | float):
        got += f"; a text of digits is written '\"{item['input']}\"'"
    return f"{path!r}: {text}{got}" if path else text + got


def _needs(path: str, item: dict[str, Any], keys: Sequence[str]) -> str:
    kind, context = item["type"], item.get("ctx", {})
    if kind == "extra_forbidden":
        near = suggestion(path, keys)
        return f"unknown key {path!r}" + (f"; did you mean {near!r}?" if near else "")
    if kind == "missing" and isinstance(item["loc"][-1], int):
        return "needs this entry of the list too"
    if kind == "missing":
        return f"missing key {path!r}"
    if kind == "union_tag_invalid":
        return f"needs a number, or an object whose kind is {context['expected_tags']}"
    if kind == "string_pattern_mismatch":
        return _PATTERNS.get(context["pattern"], f"needs a text of the form {context['pattern']}")
    if kind in _WORDS:
        whole = {k: int(v) if isinstance(v, float) and v.is_integer() else v for k, v in context.items()}
        return _WORDS[kind].format(**whole)
    for beginnings, words in _KINDS:
        if kind.startswith(beginnings):
            return words
    return str(item["msg"]).removeprefix("Value error, ")


def suggestion(path: str, keys: Sequence[str]) -> str | None:
    """The known key that somebody may have meant by an unknown one, or None."""
    leaf = path.rpartition(".")[2].lower()
    by_leaf = {key.rpartition(".")[2]: key for key in reversed(keys)}
    known = {**SYNONYMS, **by_leaf}
    near = [key for key in keys if key.lower() == path.lower()]
    near += [known[leaf]] if known.get(leaf) in keys else []
    near += difflib.get_close_matches(path, keys, 1, 0.75)
    near += [by_leaf[name] for name in difflib.get_close_matches(leaf, [*by_leaf], 1, 0.75)]
    return next((key for key in near if key != path), None)


def shown(value: Any) -> str:
    """A value as in JSON, of bounded length."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        text = repr(value)
    text = re.sub(r"(\d{30})\d+", r"\1…", text)
    return text if len(text) <= _MOST_CHARACTERS else f"{text[:_MOST_CHARACTERS]}…"
