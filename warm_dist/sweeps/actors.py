"""What runs inside Ray: an actor for each trial, which Tune steps, and one for each further machine of a trial.

Imported by `sweep`, and by Ray's workers, only: the base class of a trial has to be there when the module is read.
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

POLL_S = 0.5  # how soon an evaluation, or the end of the process, is seen
STEP_S = 2.0  # after which a step without news returns, so that Tune may end the trial
START_S = 120.0  # for the actors of a trial's further machines


@dataclass(frozen=True)
class ActorJob:
    """What every trial's actor is given."""

    trials: dict[str, Trial]
    place: SweepPaths
    resources: TrialConfig
    session: str


class TrialFailed(Exception):
    """The training process ended badly, and may do better from its last checkpoint."""


class TrialActor(tune.Trainable):  # type: ignore[misc]  # ray's are untyped
    """One trial. Its steps are its evaluations: {"nimg", "frechet", ...}, or only {"at"}, how far it is, after STEP_S.

    A result with "state" is the trial's last.
    """

    def setup(self, config: dict[str, Any], job: ActorJob) -> None:
        """Start nothing yet: what fails here Tune does not try again."""
        self.job, self.trial = job, job.trials[config["trial"]]
        self.run: TrialRun | None = None
        self.peers: list[Any] = []

    def step(self) -> dict[str, Any]:
        """Until the next evaluation, the end of the process, or STEP_S. Raises TrialFailed."""
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
        self.run = run = TrialRun(self.trial, job.place, job.resources, job.session)
        if job.resources.nodes == 1:
            run.start()
            return run
        address = get_node_ip_address()
        port = free_port(address)
        self.peers = [_peer(job.resources, rank) for rank in range(1, job.resources.nodes)]
        starts = [
            peer.start.remote(run.config, job.place, job.resources, rank, address, port)
            for rank, peer in enumerate(self.peers, 1)
        ]
        ray.get(starts, timeout=START_S)
        run.start(address, port)
        return run

    def _ended(self, end: End) -> dict[str, Any]:
        if end.code == 0:  # after the last evaluation: there is none to report
            return {"state": "finished", "done": True}
        if end.final:
            return {"state": "failed", "reason": end.reason, "done": True}
        raise TrialFailed(end.reason)

    def cleanup(self) -> None:
        """End all processes, on every machine, and leave what they wrote in the sweep's output."""
        ends = [peer.stop.remote() for peer in self.peers]
        if self.run is not None:
            self.run.close()
        if ends:
            ray.wait(ends, num_returns=len(ends), timeout=2 * END_S)  # one whose machine is gone never answers


class NodeActor:
    """A further machine of a trial: it starts that machine's launcher, which ends with the actor."""

    def start(
        self, config: dict[str, Any], place: SweepPaths, resources: TrialConfig, rank: int, address: str, port: int
    ) -> None:
        """See `start_node`."""
        self.process = start_node(config, place, resources, rank, address, port)

    def stop(self) -> None:
        """SIGTERM, and SIGKILL after 10 s."""
        supervisor.stop(self.process, END_S)


def _peer(resources: TrialConfig, rank: int) -> Any:
    bundle = resources.bundle
    where = PlacementGroupSchedulingStrategy(get_current_placement_group(), placement_group_bundle_index=rank)
    options = {"num_cpus": bundle["CPU"], "num_gpus": bundle.get("GPU", 0), "scheduling_strategy": where}
    return ray.remote(NodeActor).options(**options).remote()
