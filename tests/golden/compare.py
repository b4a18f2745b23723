"""Golden values as flat text: how they are kept, which may differ on another machine, and what differs."""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple

FLOATING = ("train", "exported", "samples", "pictures", "evaluation")
"""Parts that floating point decides; of the others only the manifests' statistics, and so their fingerprints."""
_STATISTICS = re.compile(r"data/([^/]+/(fingerprint|statistics.*)|what index, verify and info say)")
_EXACT = re.compile(
    r"train/(keys of metrics\.jsonl/.*|[^/]+/(files|config\.json|exit\.json))|samples/[^/]+/[^/]+/says/.*"
)
_CLOSE = re.compile(r"train/([^/]+)/(loss|grad_norm)/\d+")
TOLERANCE = {"loss": 1e-4, "grad_norm": 1e-3}
"""Relative. Between kernels for AVX-512, AVX2 and SSE 4.1 at most 2e-6 and 6e-5 were seen, after 250 steps."""
BF16_TOLERANCE = 1e-2
"""At most 2e-3 was seen, after 20 steps."""
Flat = dict[str, Any]


class Difference(NamedTuple):
    key: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.key}\n    was {self.old!r}\n    is  {self.new!r}"


class Result(NamedTuple):
    """same: compared and equal. different. skipped: not comparable on this machine."""

    same: list[str]
    different: list[Difference]
    skipped: list[str]


def flatten(tree: Any, prefix: str = "") -> Flat:
    """{"a": {"b": [1, 2]}} → {"a/b/0": 1, "a/b/1": 2}."""
    if not isinstance(tree, dict | list):
        return {prefix: tree}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    out: Flat = {}
    for key, value in items:
        out |= flatten(value, f"{prefix}/{key}" if prefix else str(key))
    return out


def compare(old: Any, new: Any, same_machine: bool) -> Result:
    """Two trees of values; on another machine than the old ones' only what does not hang on its arithmetic."""
    before, now = flatten(old), flatten(new)
    result = Result([], [], [])
    for key in [*before, *(key for key in now if key not in before)]:
        pair = before.get(key, "absent"), now.get(key, "absent")
        if not same_machine and _floats(key) and "absent" not in pair:
            close = _CLOSE.fullmatch(key)
            if close is None:
                result.skipped.append(key)
                continue
            bound = BF16_TOLERANCE if "bf16" in close[1] else TOLERANCE[close[2]]
            if abs(pair[1] - pair[0]) <= bound * abs(pair[0]):
                result.same.append(key)
                continue
        if pair[0] == pair[1]:
            result.same.append(key)
        else:
            result.different.append(Difference(key, *pair))
    return result


def _floats(key: str) -> bool:
    if _EXACT.fullmatch(key):
        return False
    return key.startswith(FLOATING) or _STATISTICS.fullmatch(key) is not None


def dump(tree: Any) -> str:
    """JSON with sorted keys; a list is one line."""
    text = json.dumps(tree, indent=1, sort_keys=True, ensure_ascii=False)
    return re.sub(r"\[[^\[\]{}]*\]", lambda found: re.sub(r"\n\s*", " ", found[0]), text) + "\n"
