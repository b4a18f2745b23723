import pytest
import torch

from tests.processes import ROOT
from warm_dist.config import NetworkConfig
from warm_dist.config_file import load_config
from warm_dist.networks import UNet, num_parameters

TINY = {"channels": 16, "channel_mult": (1, 2), "num_blocks": 1, "attention_resolutions": (4,)}


def tiny(arch: str, classes: int = 0) -> UNet:
    torch.manual_seed(0)
    return UNet(NetworkConfig(arch=arch, **TINY), 8, 3, classes).eval()


def wake(network: UNet) -> UNet:
    """Give zero-initialised layers weights, so that nothing is hidden behind them."""
    for p in network.parameters():
        if float(p.detach().abs().max()) < 1e-2:
            torch.nn.init.normal_(p, std=0.1)
    return network


@pytest.mark.parametrize(("name", "published"), [("cifar10", 55.73e6), ("ffhq64", 61.80e6), ("imagenet64", 295.9e6)])
def test_parameter_counts_are_edms_up_to_the_second_head_and_level(name, published):
    c = load_config(ROOT / "configs" / f"{name}.json")
    with torch.device("meta"):
        count = num_parameters(UNet(c.network, c.data.resolution, 3, c.data.num_classes))
    extra = c.network.channels**2 + 3 * (c.network.channels * c.network.channel_mult[0] * 9 + 1)
    assert abs(count - extra - published) < 0.001 * published


@pytest.mark.parametrize("arch", ["ddpmpp", "adm"])
def test_two_heads_and_both_levels(arch):
    network = wake(tiny(arch))
    x, level = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([0.1, 0.7])
    with torch.no_grad():
        out = network(x, level, level)
        assert out.shape == (2, 6, 8, 8)
        assert not torch.allclose(out, network(x, level + 0.3, level))
        assert not torch.allclose(out, network(x, level, level + 0.3))
        torch.testing.assert_close(out[1:], network(x[1:], level[1:], level[1:]), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("arch", ["ddpmpp", "adm"])
def test_untrained_network_ignores_the_blur_level(arch):
    network = tiny(arch)
    x, level = torch.randn(1, 3, 8, 8), torch.zeros(1)
    with torch.no_grad():
        assert torch.equal(network(x, level, level), network(x, level, level + 1))


@pytest.mark.parametrize("arch", ["ddpmpp", "adm"])
def test_classes_matter_and_minus_one_is_none(arch):
    network = wake(tiny(arch, classes=4))
    x, level = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(1)), torch.zeros(1)
    with torch.no_grad():
        outs = [network(x, level, level, torch.tensor([label])) for label in (0, 3, -1)]
        assert not torch.allclose(outs[0], outs[1])
        assert not torch.allclose(outs[0], outs[2])
        assert torch.equal(outs[2], network(x, level, level, None))


def test_odd_widths_work():
    config = NetworkConfig(arch="ddpmpp", channels=24, channel_mult=(1, 2, 3), num_blocks=1)
    out = UNet(config, 8, 1, 0)(torch.zeros(1, 1, 8, 8), torch.zeros(1), torch.zeros(1))
    assert out.shape == (1, 2, 8, 8)
