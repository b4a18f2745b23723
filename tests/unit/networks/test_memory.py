"""Memory followed on fake tensors: counts made by hand, and what a real pass allocates."""

from __future__ import annotations

import pytest
import torch

from tests.support.paths import ROOT
from warm_dist.config.run import Config, load_config
from warm_dist.networks.memory import Meter, forward_bytes_per_image, inputs, planned
from warm_dist.networks.unet import build


def config(*changes: str) -> Config:
    network = [
        'network={"arch": "ddpmpp", "channels": 16, "channel_mult": [1, 2], "num_blocks": 1, "attention_resolutions": [8]}'
    ]
    return load_config(ROOT / "configs" / "quickstart.json", ["data.resolution=16", *network, *changes])


def test_the_peak_counts_what_is_alive_at_once():
    """Fault: a view counts again, what was freed still counts, or what was there before does."""
    given = torch.zeros(1000)
    with Meter([given]) as meter:
        given.view(10, 100).add_(1)
        a = given + 1
        b = a.view(-1) * 2
        del a
        c = b + 1
        del b, c
    assert [live for live, _ in meter.history] == [4000, 8000, 8000]
    assert meter.live == 0


@pytest.mark.parametrize("arch", ["ddpmpp", "ncsnpp", "adm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fake_tensors_take_what_real_ones_take(arch, dtype):
    """Fault: an operation behaves otherwise on fake tensors, and its memory is forgotten or made up."""
    settings = config(f"network.arch={arch}")
    with planned(settings, "cpu", dtype) as (network, fake):
        network(*inputs(settings, 8)).float().sum().backward()
    network = build(settings)
    network.dtype = dtype
    with Meter(network.parameters()) as real:
        network(*inputs(settings, 8)).float().sum().backward()
    assert max(fake.history)[0] == pytest.approx(max(real.history)[0], rel=0.01)  # a cached matrix or a buffer's copy


def test_a_gpu_keeps_no_intermediate_of_a_normalization():
    """Fault: the prediction for a GPU is that of the plain code, which takes about 3 times as much."""
    peaks = {}
    for device in ("cpu", "cuda"):
        with planned(config(), device, torch.float32) as (network, meter):
            network(*inputs(config(), 8)).sum().backward()
        peaks[device] = max(meter.history)[0]
    assert peaks["cuda"] < 0.7 * peaks["cpu"]


def test_compiling_keeps_less_and_recomputing_least():
    """Fault: what a compiled block fuses counts as memory, or its graphs keep what they were made with."""
    peaks = {}
    for name, changes in (("", ()), ("again", ("parallel.activation_checkpointing=true",))):
        for compiled in (False, True):
            settings = config("network.attention_resolutions=[]", "network.channel_mult=[1]", *changes)
            with planned(settings, "cuda", torch.float32, compiled=compiled) as (network, meter):
                network.train()(*inputs(settings, 64)).sum().backward()
                gradients = sum(4 * p.numel() for p in network.parameters())
            assert meter.live == pytest.approx(gradients, rel=0.2)  # nothing of the activations is left
            peaks[name, compiled] = max(meter.history)[0]
    assert 0.5 * peaks["", False] < peaks["", True] < peaks["", False]
    assert peaks["again", True] < 0.6 * peaks["", True]


def test_an_image_takes_what_a_batch_takes_less_the_weights():
    """Fault: the share of the weights' cast is counted for every image, or gradients are kept."""
    found = forward_bytes_per_image(config(), "cpu")
    network = build(config()).eval()
    with Meter(network.parameters()) as meter, torch.no_grad():
        network(*inputs(config(), 24))
    assert 24 * found == pytest.approx(max(meter.history)[0], rel=0.05)
    assert forward_bytes_per_image(config(), dtype=torch.bfloat16) < 0.6 * forward_bytes_per_image(config())
