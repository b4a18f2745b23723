"""What evaluation costs: `launch/bench.py features`. Inception's features beside clean-fid's own path, and one distance.

The weights are random, since only the architecture decides the time: InceptionV3 as torchvision builds it.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.benchmarks.pictures import crop, photographs
from launch.benchmarks.result import Spread, verdict
from warm_dist import errors
from warm_dist.cpus import usable_cpus
from warm_dist.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor


CLEAN_FID, FLOAT32, BF16 = "clean-fid", "ours", "ours, bf16"
TARGETS = {FLOAT32: 0.80, BF16: 0.40}  # of clean-fid's processor time
DISTANCE_TARGET_S = 3.0  # processor time of one distance
DIMENSIONS, DISTANCE_ROWS = 2048, (4096, 1000)  # more and fewer images than features
CALIBRATION = 32  # pictures that the random network's batch norms see
WEIGHTS = "inception-2015-12-05.pt"  # the name that clean-fid asks for
STEM = ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "maxpool1", "Conv2d_3b_1x1", "Conv2d_4a_3x3", "maxpool2")
MIXED = ("5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a", "7b", "7c")
LAYERS = (*STEM, *(f"Mixed_{name}" for name in MIXED), "avgpool")  # torchvision's names, up to the pooled features


def pictures(start: int, stop: int) -> Tensor:
    """The pictures of these numbers, (N, 3, 64, 64) uint8."""
    import numpy as np
    import torch

    photos = photographs()
    return torch.from_numpy(np.stack([crop(photos, number) for number in range(start, stop)])).permute(0, 3, 1, 2)


def random_inception(folder: Path) -> Path:
    """Write InceptionV3 with random weights as FID's own file is: TorchScript with `layers`, (B, 3, 299, 299) → (B, 2048, 1, 1).

    Its batch norms have the statistics of pictures. Their shift keeps most units where ReLU is linear: without it a
    random network so deep magnifies rounding twenty times more, which trained ones do not.
    """
    import torch
    from torch import nn
    from torchvision.models import inception_v3

    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated
        torch.manual_seed(0)
        network = inception_v3(weights=None, aux_logits=False, init_weights=False)
        layers = nn.Sequential(*(getattr(network, name) for name in LAYERS))
        for norm in (module for module in layers.modules() if isinstance(module, nn.BatchNorm2d)):
            norm.momentum = None  # statistics of all pictures seen
            nn.init.constant_(norm.weight, 0.5)
            nn.init.constant_(norm.bias, 0.5)
        x = nn.functional.interpolate(pictures(0, CALIBRATION).float(), size=(299, 299), mode="bicubic")
        x = (x - 128) / 128
        with torch.no_grad():
            layers.train()(x)
            whole = nn.Sequential()
            whole.add_module("layers", layers.eval())
            torch.jit.trace(whole.eval(), x[:1]).save(str(folder / WEIGHTS))
    return folder / WEIGHTS


class FeaturesBench:
    """Every contender in turn over the same pictures, in this process and on one thread."""

    def __init__(self, contenders: dict[str, Callable[[Tensor], Any]], images: Tensor) -> None:
        self.contenders, self.images = contenders, images
        self.load = os.getloadavg()[0]  # before the first measurement
        self.cpu_ms: dict[str, list[float]] = {name: [] for name in contenders}
        self.distance_s: dict[int, list[float]] = {}

    def measure(self, rounds: int) -> Iterator[None]:
        """Everybody once a round, after two batches that warm up TorchScript; yields after each of them."""
        for contender in self.contenders.values():
            for _ in range(2):
                contender(self.images[:4])
        for _ in range(rounds):
            for name, contender in self.contenders.items():
                begun = time.process_time()
                contender(self.images)
                self.cpu_ms[name].append(1e3 * (time.process_time() - begun) / len(self.images))
                yield

    def measure_distance(self, rounds: int) -> None:
        """Processor seconds, of all threads, of the distance of two sets of correlated features."""
        import numpy as np

        from warm_dist.evaluation.frechet import Moments, frechet_distance

        draw = np.random.default_rng(0)
        mix = draw.standard_normal((DIMENSIONS, DIMENSIONS)) * np.exp(-np.arange(DIMENSIONS) / 300)[:, None]
        for count in DISTANCE_ROWS:
            a, b = (Moments.of(np.maximum(draw.standard_normal((count, DIMENSIONS)) @ mix, 0)) for _ in range(2))
            for _ in range(rounds):
                begun = time.process_time()
                frechet_distance(a, b)
                self.distance_s.setdefault(count, []).append(time.process_time() - begun)

    def bf16_error(self, others: Tensor) -> dict[str, float]:
        """The distance between the pictures and `others`, in float32 and in bfloat16."""
        from warm_dist.evaluation.frechet import Moments, frechet_distance

        found = [
            frechet_distance(*(Moments.of(self.contenders[name](images)) for images in (self.images, others)))
            for name in (FLOAT32, BF16)
        ]
        return {
            "float32": found[0],
            "bf16": found[1],
            "error": found[1] - found[0],
            "relative": found[1] / found[0] - 1,
        }

    def report(self) -> dict[str, Any]:
        """What --json prints. cpu_ms: of an image; ratios: to clean-fid's, round by round."""
        theirs = self.cpu_ms[CLEAN_FID]
        return {
            "images": len(self.images),
            "rounds": len(theirs),
            "cores": usable_cpus(),
            "load": self.load,
            "cpu_ms": {name: asdict(Spread.of(values)) for name, values in self.cpu_ms.items()},
            "ratios": {
                name: verdict([a / b for a, b in zip(self.cpu_ms[name], theirs, strict=True)], target, below=True)
                for name, target in TARGETS.items()
            },
            "distance_s": {
                str(count): verdict(values, DISTANCE_TARGET_S, below=True) for count, values in self.distance_s.items()
            },
        }


