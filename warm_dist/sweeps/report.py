"""What a sweep comes to: table, Parquet, pictures, the best trial's config, its surface and its model; here and in MLflow."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from warm_dist import errors, supervisor
from warm_dist.config.load import dump
from warm_dist.config.sweep import SurfaceConfig, SweepConfig, parameters
from warm_dist.errors import OutputError, UnreachableError
from warm_dist.files import make_folder, write_json
from warm_dist.runs.folder import CONFIG
from warm_dist.sweeps import figures, ranking, results_table
from warm_dist.sweeps.ranking import Outcome
from warm_dist.sweeps.record import SweepRecord
from warm_dist.sweeps.trial_process import SweepPaths
from warm_dist.sweeps.trials import Trial, constant_bnr

PICTURES: dict[str, Callable[[list[Outcome], Path], bool]] = {
    "bnr.png": figures.bnr_curve,
    "curves.png": figures.curves,
}


class Report:
    """All of it is made from what lies in the sweep's output, so it can be made again."""

    def __init__(
        self, sweep: SweepConfig, every: list[Trial], place: SweepPaths, ledger: SweepRecord, say: Callable[[str], None]
    ) -> None:
        self.sweep, self.place, self.ledger, self.say = sweep, place, ledger, say
        self.trials = {trial.name: trial for trial in every}
        local = Path(place.node_dir) / place.sweep_id if place.remote else Path(place.output)
        self.folder, self.runs = local / "results", local / "runs"
        self.outcomes: list[Outcome] = []
        self.code = errors.EXIT_OK

    def write(self, whole: bool) -> int:
        """Write OUTPUT/results and tell; `whole`: the sweep has ended, so also surface, model and MLflow's files.

        Returns an exit code: 1 if all trials have failed (the table says why), that of a surface that failed, else 0.
        """
        make_folder(self.folder)
        self.outcomes = [self._outcome(trial) for trial in self.trials.values()]
        table = results_table.text(self.outcomes)
        (self.folder / "table.txt").write_text(table + "\n", encoding="utf-8")
        results_table.write_csv(self.outcomes, self.folder / "table.csv")
        results_table.write_parquet(self.outcomes, self.folder / "trials.parquet")
        for name, draw in PICTURES.items():
            draw(self.outcomes, self.folder / name)
        best = ranking.best(self.outcomes)
        if best is not None:
            self._write_best(self.trials[best.name])
        if whole:
            if best is not None and self.sweep.surface:
                self._surface(best, self.sweep.surface)
            self._track(best)
        self._publish()
        self.say(table)
        self.say(f"results  {self.place.output}/results" + (f"   best  {best.name}" if best else ""))
        failed = all(outcome.state == "failed" for outcome in self.outcomes)
        return errors.EXIT_UNEXPECTED if failed else self.code

    def _outcome(self, trial: Trial) -> Outcome:
        end = self.ledger.ended(trial.name)
        return Outcome(
            trial.name,
            trial.values,
            trial.seed,
            constant_bnr(trial.config),
            trial.config.train.total_nimg,
            end.state if end else "unfinished",
            end.reason if end else "",
            self.ledger.evaluations(trial.name),
        )

    def _write_best(self, trial: Trial) -> None:
        """A config as of configs/: where it lies it trains that network again, in a folder of its own."""
        tree = dump(trial.config)
        del tree["$schema"]
        tree |= {"output": f"runs/{trial.name}", "description": f"the best trial of {self.place.output}"}
        tree["checkpoint"] |= {"url": None, "endpoint_url": None}  # those of the base are another run's
        tree["tracking"] |= {"run_name": None, "parent_run_id": None}
        write_json(self.folder / "best.json", tree)

    def _run_folder(self, name: str, weights: bool = False) -> Path:
        """The trial's run here: as it is, or its small files (and weights) fetched from S3."""
        if not self.place.remote:
            return self.place.run(name)
        prefix, folder = f"trials/{name}/", self.runs / name
        for path in self.ledger.store.list(prefix):
            inner = path.removeprefix(prefix)
            wanted = inner.startswith("samples/") or "/" not in inner or (weights and inner.startswith("weights/"))
            if wanted:
                make_folder((folder / inner).parent)
                self.ledger.store.download(path, folder / inner)
        return folder

    def _surface(self, best: Outcome, surface: SurfaceConfig) -> None:
        """The best network's Fréchet distances over NFE × BNR, by launch/evaluate.py; cells that are there are kept."""
        run, out = self._run_folder(best.name, weights=True), self.folder / "surface"
        command = [sys.executable, "-m", "launch.evaluate", str(run), "--out", str(out), "--mlflow-url", ""]
        command += ["--blocks", str(surface.num_blocks), "--nfe", ",".join(map(str, surface.nfe))]
        command += ["--bnr", ",".join(map(str, surface.bnr))] if surface.bnr else []
        command += ["--num-images", str(surface.num_images)] if surface.num_images else []
        data = self.trials[best.name].config.data  # the addresses of today, not those that the weights remember
        command += ["--manifest", data.manifest, *(["--endpoint-url", data.endpoint_url] if data.endpoint_url else [])]
        self.say(f"surface: {best.name} over NFE x BNR")
        process = supervisor.start(command)
        try:
            code = process.wait()
        finally:
            supervisor.stop(process)
        if code:
            self.code = code
            self.say(f"surface: launch/evaluate.py has ended with code {code}; --resume tries again")

    def _track(self, best: Outcome | None) -> None:
        """What MLflow has not got of the trials yet, the model of the best, and the results in the sweep's own run."""
        url = next(iter(self.trials.values())).config.tracking.mlflow_url
        if not url or not self.place.parent_run_id:
            return
        try:
            for outcome in self.outcomes:
                if outcome.state != "unfinished":
                    self._mirror(outcome.name, None)
            if best is not None and self.sweep.registered_model:
                self._mirror(best.name, self.sweep.registered_model)
            self._log(url, best)
        except (UnreachableError, OutputError) as error:
            self.say(f"not all is in MLflow: {error}; the same command with --resume sends it")

    def _mirror(self, name: str, register: str | None) -> None:
        from warm_dist.tracking.follow import mirror_run

        run = self._run_folder(name, weights=register is not None)
        if (run / CONFIG).exists():  # else it never came as far as to have something to show
            mirror_run(run, self.trials[name].config.tracking.mlflow_url, register)

    def _log(self, url: str, best: Outcome | None) -> None:
        from warm_dist.tracking.client import log_finished

        states = [outcome.state for outcome in self.outcomes]
        metrics: dict[tuple[str, int], float] = {
            (f"trials/{state}", 0): float(states.count(state)) for state in ("finished", "stopped", "failed")
        }
        if best is not None:
            metrics["best/frechet", 0] = float(best.evaluations[-1]["frechet"])
        names = [
            "table.txt",
            "table.csv",
            "trials.parquet",
            "best.json",
            *PICTURES,
            "surface/surface.png",
            "surface/table.csv",
        ]
        tracking = next(iter(self.trials.values())).config.tracking
        log_finished(
            url,
            tracking.experiment,
            Path(self.place.output).name,
            self.place.sweep_id,
            params=parameters(self.sweep) | ({"best": best.name} if best else {}),
            metrics=metrics,
            files=[self.folder / name for name in names if (self.folder / name).exists()],
        )

    def _publish(self) -> None:
        if self.place.remote:
            for path in sorted(path for path in self.folder.rglob("*") if path.is_file()):
                self.ledger.store.upload(f"results/{path.relative_to(self.folder).as_posix()}", path)
