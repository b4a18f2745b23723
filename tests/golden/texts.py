"""What commands print without computing: help, schemas, trials, plans, rendered jobs; and how they refuse."""

from __future__ import annotations

import json
import re
import shlex
from typing import Any

from tests.golden import data
from tests.golden.product import SCHEMAS
from tests.golden.training import BASE
from tests.golden.workshop import ROOT, Command, Workshop, sha

COMMANDS = [f"launch/{name}.py" for name in (
    "bench", "ema", "evaluate", "export", "k8s", "mirror", "node", "quickstart", "report", "sample", "spectrum", "sweep",
    "sweep_quickstart", "train", "trajectory", "ui")]  # fmt: skip
COMMANDS += [f"-m data_pipelines.{name}" for name in ("index", "info", "pack", "verify")]
COMMANDS += [f"launch/bench.py {name}" for name in ("data", "step", "gpu", "features", "sweep", "scaling")]
COMMANDS += ["launch/k8s.py render", "launch/k8s.py pack"]


def helps(shop: Workshop) -> dict[str, Any]:
    """Of each command the flags, and a hash of the whole text."""
    texts = shop.out(*([*command.split(), "--help"] for command in COMMANDS))
    return {
        command: {"flags": " ".join(sorted(set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", text)))), "text": sha(text)}
        for command, text in zip(COMMANDS, texts, strict=True)
    }


def schemas(shop: Workshop) -> dict[str, Any]:
    """Both JSON schemas as generated; `keys` is the same without the texts for people."""
    out = {}
    for name, command in SCHEMAS.items():
        (text,) = shop.out(["-m", *command])
        tree = json.loads(text)
        out[name] = {"text": sha(text), "keys": sha(json.dumps(_wordless(tree), sort_keys=True))}
        out[name]["as in configs"] = json.loads((ROOT / "configs" / f"{name}.json").read_text()) == tree
        out[name]["sections"] = " ".join(sorted(tree["$defs"]))
    return out


def _wordless(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _wordless(value) for key, value in tree.items() if key != "description" or isinstance(value, dict)}
    return [_wordless(value) for value in tree] if isinstance(tree, list) else tree


def sweeps(shop: Workshop) -> dict[str, Any]:
    """The trials of the shipped sweeps."""
    paths = sorted(path for path in (ROOT / "configs").glob("sweep_*.json") if path.name != "sweep_schema.json")
    commands = [["launch/sweep.py", "--dry-run", "--config", f"configs/{path.name}"] for path in paths]
    told = shop.out(*commands, cwd=ROOT)
    return {path.name: [line.strip() for line in text.splitlines()] for path, text in zip(paths, told, strict=True)}


def plans(shop: Workshop) -> dict[str, Any]:
    """What launch/train.py --dry-run says of the shipped configs."""
    names = [
        path.name for path in sorted((ROOT / "configs").glob("*.json")) if not path.name.startswith(("sweep", "schema"))
    ]
    commands = [["launch/train.py", "--dry-run", "--world-size", "2", "--config", f"configs/{name}"] for name in names]
    told = shop.out(*commands, cwd=ROOT)
    return {name: sha(shop.plain(text)) for name, text in zip(names, told, strict=True)}


def jobs(shop: Workshop) -> dict[str, Any]:
    """The commands of k8s/README.md, by the file that they write; and some of their variants."""
    text = "\n".join(re.findall(r"```sh\n(.*?)```", (ROOT / "k8s" / "README.md").read_text(), re.S))
    commands = {}
    for line in filter(None, map(str.strip, text.splitlines())):
        command, _, path = line.partition(" > ")
        commands[path] = shlex.split(command)[1:]
    train = commands["k8s/overlays/gpu/jobs/train.yaml"]
    image = ["--image", "registry.example.com/warm-dist:1"]
    commands["train, without Trainer"] = [*train, *image, "--jobset"]
    commands["train, of another size"] = [*train, *image, "--name", "other", "--cpus", "4", "--memory", "9"]
    told = shop.out(*commands.values(), cwd=ROOT)
    return {
        name: {"objects": re.findall(r"^kind: (.*)$", out, re.M), "text": sha(out)}
        for name, out in zip(commands, told, strict=True)
    }


REFUSED = {
    "misspelt key": ["--set=train.batchsize=8"],
    "value of another type": ["--set=train.lr=fast"],
    "no such manifest": ["--set=data.manifest=none/manifest.parquet"],
    "another resolution": ["--set=data.resolution=16", "--set=network.attention_resolutions=[8]"],
    "unwritable output": ["--set=output=/proc/run"],
    "offload without shards": ["--set=parallel.offload_optimizer=true", "--set=parallel.zero_stage=0"],
    "cold sampler": ["--set=sampler.method=cold"],
    "indivisible batch": ["--dry-run", "--world-size=3"],
    "S3 down": ["--set=data.manifest=s3://bucket/manifest.parquet", "--set=data.endpoint_url=http://127.0.0.1:1"],
}
"""Arguments of launch/train.py after its config."""


def refusals(shop: Workshop) -> dict[str, Any]:
    """Exit code and message for bad input."""
    data.pack(shop, ["digits8"])
    shop.write_json("refused.json", BASE | {"output": "refused", "engine": "local"})
    keys = ("AWS_ACCESS_KEY_ID", "key"), ("AWS_SECRET_ACCESS_KEY", "secret")
    commands = []
    for case, words in REFUSED.items():
        given = [
            "launch/train.py",
            "--config",
            "refused.json",
            f"--set=output=refused/{case.replace(' ', '-')}",
            *words,
        ]
        commands.append(Command(given, variables=keys))
    return {
        case: {"code": ended.code, "error": ended.err.partition(":")[0], "text": sha(ended.err)}
        for case, ended in zip(REFUSED, shop.run(commands), strict=True)
    }
