"""Ray actors: one for each trial, stepped by Tune, and one for each further machine of a trial.

Imported only by `tune.run` and Ray's workers, because the trial's base class needs Ray at import.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import ray
from ray import tune
from ray.util import get_current_placement_group, get_node_ip_address
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from warm_dist import supervisor
from warm_dist.config.sweep import TrialConfig
from warm_dist.supervisor import free_port
from warm_dist.sweeps.trial_process import END_S, End, SweepPaths, TrialRun, start_node
from warm_dist.sweeps.trials import Trial

POLL_S = 0.5  # between looks for an evaluation or the end of the process
STEP_S = 2.0  # a step returns after this time even without an evaluation, so that Tune can end the trial
START_S = 120.0  # limit for starting the actors on a trial's further machines


@dataclass(frozen=True)
class ActorJob:
    """What every trial actor receives. session: id of the driver process."""

    trials: dict[str, Trial]
    paths: SweepPaths
    resources: TrialConfig
    session: str


class TrialFailed(Exception):
    """The training process failed but may succeed when resumed from its last checkpoint."""


class TrialActor(tune.Trainable):  # type: ignore[misc]  # ray's are untyped
    """One trial. A step returns an evaluation {"nimg", "frechet", "floor"}, or {"at": nimg} after STEP_S without one.

    The trial's last result has "state".
    """

    def setup(self, config: dict[str, Any], job: ActorJob) -> None:
        """Store the job; nothing starts yet, because Tune does not retry a failed setup."""
        self.job, self.trial = job, job.trials[config["trial"]]
        self.run: TrialRun | None = None
        self.peers: list[Any] = []

    def step(self) -> dict[str, Any]:
        """Wait for the next evaluation, the end of the process, or STEP_S. Raises TrialFailed."""
        run = self.run or self._start()
        deadline = time.monotonic() + STEP_S
        while True:
            end = run.end()
            finished = end is not None and end.code == 0
            for record in run.evaluations(finished):
                last = finished and record["nimg"] >= run.total_nimg
                run.report(record["nimg"])
                result = {"nimg": record["nimg"], "frechet": record["frechet"], "floor": record.get("floor")}
                return {**result, **({"state": "finished", "done": True} if last else {})}
            if end is not None:
                return self._ended(end)
            if time.monotonic() > deadline:
                return {"at": run.nimg()}
            time.sleep(POLL_S)

    def _start(self) -> TrialRun:
        job = self.job
        self.run = run = TrialRun(self.trial, job.paths, job.resources, job.session)
        if job.resources.nodes == 1:
            run.start()
            return run
        address = get_node_ip_address()
        port = free_port(address)
        bundle, group = job.resources.bundle, get_current_placement_group()
        for rank in range(1, job.resources.nodes):
            where = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank)
            options = {"num_cpus": bundle["CPU"], "num_gpus": bundle.get("GPU", 0), "scheduling_strategy": where}
            self.peers.append(ray.remote(NodeActor).options(**options).remote())
        shared = run.config, job.paths, job.resources
        starts = [peer.start.remote(*shared, rank, address, port) for rank, peer in enumerate(self.peers, 1)]
        ray.get(starts, timeout=START_S)
        run.start(address, port)
        return run

    def _ended(self, end: End) -> dict[str, Any]:
        if end.code == 0:  # its last evaluation was reported before
            return {"state": "finished", "done": True}
        if end.final:
            return {"state": "failed", "reason": end.reason, "done": True}
        raise TrialFailed(end.reason)

    def cleanup(self) -> None:
        """End all processes on every machine and publish their files to the sweep's output."""
        ends = [peer.stop.remote() for peer in self.peers]
        if self.run is not None:
            self.run.close()
        if ends:
            ray.wait(ends, num_returns=len(ends), timeout=2 * END_S)  # an actor on a lost machine never answers


class NodeActor:
    """Runs the launcher of a trial's further machine; the launcher ends with the actor."""

    def start(self, *arguments: Any) -> None:
        """Start the launcher. arguments: those of `start_node`."""
        self.process = start_node(*arguments)

    def stop(self) -> None:
        """End the launcher: SIGTERM, after 10 s SIGKILL."""
        supervisor.stop(self.process, END_S)
