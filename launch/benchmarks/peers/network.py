"""A peer's training step, measured round by round: `python launch/benchmarks/peers/network.py JOB`, started by launch/bench.py gpu.

Standalone: it runs in the peers' environment and imports nothing of ours. JOB is JSON. It answers with a line of JSON
once the peer is built and warm, and with another, a round's, to each line that it reads. Our own contenders are
measured by the same `Subject`.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable
from importlib.metadata import version
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.profiler import DeviceType, ProfilerActivity, profile

Job = dict[str, Any]
PROFILED = 3  # calls at most


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """The length of the union of intervals (start, end)."""
    total, reached = 0.0, -math.inf
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


class Subject:
    """One contender on its device, built and warm.

    make: builds it and returns one call of it: a training step, or a batch of samples. calls: of a round. warm_up: the
    calls that first_s, seconds, are of. state: bytes that it holds between calls. cached: whether no kernel of
    torch.compile was missing, neither in this process nor in the cache on disk. On a CPU memory and wait_share are None.
    """

    def __init__(
        self, make: Callable[[], Callable[[], object]], device: torch.device, calls: int, warm_up: int
    ) -> None:
        self.cuda, self.calls = device.type == "cuda", calls
        before, missing = self._allocated(), _missing()
        self.call = make()
        self.first_s = self._seconds(warm_up)
        self.state = self._allocated() - before
        self.cached = _missing() == missing

    def facts(self) -> dict[str, Any]:
        """What is measured once."""
        state = self.state if self.cuda else None
        return {"first_s": self.first_s, "state": state, "cached": self.cached, "wait_share": self.wait_share()}

    def round(self) -> dict[str, Any]:
        """Seconds a call, and the bytes at the peak that are this contender's own: allocated, less what others hold."""
        others = self._allocated() - self.state
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        if self.calls > 1:
            self._seconds(1)  # takes anew from the device what the allocator gave back after the round before
        seconds = self._seconds(self.calls) / self.calls
        peak = torch.cuda.max_memory_allocated() - others if self.cuda else None
        if self.cuda:
            torch.cuda.empty_cache()  # other contenders are in processes of their own
        return {"seconds": seconds, "peak": peak}

    def wait_share(self) -> float | None:
        """Share of the time in which the device runs no kernel and copies nothing; None if the profiler sees no kernel.

        Of calls that are profiled, whose launches take the host a little longer.
        """
        if not self.cuda:
            return None
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            seconds = self._seconds(min(self.calls, PROFILED))
        spans = [
            (event.time_range.start, event.time_range.end)
            for event in profiler.events() or ()
            if event.device_type == DeviceType.CUDA and not event.is_user_annotation
        ]
        return 1 - covered(spans) / (1e6 * seconds) if spans else None

    def _seconds(self, calls: int) -> float:
        """Of so many calls, until the device has done them."""
        self._wait()
        begun = time.perf_counter()
        for _ in range(calls):
            self.call()
        self._wait()
        return time.perf_counter() - begun

    def _wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def _allocated(self) -> int:
        return torch.cuda.memory_allocated() if self.cuda else 0


def _missing() -> int:
    """How many graphs torch.compile has not found in its cache so far, or could not look up."""
    from torch._dynamo.utils import counters

    return sum(int(counters["inductor"][f"fxgraph_cache_{how}"]) for how in ("miss", "bypass"))


class Peer(NamedTuple):
    """A network, its loss of (B, C, H, W) images in [0, 1], and its optimizer."""

    network: nn.Module
    loss: Callable[[Tensor], Tensor]
    optimizer: torch.optim.Optimizer


def diffusers(job: Job, device: torch.device) -> Peer:
    """UNet2DModel as diffusers' train_unconditional.py trains it: DDPM's noise, AdamW."""
    from diffusers import DDPMScheduler, UNet2DModel  # type: ignore[import-not-found,unused-ignore]

    attended = [width in job["attention"] for width in job["resolutions"]]
    network = UNet2DModel(
        sample_size=job["resolutions"][0],
        in_channels=job["image_channels"],
        out_channels=job["image_channels"],
        layers_per_block=job["num_blocks"],
        block_out_channels=job["widths"],
        down_block_types=["AttnDownBlock2D" if flag else "DownBlock2D" for flag in attended],
        up_block_types=["AttnUpBlock2D" if flag else "UpBlock2D" for flag in reversed(attended)],
        norm_num_groups=math.gcd(32, *job["widths"]),
    ).to(device)
    scheduler = DDPMScheduler(num_train_timesteps=1000)

    def loss(images: Tensor) -> Tensor:
        clean = 2 * images - 1
        noise, times = torch.randn_like(clean), torch.randint(0, 1000, (len(clean),), device=device)
        found = network(scheduler.add_noise(clean, noise, times), times).sample
        return nn.functional.mse_loss(found.float(), noise)

    return Peer(network, loss, torch.optim.AdamW(network.parameters(), lr=1e-4))


def denoising_diffusion_pytorch(job: Job, device: torch.device) -> Peer:
    """Unet in GaussianDiffusion, with noise as its objective and the Adam of its Trainer; it has two blocks a level."""
    from denoising_diffusion_pytorch import GaussianDiffusion, Unet  # type: ignore[import-not-found,unused-ignore]

    attended = tuple(width in job["attention"] for width in job["resolutions"])
    network = Unet(job["channels"], dim_mults=job["channel_mult"], channels=job["image_channels"],
                   full_attn=attended, flash_attn=True)  # fmt: skip
    diffusion = GaussianDiffusion(network, image_size=job["resolutions"][0], objective="pred_noise").to(device)
    return Peer(network, diffusion, torch.optim.Adam(diffusion.parameters(), lr=1e-4, betas=(0.9, 0.99)))


PEERS = {"diffusers": diffusers, "denoising_diffusion_pytorch": denoising_diffusion_pytorch}


def flops_per_image(network: nn.Module, image: Tensor) -> int:
    """Operations per image, forward and backward, counted as warm_dist/networks/flops.py does. image: (1, C, H, W)."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(image, torch.zeros(1, dtype=torch.long, device=image.device))
    return 3 * int(counter.get_total_flops())


def step_of(peer: Peer, images: Tensor) -> Callable[[], None]:
    """The step that both peers' own training programs take, in bf16 autocast; without their logging and averages."""

    def step() -> None:
        with torch.autocast(images.device.type, torch.bfloat16):
            loss = peer.loss(images)
        loss.backward()
        nn.utils.clip_grad_norm_(peer.network.parameters(), 1.0)
        peer.optimizer.step()
        peer.optimizer.zero_grad()

    return step


def main() -> None:
    job: Job = json.loads(sys.argv[1])
    device = torch.device(job["device"])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    size: dict[str, int] = {}

    def make() -> Callable[[], object]:
        peer = PEERS[job["peer"]](job, device)
        width = job["resolutions"][0]
        images = torch.rand(job["images"], job["image_channels"], width, width, device=device)
        size["parameters"] = sum(p.numel() for p in peer.network.parameters())
        size["flops_per_image"] = flops_per_image(peer.network, images[:1])
        if job["compiled"]:
            peer.network.compile()
        return step_of(peer, images)

    subject = Subject(make, device, job["calls"], job["warm_up"])
    versions = {name: version(name) for name in ("torch", "diffusers", "denoising-diffusion-pytorch")}
    print(json.dumps(subject.facts() | size | {"versions": versions}), file=answers, flush=True)
    for _ in sys.stdin:
        print(json.dumps(subject.round()), file=answers, flush=True)


if __name__ == "__main__":
    main()
