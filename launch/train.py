"""Train: `deepspeed launch/train.py --config configs/imagenet64.json`, or under torchrun, or with plain python."""

from __future__ import annotations

import argparse
import contextlib
import os
import time
from pathlib import Path

from warm_dist import errors
from warm_dist.config import Config
from warm_dist.config_file import load_config


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True, help="a file of configs/")
    parser.add_argument(
        "--set", action="append", default=[], metavar="a.b=VALUE", help="override a key; may be repeated"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print config, batch arithmetic, parameters, memory; stop"
    )
    parser.add_argument("--world-size", type=int, help="with --dry-run: the number of processes to plan for")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # deepspeed's launcher adds it
    args = parser.parse_args()
    if args.world_size is not None and (not args.dry_run or args.world_size < 1):
        parser.error("--world-size takes a positive number, together with --dry-run")
    return args


def main() -> int:
    args = parse()
    config = load_config(args.config, args.set)
    size = args.world_size or int(os.environ.get("WORLD_SIZE", "1"))
    from warm_dist import plan

    if args.dry_run:
        print(plan.dry_run(config, size))
    else:
        plan.check_world_size(config, size)
        Attempt(config).run()
    return errors.EXIT_OK


class Attempt:
    """One attempt at a run: joins the processes, wires data to trainer, and leaves exit.json at every end but kill -9."""

    def __init__(self, config: Config) -> None:
        from warm_dist import distributed

        self.config, self.path = config, Path(config.output)
        self.stop = distributed.StopSignal().install()
        distributed.set_threads()
        self.world = distributed.init(config.parallel.timeout_s)
        self.number, self.nimg = 0, 0

    def say(self, text: str) -> None:
        if self.world.is_main:
            with contextlib.suppress(OSError):  # whoever read our output is gone; the run goes on
                print(text, flush=True)

    def run(self) -> None:
        from warm_dist import distributed, run_folder

        failure: BaseException | None = None
        try:
            try:
                self.number = distributed.on_main(self.world, self._claim)
                self._train()
            except (RuntimeError, errors.UnreachableError) as error:
                if self.world.size == 1 or not distributed.is_peer_loss(error):
                    raise  # our own fault (a bug, no memory left) keeps its traceback and is not called resumable
                raise self._peer_error(error) from error
        except BaseException as error:
            failure = error
            raise
        finally:
            if self.number and (failure is not None or self.world.is_main):
                run_folder.end(self.path, self.number, self.nimg, failure)
            if failure is None:
                distributed.shutdown()

    def _claim(self) -> int:
        from warm_dist import run_folder

        number, self._lock = run_folder.claim(self.path)
        return number

    def _peer_error(self, error: Exception) -> errors.WarmDistError:
        """A broken collective is usually a peer's end; the peer has written why."""
        from warm_dist.metrics import read_json

        deadline = time.monotonic() + 5
        while time.monotonic() < deadline:
            told = read_json(self.path / "exit.json")
            if told and told["attempt"] == self.number:
                return errors.PeerError(told["reason"], told["code"], told["resumable"])
            time.sleep(0.1)
        return errors.UnreachableError(f"rank {self.world.rank} lost a peer: {str(error).splitlines()[0]}")

    def _train(self) -> None:
        from data_pipelines.loader import open_loader
        from warm_dist import checkpoint, distributed, generate, run_folder
        from warm_dist.evaluation import Evaluator
        from warm_dist.metrics import MetricsLog, read_metrics
        from warm_dist.networks import num_parameters
        from warm_dist.trainer import Trainer

        config, world = self.config, self.world
        with contextlib.closing(open_loader(config, world.rank, world.size)) as loader:
            info = loader.manifest.info
            self.say(
                f"reader: {loader.threads} threads, at most {loader.most_bytes / 1e6:.0f} MB a rank, "
                f"{len(loader.manifest.shards):,} shards checked"
            )
            if loader.pieces > 1:
                self.say(
                    f"reader: a window comes in {loader.pieces} pieces, and a chunk is fetched up to as often; "
                    f"data.buffer_bytes={loader.whole_bytes} would hold it whole"
                )
            found = distributed.on_main(world, lambda: checkpoint.latest(self.path / "checkpoints", self.say))
            trainer = Trainer(config, world, info, self.path, self.say)
            trainer.resume(found)
            self.nimg = trainer.nimg
            if world.is_main:
                facts = {
                    "fingerprint": info.fingerprint,
                    "world_size": world.size,
                    "num_parameters": num_parameters(trainer.engine.module),
                    "device": str(world.device),
                }
                run_folder.describe(self.path, config, self.number, facts)
            log = MetricsLog(self.path / "metrics.jsonl", self.number) if world.is_main else None
            self._start_mirror()
            evaluator = Evaluator(config, world, info, loader.read, self.path, self.say) if config.eval else None
            done = {r["nimg"] for r in read_metrics(self.path / "metrics.jsonl") if r["kind"] == "eval"}
            done = distributed.on_main(world, lambda: done)
            try:
                trainer.fit(loader.batches(trainer.nimg), log, self.stop, evaluator, done)
            finally:
                self.nimg = trainer.nimg
            self.say(f"reader: at most {loader.peak_bytes / 1e6:.1f} MB were held")
            if world.is_main:
                folder = checkpoint.folder_of(trainer.checkpoints, trainer.nimg)
                generate.export_weights(folder, "ema", self.path / "weights" / "ema.safetensors")
                self.say(f"finished: {self.path}/weights/ema.safetensors")

    def _start_mirror(self) -> None:
        if self.world.is_main and self.config.tracking.mlflow_url:
            from launch.mirror import start_mirror

            start_mirror(self.path)


if __name__ == "__main__":
    errors.run(main, quiet=os.environ.get("RANK", "0") != "0")
