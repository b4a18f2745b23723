"""Render the Kubernetes objects of a job: a TrainJob or RayJob for a config, or a JobSet that packs a data set.

`python launch/k8s.py render --config configs/imagenet64.json --nodes 4 --gpus 8 --set … | kubectl apply -f -`. Objects
go to stdout, a summary to stderr. k8s/README.md describes what the cluster needs.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

from data_pipelines import pack
from data_pipelines.pack_arguments import parse
from warm_dist import errors
from warm_dist.config.load import read_tree
from warm_dist.config.run import load_config
from warm_dist.errors import ConfigError
from warm_dist.kubernetes import checks, jobs
from warm_dist.kubernetes.jobs import JobSize, RenderedJob
from warm_dist.paths import path_argument

BASE = Path(__file__).resolve().parent.parent / "k8s" / "base"
# placeholders in configs/ and BASE → what to do about them
EXAMPLES = {"s3://your-bucket": "set yours with --set", "registry.example.com": "set yours with --image"}

# Booleans and numbers of YAML 1.1 and 1.2 that PyYAML would leave plain, as kubectl's parser reads them: y, 1e-3, 0o7
_AMBIGUOUS = re.compile(r"[-+]?\.?\d.*|[-+]?\.(inf|nan)|y|n|yes|no|on|off|true|false|null", re.IGNORECASE)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    render = commands.add_parser("render", help="a training or a sweep")
    render.add_argument("--config", type=path_argument, required=True, help="a file of configs/: a run's, or a sweep's")
    text = "override a key, as for launch/train.py and launch/sweep.py; repeatable"
    render.add_argument("--set", action="append", default=[], metavar="a.b=VALUE", help=text)
    text = "data_pipelines.pack in several parts, then merged; its arguments follow --"
    packing = commands.add_parser("pack", help=text, description=f"{text}. /images is the claim `images`.")
    packing.add_argument("arguments", nargs="+", metavar="ARGUMENT", help="source, out_url, --resolution …")
    for command in (render, packing):
        command.add_argument("--nodes", type=int, required=True, help="pods, each on its own node where possible")
        command.add_argument("--name", help="of the objects; default: the config's or data set's")
        command.add_argument("--image", help="default: the template's")
        command.add_argument("--cpus", type=int, help="per process; default 8 with a GPU, else 1")
        command.add_argument("--memory", type=int, metavar="GiB", help="per process; default 64 with a GPU, else 4")
        command.add_argument("--processes", type=int, help="per node; default: its GPUs, else 1")
    render.add_argument("--gpus", type=int, default=0, help="per node; 0 (default): train on CPUs")
    render.add_argument("--jobset", action="store_true", help="a JobSet, for a cluster without Kubeflow Trainer")
    args = parser.parse_args()
    checks.check_image(args.image)
    job = _render(args) if args.command == "render" else _pack(args)
    sys.stdout.write(_yaml(job.objects))
    errors.print_line(job.summary)
    for example, advice in EXAMPLES.items():
        if example in str(job.objects):
            errors.print_line(f"note: {example} is a placeholder; {advice}")
    return errors.EXIT_OK


def _render(args: argparse.Namespace) -> RenderedJob:
    size = _size(args, args.gpus)
    name = args.name or _name(Path(args.config).stem)
    if "space" not in (tree := read_tree(args.config)) and "base" not in tree:
        config = load_config(args.config, args.set)
        runtime = _template("training/runtime.yaml")
        job = jobs.training(config, name, size, _template("training/trainjob.yaml"), runtime, args.image)
        return jobs.without_trainer(job, runtime) if args.jobset else job
    if args.jobset:
        raise ConfigError("--jobset is for a training; a sweep is a RayJob")
    from warm_dist.config.sweep import load_sweep

    loaded = load_sweep(args.config, args.set)
    return jobs.sweep(*loaded, name, size, _template("tuning/rayjob.yaml"), args.image)


def _pack(args: argparse.Namespace) -> RenderedJob:
    asked = parse(pack.__doc__, args.arguments)
    workers = [word for word in args.arguments if word.startswith("--w") and "--workers".startswith(word.split("=")[0])]
    if asked.part or workers:
        raise ConfigError("--part and --workers follow from --nodes and --processes; leave them out")
    name = args.name or _name(f"pack-{asked.out_url.rstrip('/').rpartition('/')[2]}")
    template = _template("data/pack.yaml")
    size, words = _size(args, 0), args.arguments
    return jobs.packing(asked.source, asked.out_url, asked.endpoint_url, words, name, size, template, args.image)


def _size(args: argparse.Namespace, gpus: int) -> JobSize:
    processes = args.processes if args.processes is not None else max(gpus, 1)
    cpus = args.cpus if args.cpus is not None else 8 if gpus else 1
    memory = args.memory if args.memory is not None else 64 if gpus else 4
    return JobSize(args.nodes, gpus, processes, cpus, memory)


def _name(stem: str) -> str:
    """A file name turned into a Kubernetes name: sweep_bnr → sweep-bnr."""
    return re.sub(r"[^a-z0-9]+", "-", stem.lower()).strip("-")


def _template(path: str) -> dict[str, Any]:
    import yaml

    tree: dict[str, Any] = yaml.safe_load((BASE / path).read_text(encoding="utf-8"))
    return tree


def _yaml(objects: list[dict[str, Any]]) -> str:
    import yaml

    class Dumper(yaml.SafeDumper):
        """Writes multi-line text as blocks, quotes what some parser takes for another type, without anchors."""

        def ignore_aliases(self, data: Any) -> bool:
            return True

    def text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
        style = "|" if "\n" in value else "'" if _AMBIGUOUS.fullmatch(value) else None
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)

    Dumper.add_representer(str, text)
    return yaml.dump_all(objects, Dumper=Dumper, sort_keys=False, width=1000)


if __name__ == "__main__":
    errors.run(main)
