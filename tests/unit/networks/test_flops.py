"""Operations of a step: counts made by hand, and devices found by their names."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.support.paths import ROOT
from warm_dist.config.run import Config, load_config
from warm_dist.networks.blocks import attend
from warm_dist.networks.flops import flops_per_image, known_peak, peak_flops
from warm_dist.networks.unet import build


def config(*changes: str) -> Config:
    """EDM's DDPM++ at 8x8 with one level of 16 channels: few enough layers to count them by hand."""
    network = [
        'network={"arch": "ddpmpp", "channels": 16, "channel_mult": [1], "num_blocks": 1, "attention_resolutions": []}'
    ]
    small = ["data.resolution=8", *network]
    return load_config(ROOT / "configs" / "quickstart.json", [*small, *changes])


def by_hand(classes: int = 0, augment: bool = False) -> int:
    """Multiply-adds of that network's forward: stem, one encoder block, two in the middle, two in the decoder."""
    area, c, emb = 64, 16, 64

    def conv(a: int, b: int, size: int) -> int:
        return area * a * b * size**2

    def block(a: int, b: int) -> int:
        return conv(a, b, 3) + conv(b, b, 3) + emb * b + (conv(a, b, 1) if a != b else 0)

    embedding = c * c + c * emb + emb * emb + classes * c + (9 * c if augment else 0)
    attention = conv(c, 3 * c, 1) + 2 * area * area * c + conv(c, c, 1)
    blocks = block(c, c) + 2 * block(c, c) + attention + 2 * block(2 * c, c)
    return embedding + conv(3, c, 3) + blocks + conv(c, 6, 3)


def test_the_count_is_that_of_every_layer():
    assert flops_per_image(config()) == 6 * by_hand()
    # no layer is forgotten because its input is optional
    assert flops_per_image(config("data.num_classes=7", "train.augment=0.1")) == 6 * by_hand(7, augment=True)


def test_recomputation_and_precision_do_not_count():
    again = ["parallel.activation_checkpointing=true", "parallel.precision=bf16", "network.dropout=0.5"]
    assert flops_per_image(config(*again)) == flops_per_image(config())


@pytest.mark.parametrize("heads", [1, 4])
def test_attention_is_two_products_a_head(heads):
    n, c, batch = 5 * 3, 32, 2
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        shapes = {"norm.weight": (c,), "norm.bias": (c,), "qkv.weight": (3 * c, c), "qkv.bias": (3 * c,)}
        shapes |= {"proj.weight": (c, c), "proj.bias": (c,)}
        weights = {f"attention.{name}": torch.empty(shape) for name, shape in shapes.items()}
        attend(torch.empty(batch, c, 5, 3), weights, heads, 8, 1e-6)
    # q kᵀ and its product with v cost n² c multiply-adds each, whatever the number of heads; qkv and proj 3 and 1 n c²
    assert counter.get_total_flops() == 2 * batch * (2 * n * n * c + 4 * n * c * c)


@pytest.mark.parametrize("arch", ["ddpmpp", "ncsnpp", "adm"])
def test_the_meta_device_counts_what_a_real_one_computes(arch):
    settings = config(
        f"network.arch={arch}", "network.channel_mult=[1, 2]", "network.attention_resolutions=[8]", "data.num_classes=4"
    )
    network = build(settings).eval()
    three = (torch.zeros(3, 3, 8, 8), torch.zeros(3), torch.zeros(3), torch.tensor([0, -1, 3]))
    # the processor's fused attention is not known to the counter: have it done as plain products
    with (
        torch.no_grad(),
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
    ):
        network(*three)
    assert flops_per_image(settings) == counter.get_total_flops()  # 3 x one image = 1 x three images


def test_the_counts_of_the_shipped_networks():
    """Fault: a change of a network, or of a shipped config, makes training more expensive, and nobody notices."""
    # what `flops_per_image(load_config(...))` gave when this was written, in 1e9 operations
    found = {
        name: flops_per_image(load_config(ROOT / "configs" / f"{name}.json")) for name in ("cifar10", "imagenet64")
    }
    assert {name: round(count / 1e9, 1) for name, count in found.items()} == {"cifar10": 127.2, "imagenet64": 658.1}


@pytest.mark.parametrize(
    ("name", "bf16", "fp32"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4e12, 494.7e12),
        ("NVIDIA H100 PCIe", 756e12, 378e12),
        ("NVIDIA H100 NVL", 835.5e12, 417.5e12),
        ("NVIDIA H200", 989.4e12, 494.7e12),
        ("NVIDIA A100-SXM4-80GB", 312e12, 156e12),
        ("NVIDIA A100 80GB PCIe", 312e12, 156e12),
        ("NVIDIA A10", 125e12, 62.5e12),
        ("NVIDIA L40S", 362e12, 183e12),
        ("NVIDIA GeForce GTX 1080", None, None),
    ],
)
def test_devices_are_found_by_name(name, bf16, fp32):
    """Fault: part of a name decides: 'A10' also finds the A100, and a PCIe card gets the peak of SXM."""
    assert (known_peak(name, "bf16"), known_peak(name, "fp32")) == (bf16, fp32)


def test_the_configured_peak_wins_and_a_processor_has_none():
    cpu = torch.device("cpu")
    assert peak_flops(config(), cpu) is None
    assert peak_flops(config("parallel.peak_flops=5e9"), cpu) == 5e9
