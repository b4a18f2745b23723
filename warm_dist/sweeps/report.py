"""The results of a sweep: tables, figures, the best trial's config, surface and model; in files and in MLflow."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from warm_dist import errors, supervisor
from warm_dist.config.load import dump
from warm_dist.config.sweep import SurfaceConfig, SweepConfig, parameters
from warm_dist.errors import AccessError, OutputError, UnreachableError
from warm_dist.files import make_folder, write_json
from warm_dist.runs.folder import CONFIG
from warm_dist.sweeps import figures, ranking, results_table
from warm_dist.sweeps.ranking import Outcome
from warm_dist.sweeps.record import SweepRecord
from warm_dist.sweeps.trial_process import SweepPaths
from warm_dist.sweeps.trials import Trial, constant_bnr

PICTURES = {"bnr.png": figures.bnr_curve, "curves.png": figures.curves}
Say = Callable[[str], None]


class Report:
    """Writes the results of a sweep; they depend only on its output folder, so they can be written again."""

    def __init__(
        self, sweep: SweepConfig, every: list[Trial], paths: SweepPaths, record: SweepRecord, say: Say
    ) -> None:
        self.sweep, self.paths, self.record, self.say = sweep, paths, record, say
        self.trials = {trial.name: trial for trial in every}
        local = Path(paths.node_dir) / paths.sweep_id if paths.remote else Path(paths.output)
        self.folder, self.runs = local / "results", local / "runs"
        self.outcomes: list[Outcome] = []
        self.code = errors.EXIT_OK

    def write(self, whole: bool) -> int:
        """Write OUTPUT/results and print the table. whole: the sweep has ended; add the surface, the model and MLflow.

        Returns an exit code: 1 if all trials have failed (the table says why), the surface's if that failed, else 0.
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
        if self.paths.remote:
            for path in sorted(path for path in self.folder.rglob("*") if path.is_file()):
                self.record.store.upload(f"results/{path.relative_to(self.folder).as_posix()}", path)
        self.say(table)
        self.say(f"results  {self.paths.output}/results" + (f"   best  {best.name}" if best else ""))
        failed = all(outcome.state == "failed" for outcome in self.outcomes)
        return errors.EXIT_UNEXPECTED if failed else self.code

    def _outcome(self, trial: Trial) -> Outcome:
        end, evaluations = self.record.ended(trial.name), self.record.evaluations(trial.name)
        state, reason = (end.state, end.reason) if end else ("unfinished", "")
        bnr, total = constant_bnr(trial.config), trial.config.train.total_nimg
        return Outcome(trial.name, trial.values, trial.seed, bnr, total, state, reason, evaluations)

    def _write_best(self, trial: Trial) -> None:
        """Write best.json, a config that trains the best network again in a new folder."""
        tree = dump(trial.config)
        del tree["$schema"]
        tree |= {"output": f"runs/{trial.name}", "description": f"the best trial of {self.paths.output}"}
        tree["checkpoint"] |= {"url": None, "endpoint_url": None}  # the base config's belong to another run
        tree["tracking"] |= {"run_name": None, "parent_run_id": None}
        write_json(self.folder / "best.json", tree)

    def _run_folder(self, name: str, weights: bool = False) -> Path:
        """The trial's run folder on this machine; small files (and weights) are downloaded from S3 if needed."""
        if not self.paths.remote:
            return self.paths.run(name)
        prefix, folder = f"trials/{name}/", self.runs / name
        for path in self.record.store.list(prefix):
            inner = path.removeprefix(prefix)
            if "/" not in inner or inner.startswith("samples/") or (weights and inner.startswith("weights/")):
                make_folder((folder / inner).parent)
                self.record.store.download(path, folder / inner)
        return folder

    def _surface(self, best: Outcome, surface: SurfaceConfig) -> None:
        """Measure the best network over NFE × BNR with launch/evaluate.py, which keeps the cells it has."""
        run, out = self._run_folder(best.name, weights=True), self.folder / "surface"
        command = [sys.executable, "-m", "launch.evaluate", str(run), "--out", str(out), "--mlflow-url", ""]
        command += ["--blocks", str(surface.num_blocks), "--nfe", ",".join(map(str, surface.nfe))]
        command += ["--bnr", ",".join(map(str, surface.bnr))] if surface.bnr else []
        command += ["--num-images", str(surface.num_images)] if surface.num_images else []
        data = self.trials[best.name].config.data  # current addresses: those stored in the weights may be outdated
        command += ["--manifest", data.manifest, *(["--endpoint-url", data.endpoint_url] if data.endpoint_url else [])]
        self.say(f"surface: {best.name} over NFE x BNR")
        process = supervisor.start(command)
        try:
            code = process.wait()
        finally:
            supervisor.stop(process)
        if code:
            self.code = code
            self.say(f"surface: launch/evaluate.py ended with code {code}; --resume tries again")

    def _track(self, best: Outcome | None) -> None:
        """Send MLflow what is missing of the trials, the best trial's model, and the results of the sweep."""
        url = next(iter(self.trials.values())).config.tracking.mlflow_url
        if not url or not self.paths.parent_run_id:
            return
        try:
            for outcome in self.outcomes:
                if outcome.state != "unfinished":
                    self._mirror(outcome.name, None)
            if best is not None and self.sweep.registered_model:
                self._mirror(best.name, self.sweep.registered_model)
            self._log(url, best)
        except (UnreachableError, AccessError, OutputError) as error:
            self.say(f"MLflow is not up to date: {error}; the same command with --resume sends the rest")

    def _mirror(self, name: str, register: str | None) -> None:
        from warm_dist.tracking.follow import mirror_run

        run = self._run_folder(name, weights=register is not None)
        if (run / CONFIG).exists():  # else the trial failed before it wrote anything
            mirror_run(run, self.trials[name].config.tracking.mlflow_url, register)

    def _log(self, url: str, best: Outcome | None) -> None:
        from warm_dist.tracking.client import log_finished

        states = [outcome.state for outcome in self.outcomes]
        counts = {state: float(states.count(state)) for state in ("finished", "stopped", "failed")}
        metrics = {(f"trials/{state}", 0): count for state, count in counts.items()}
        if best is not None:
            metrics["best/frechet", 0] = float(best.evaluations[-1]["frechet"])
        names = ["table.txt", "table.csv", "trials.parquet", "best.json", *PICTURES]
        names += ["surface/surface.png", "surface/table.csv"]
        files = [self.folder / name for name in names if (self.folder / name).exists()]
        params = parameters(self.sweep) | ({"best": best.name} if best else {})
        experiment = next(iter(self.trials.values())).config.tracking.experiment
        run = Path(self.paths.output).name, self.paths.sweep_id
        log_finished(url, experiment, *run, params=params, metrics=metrics, files=files)
