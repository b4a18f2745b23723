"""How fast images are packed and read, beside other readers of the same data."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.benchmarks.pictures import SIZE, crop, photographs
from launch.benchmarks.result import JOB_S, ROOT, Spread
from warm_dist import errors, supervisor
from warm_dist.cpus import usable_cpus
from warm_dist.errors import ConfigError, DataError, WarmDistError

if TYPE_CHECKING:
    from warm_dist.store.seaweedfs import S3Server


BATCH = 256
PAYLOADS = {"npy": "raw", "png": "PNG", "jpg": "JPEG"}
OURS, PEERS = "ours", ("pipe:aws", "boto3", "streaming")
NAMES = {
    OURS: "ours",
    "pipe:aws": "webdataset, pipe:aws",
    "boto3": "webdataset, boto3 body",
    "streaming": "MosaicML Streaming",
}
# the better, the worse (payload and contender each), and the ratio of CPU times that the former must reach
TARGETS = (
    (("png", OURS), ("png", "pipe:aws"), 0.45),
    (("png", OURS), ("png", "boto3"), 0.70),
    (("npy", OURS), ("png", "boto3"), 0.20),
)


class DataBench:
    """Packs the pictures once, has each contender read them in a process of its own, and collects what it took."""

    def __init__(self, s3: S3Server, folder: Path, images: int, shard_size: int, peers: Path | None) -> None:
        self.s3, self.folder, self.peers = s3, folder, peers
        self.images, self.shard_size = images, shard_size
        self.jobs: dict[str, dict[str, Any]] = {}
        self.payload_bytes: dict[str, float] = {}
        self.checksums: dict[str, int] = {}
        self.results: dict[tuple[str, str], list[dict[str, Any]]] = {}

    @property
    def contenders(self) -> tuple[str, ...]:
        return (OURS, *PEERS) if self.peers else (OURS,)

    def prepare(self) -> Iterator[None]:
        """Pack the real set and the warm-up set of every payload; yields after each of them."""
        import zlib

        from data_pipelines.pack import pack
        from data_pipelines.shards.manifest import NAME, Manifest
        from data_pipelines.sources.base import Sample, Source

        photos = photographs()

        def samples(start: int, stop: int) -> list[Sample]:
            return [Sample(f"{number:06d}", -1, crop(photos, number)) for number in range(start, stop)]

        def packed(kind: str, name: str, count: int) -> tuple[str, Manifest]:
            url = f"s3://{self.s3.bucket}/{name}-{kind}"
            source = Source(count, (), "scikit-learn's sample images", samples)
            return url, pack(source, url, self.s3.endpoint_url, shard_size=self.shard_size, payload=kind)

        truth = sum(zlib.crc32(sample.image.tobytes()) for sample in samples(0, self.images))
        common = {"endpoint_url": self.s3.endpoint_url, "batch": BATCH, "resolution": SIZE}
        sets = []
        for kind in PAYLOADS:
            job: dict[str, Any] = common | {"payload": kind, "images": self.images}
            for name, count, key in (("warm", BATCH, "warm_urls"), ("real", self.images, "urls")):
                url, manifest = packed(kind, name, count)
                job[key] = [f"{url}/{shard.name}" for shard in manifest.shards]
                size = float(manifest.length.mean())
                shard_bytes = round(size * self.shard_size)
                sets.append(
                    {"payload": kind, "urls": job[key], "mds": self._mds(kind, name), "shard_bytes": shard_bytes}
                )
            self.jobs[kind], self.payload_bytes[kind] = job | {"manifest": f"{url}/{NAME}"}, size
            if kind != "jpg":  # which is not the original to the last bit; there they must agree among each other
                self.checksums[kind] = truth
            yield
        if self.peers:
            self._run("write", common | {"payload": "all", "sets": sets})
        yield

    def measure(self, rounds: int) -> Iterator[None]:
        """Every contender once a round; yields after each of them. Raises DataError if one sees other pixels."""
        for number in range(rounds):
            for kind in PAYLOADS:
                for contender in self.contenders:
                    job = self.jobs[kind] | {"check": number == 0}
                    if contender == "streaming":
                        job |= {"urls": [self._mds(kind, "real")], "warm_urls": [self._mds(kind, "warm")]}
                    result = self._run(contender, job)
                    if result["images"] != self.images:
                        raise DataError(f"{contender} read {result['images']} of {self.images} {kind} images")
                    if number == 0 and result["checksum"] != self.checksums.setdefault(kind, result["checksum"]):
                        raise DataError(f"{contender} sees other pixels in the {kind} images than {OURS}")
                    self.results.setdefault((kind, contender), []).append(result)
                    yield

    def report(self) -> dict[str, Any]:
        """What --json prints. cpu_us: client CPU, user and system, microseconds an image."""

        def cpu_us(key: tuple[str, str]) -> list[float]:
            return [1e6 * run["cpu_s"] / run["images"] for run in self.results[key]]

        rows = [
            {
                "payload": kind,
                "contender": contender,
                "images_per_s": asdict(Spread.of([run["images"] / run["wall_s"] for run in runs])),
                "cpu_us": asdict(Spread.of(cpu_us((kind, contender)))),
            }
            for (kind, contender), runs in self.results.items()
        ]
        ratios = []
        for better, worse, target in TARGETS:
            if worse in self.results:
                spread = Spread.of([a / b for a, b in zip(cpu_us(better), cpu_us(worse), strict=True)])
                ratios.append(
                    {"cpu_of": better, "to": worse, **asdict(spread), "target": target, "met": spread.median <= target}
                )
        return {
            "images": self.images,
            "resolution": SIZE,
            "shard_size": self.shard_size,
            "batch": BATCH,
            "rounds": len(next(iter(self.results.values()))),
            "cores": usable_cpus(),
            "payload_bytes": self.payload_bytes,
            "checksums": self.checksums,
            "versions": {
                who: self.results["npy", contender][0]["versions"]
                for who, contender in (("ours", OURS), ("peers", PEERS[0]))
                if contender in self.contenders
            },
            "results": rows,
            "ratios": ratios,
        }

    def _mds(self, kind: str, name: str) -> str:
        return f"s3://{self.s3.bucket}/{name}-{kind}-mds"

    def _run(self, contender: str, job: dict[str, Any]) -> dict[str, Any]:
        """One job in a process of its own, with a folder of its own. Raises WarmDistError with the end of its output."""
        with tempfile.TemporaryDirectory(dir=self.folder) as name:
            folder = Path(name)
            out, log, description = folder / "result.json", folder / "log", folder / "job.json"
            python = Path(sys.executable) if contender == OURS else self.peers
            assert python is not None
            job = job | {"contender": contender, "folder": name, "out": str(out), "aws": str(python.parent / "aws")}
            description.write_text(json.dumps(job))
            script = ROOT / "launch" / "benchmarks" / "peers" / ("ours.py" if contender == OURS else "data.py")
            process = supervisor.start([str(python), str(script), str(description)], self._environment(folder), log)
            try:
                code = process.wait(JOB_S)
            except subprocess.TimeoutExpired:
                code = -1
            finally:
                supervisor.stop(process)
            if code != 0 or not out.exists():
                how = f"took more than {JOB_S} s" if code == -1 else f"ended with code {code}"
                tail = "\n  ".join(log.read_text(errors="replace").strip().splitlines()[-8:])
                raise WarmDistError(f"{contender}, {job['payload']}: {how}; its output ends:\n  {tail}")
            result: dict[str, Any] = json.loads(out.read_text())
            return result

    def _environment(self, folder: Path) -> dict[str, str]:
        """One thread for libraries, temporary files in `folder`, and nothing of the user's own AWS settings."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
        nobody = {"AWS_CONFIG_FILE": os.devnull, "AWS_SHARED_CREDENTIALS_FILE": os.devnull}
        ours = {"OMP_NUM_THREADS": "1", "TMPDIR": str(folder), "AWS_EC2_METADATA_DISABLED": "true"}
        return kept | nobody | ours | self.s3.env | {"S3_ENDPOINT_URL": self.s3.endpoint_url}