def table(report: dict[str, Any]) -> str:
    """The report as text."""

    def line(name: str, found: dict[str, Any], digits: int) -> str:
        end = f"  target {found['target']:g}: {'met' if found['met'] else 'missed'}" if "target" in found else ""
        spread = Spread(*(found[key] for key in ("median", "min", "max")))
        return f"{name:44}{spread.columns(digits)}{end}"

    error = report["bf16"]
    return "\n".join(
        [
            f"InceptionV3 with random weights, {report['images']} images 64x64, one thread, {report['rounds']} rounds of "
            f"everything in turn, {report['cores']} cores, load average {report['load']:.1f} at the start",
            "",
            f"{'CPU ms an image, resize included':44}{'median':>12}{'min..max':>18}",
            *(line(name, found, 1) for name, found in report["cpu_ms"].items()),
            "",
            "ratio to clean-fid's (median over the rounds' ratios)",
            *(line(name, found, 3) for name, found in report["ratios"].items()),
            "",
            f"CPU s of a Fréchet distance, {DIMENSIONS} features",
            *(line(f"{count} images each", found, 2) for count, found in report["distance_s"].items()),
            "",
            f"Fréchet distance to other pictures, averaged 2x2: float32 {error['float32']:.4f}, bf16 {error['bf16']:.4f}, "
            f"error {error['error']:+.4f} ({error['relative']:+.2%})",
        ]
    )


def features(args: argparse.Namespace) -> int:
    """The subcommand `features`."""
    if args.num_images < 4 or args.rounds < 1:
        raise ConfigError("--num-images must be at least 4, --rounds at least 1")
    import torch
    from tqdm import tqdm

    from launch.benchmarks.peers.clean_fid import CleanFid
    from warm_dist.evaluation.extractors import make_extractor
    from warm_dist.files import file_sha256

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="warm-dist-bench-") as name:
        path = random_inception(Path(name))
        contenders: dict[str, Callable[[Tensor], Any]] = {CLEAN_FID: CleanFid(Path(name))}
        for label, bf16 in ((FLOAT32, False), (BF16, True)):
            contenders[label] = make_extractor("inception", str(path), file_sha256(path), bf16=bf16)
    bench = FeaturesBench(contenders, pictures(0, args.num_images))
    for _ in tqdm(bench.measure(args.rounds), desc="features", total=args.rounds * len(contenders), disable=None):
        pass
    bench.measure_distance(args.rounds)
    others = pictures(args.num_images, 2 * args.num_images).float()
    others = torch.nn.functional.avg_pool2d(others, 2).repeat_interleave(2, 2).repeat_interleave(2, 3).round().byte()
    report = bench.report() | {"bf16": bench.bf16_error(others)}
    print(json.dumps(report) if args.json else table(report))
    return errors.EXIT_OK


def add_arguments(command: argparse.ArgumentParser) -> None:
    """The options of `features`."""
    command.add_argument("--num-images", type=int, default=64, help="a round and contender (default: %(default)s)")
    command.add_argument("--rounds", type=int, default=5, help="everything once a round (default: %(default)s)")
    command.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    command.set_defaults(run=features)
