"""`python -m tests.golden write` records today's values, `check` compares with them; `--only PART` for a part."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.golden import data, evaluation, sampling, texts, training
from tests.golden.compare import Result, compare, dump, flatten
from tests.golden.machine import fingerprint
from tests.golden.workshop import ROOT, CommandError, Workshop

VALUES = Path(__file__).with_name("values.json")
PARTS: dict[str, Callable[[Workshop], dict[str, Any]]] = {
    "help": texts.helps,
    "schemas": texts.schemas,
    "sweeps": texts.sweeps,
    "plans": texts.plans,
    "jobs": texts.jobs,
    "refusals": texts.refusals,
    "data": data.values,
    "train": training.values,
    "exported": sampling.exported,
    "samples": sampling.values,
    "pictures": sampling.pictures,
    "evaluation": evaluation.values,
}


def main(arguments: list[str] | None = None) -> int:
    """0: written, or equal; 1: something differs or fails."""
    parser = argparse.ArgumentParser(prog="python -m tests.golden", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (("write", "record the values of this checkout"), ("check", "compare this checkout with them")):
        command = commands.add_parser(name, help=text)
        command.add_argument("--only", choices=PARTS, action="append", help="this part; repeatable")
        command.add_argument("--values", "--out", type=Path, default=VALUES, help="default: values.json beside this")
    args = parser.parse_args(arguments)
    parts = args.only or list(PARTS)
    kept = json.loads(args.values.read_text()) if args.values.exists() else {"machine": None, "values": {}}
    here = fingerprint()
    if args.command == "check":
        if not kept["values"]:
            parser.error(f"{args.values}: holds no values; make them by `write`")
        found, failed = make(parts)
        result = compare({part: kept["values"].get(part, {}) for part in found}, found, here == kept["machine"])
        print("\n".join([*failed, report(result, kept, here)]))
        return 1 if result.different or failed else 0
    if args.only and kept["machine"] not in (None, here):
        parser.error(f"{args.values}: was made on another machine; write all parts")
    found, failed = make(parts)
    if failed:
        print("\n".join([*failed, "nothing written"]))
        return 1
    values = (kept["values"] if args.only else {}) | found
    args.values.write_text(dump({"commit": product_commit(), "machine": here, "values": values}))
    print(f"{args.values}: {len(flatten(values)):,} values written")
    return 0


def make(parts: list[str]) -> tuple[dict[str, Any], list[str]]:
    """The values of these parts, made anew in a folder that is removed; and a message for each part that failed."""
    out, failed = {}, []
    with tempfile.TemporaryDirectory(prefix="golden-") as folder:
        shop = Workshop(Path(folder))
        for part in parts:
            begun = time.monotonic()
            try:
                out[part] = PARTS[part](shop)
            except (
                CommandError,
                LookupError,
                OSError,
                ValueError,
            ) as error:  # what the product says or leaves is not as it was
                failed.append(f"{part}: FAILED, {type(error).__name__}: {error}")
            print(f"{part}: {time.monotonic() - begun:.0f} s", file=sys.stderr, flush=True)
    return out, failed


def report(result: Result, kept: dict[str, Any], here: dict[str, str]) -> str:
    """For people: what was compared, what differs, what could not be compared."""
    lines = [str(difference) for difference in result.different]
    counts: dict[str, int] = {}
    for key in result.same:
        counts[key.split("/")[0]] = counts.get(key.split("/")[0], 0) + 1
    lines += [f"{part}: {count:,} equal" for part, count in counts.items()]
    if result.skipped:
        lines += not_compared(result.skipped, kept["machine"], here)
    total = f"{len(result.same):,} values equal"
    lines.append(f"{len(result.different):,} values differ, {total}" if result.different else total)
    return "\n".join(lines)


def not_compared(skipped: list[str], there: dict[str, str], here: dict[str, str]) -> list[str]:
    """What was left out on this machine, why, and how to compare it all the same."""
    parts = ", ".join(sorted({key.split("/")[0] for key in skipped}))
    written = _git("log", "-1", "--format=%h", "--", "tests/golden/values.json") or "COMMIT-OF-VALUES.JSON"
    return [
        f"NOT COMPARED BIT BY BIT: {len(skipped):,} values of {parts}; losses and gradient norms within a tolerance only",
        *(f"  {key} is {here[key]}, was {there.get(key)}" for key in here if here[key] != there.get(key)),
        "To compare them, make the values of the former code on this machine:",
        f"  git worktree add ../golden-before {written}",
        f"  (cd ../golden-before && {sys.executable} -m tests.golden write --out ../golden-before.json)",
        f"  {sys.executable} -m tests.golden check --values ../golden-before.json",
    ]


def product_commit() -> str:
    """The last commit of this checkout that changed the product."""
    return (
        _git("log", "-1", "--format=%H", "--", "warm_dist", "data_pipelines", "launch", "configs", "k8s") or "unknown"
    )


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)
    return done.stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