def table(report: dict[str, Any]) -> str:
    """The report as text."""
    sizes = ", ".join(f"{PAYLOADS[kind]} {size:.0f}" for kind, size in report["payload_bytes"].items())
    lines = [
        f"{report['images']} images {SIZE}x{SIZE} RGB in shards of {report['shard_size']}, batches of {BATCH}, "
        f"{report['rounds']} rounds, {report['cores']} cores; mean bytes: {sizes}",
        *(
            f"{who}: " + ", ".join(f"{name} {version}" for name, version in versions.items())
            for who, versions in report["versions"].items()
        ),
        "",
        f"{'':30}{'images/s':>12}{'min..max':>18}{'CPU µs/image':>14}{'min..max':>18}",
    ]
    for row in report["results"]:
        speed, cpu = Spread(**row["images_per_s"]), Spread(**row["cpu_us"])
        lines.append(f"{PAYLOADS[row['payload']]:6}{NAMES[row['contender']]:24}{speed.columns(0)}  {cpu.columns(1)}")
    if report["ratios"]:
        lines += ["", "client CPU per image, ratio (median over the rounds' ratios)"]
    for ratio in report["ratios"]:
        pair = " / ".join(f"{NAMES[who]} {PAYLOADS[kind]}" for kind, who in (ratio["cpu_of"], ratio["to"]))
        spread = Spread(ratio["median"], ratio["min"], ratio["max"])
        verdict = f"target {ratio['target']:.2f}: {'met' if ratio['met'] else 'missed'}"
        lines.append(f"{pair:44}{spread.columns(3)}  {verdict}")
    return "\n".join(lines)


def data(args: argparse.Namespace) -> int:
    """The subcommand `data`."""
    if args.images < BATCH or args.images % BATCH or args.shard_size < 1 or args.rounds < 1:
        raise ConfigError(f"--images must be a multiple of {BATCH}, --shard-size and --rounds at least 1")
    from tqdm import tqdm

    from warm_dist.store.seaweedfs import S3Server

    peers = args.peers_python if args.peers_python.exists() else None
    skipped = None if peers else f"peers are skipped: {args.peers_python} does not exist; `make peers` makes it"
    if skipped:
        print(skipped, file=sys.stderr)
    with ExitStack() as stack:
        name = stack.enter_context(tempfile.TemporaryDirectory(prefix="warm-dist-bench-"))
        os.environ["TMPDIR"] = name  # weed writes logs of its own there
        s3 = stack.enter_context(S3Server(Path(name) / "s3", "bench"))
        os.environ.update(s3.env)
        bench = DataBench(s3, Path(name), args.images, args.shard_size, peers)
        steps = [(bench.prepare(), len(PAYLOADS) + 1, "pack")]
        steps += [(bench.measure(args.rounds), args.rounds * len(PAYLOADS) * len(bench.contenders), "read")]
        for step, total, what in steps:
            for _ in tqdm(step, desc=what, total=total, disable=None):
                pass
        report = bench.report() | {"skipped": skipped}
    print(json.dumps(report) if args.json else table(report))
    return errors.EXIT_OK
