"""The U-Nets: EDM's sizes, two heads, both noise levels, classes and augmentation labels."""

from __future__ import annotations

import pytest
import torch

from tests.support.networks import wake, weight
from tests.support.paths import ROOT
from warm_dist.config.run import NetworkConfig, load_config
from warm_dist.networks.blocks import positional
from warm_dist.networks.flat import published
from warm_dist.networks.unet import UNet, build, num_parameters

TINY = {"channels": 16, "channel_mult": (1, 2), "num_blocks": 1, "attention_resolutions": (4,)}


ARCHS = pytest.mark.parametrize("arch", ["ddpmpp", "ncsnpp", "adm"])


def tiny(arch: str, classes: int = 0) -> UNet:
    torch.manual_seed(0)
    return UNet(NetworkConfig(arch=arch, **TINY), 8, 3, classes).eval()


@pytest.mark.parametrize(("name", "published"), [("cifar10", 55.73e6), ("ffhq64", 61.80e6), ("imagenet64", 295.9e6)])
def test_parameter_counts_are_edms_up_to_the_second_head_and_level(name, published):
    c = load_config(ROOT / "configs" / f"{name}.json")
    with torch.device("meta"):
        count = num_parameters(UNet(c.network, c.data.resolution, 3, c.data.num_classes))
    extra = c.network.channels**2 + 3 * (c.network.channels * c.network.channel_mult[0] * 9 + 1)
    assert abs(count - extra - published) < 0.001 * published


@ARCHS
def test_two_heads_and_both_levels(arch):
    """Fault: the network ignores one of its levels, or an output depends on the other images of the batch."""
    network = wake(tiny(arch))
    x, level = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([0.1, 0.7])
    with torch.no_grad():
        out = network(x, level, level)
        assert out.shape == (2, 6, 8, 8)
        assert not torch.allclose(out, network(x, level + 0.3, level))
        assert not torch.allclose(out, network(x, level, level + 0.3))
        torch.testing.assert_close(out[1:], network(x[1:], level[1:], level[1:]), atol=1e-5, rtol=1e-4)


@ARCHS
def test_untrained_network_ignores_the_blur_level(arch):
    network = tiny(arch)
    x, level = torch.randn(1, 3, 8, 8), torch.zeros(1)
    with torch.no_grad():
        assert torch.equal(network(x, level, level), network(x, level, level + 1))


@ARCHS
def test_classes_matter_and_minus_one_is_none(arch):
    network = wake(tiny(arch, classes=4))
    x, level = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(1)), torch.zeros(1)
    with torch.no_grad():
        outs = [network(x, level, level, torch.tensor([label])) for label in (0, 3, -1)]
        assert not torch.allclose(outs[0], outs[1])
        assert not torch.allclose(outs[0], outs[2])
        assert torch.equal(outs[2], network(x, level, level, None))


def test_odd_widths_work():
    """Fault: group norms have min(32, C/4) groups where that does not divide the channels."""
    config = NetworkConfig(arch="ddpmpp", channels=24, channel_mult=(1, 2, 3), num_blocks=1)
    out = UNet(config, 8, 1, 0)(torch.zeros(1, 1, 8, 8), torch.zeros(1), torch.zeros(1))
    assert out.shape == (1, 2, 8, 8)


@ARCHS
def test_augmentation_labels_matter_and_none_is_zero(arch):
    network = wake(UNet(NetworkConfig(arch=arch, **TINY), 8, 3, 0, num_augment=9).eval())
    x, level = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(1)), torch.zeros(1)
    with torch.no_grad():
        plain = network(x, level, level)
        assert torch.equal(plain, network(x, level, level, None, torch.zeros(1, 9)))
        assert not torch.allclose(plain, network(x, level, level, None, torch.ones(1, 9)))


@ARCHS
def test_dropout_acts_in_training_alone(arch):
    plain, dropping = (UNet(NetworkConfig(arch=arch, **TINY, dropout=share), 8, 3, 0) for share in (0.0, 0.5))
    dropping.load_state_dict(wake(plain).state_dict())
    x, level = torch.randn(2, 3, 8, 8), torch.zeros(2)
    with torch.no_grad():
        trained = dropping(x, level, level)
        assert not torch.allclose(trained, dropping(x, level, level))
        torch.testing.assert_close(dropping.eval()(x, level, level), plain.eval()(x, level, level))


@ARCHS
def test_weights_are_drawn_as_edm_draws_them(arch):
    """Within ±g sqrt(6/(fan in + fan out)) (Xavier), in ADM with their biases ±g sqrt(3/fan in) (Kaiming, g² = 1/3)."""
    adm, faint = arch == "adm", 0.0 if arch == "adm" else 1e-5
    network = UNet(NetworkConfig(arch=arch, **TINY), 8, 3, 20, num_augment=9)
    gains = {"conv1.weight": faint, "proj.weight": faint, "conv_out.weight": faint, "map_blur.weight": 0.0}
    gains |= {"map_augment.weight": 0.0} if adm else {"qkv.weight": 0.2**0.5}
    for tensor in published(network):
        values, name = weight(network, tensor.name), tensor.name
        if name == "map_label.weight" and adm:
            assert float(values.std()) == pytest.approx(1, abs=0.1)  # 5 standard errors
        elif values.ndim > 1:
            gain = next((gain for end, gain in gains.items() if name.endswith(end)), 1 / 3**0.5 if adm else 1.0)
            fan_in, fan_out = values[0].numel(), values.numel() // values.shape[1]
            limit = gain * ((3 / fan_in) ** 0.5 if adm else (6 / (fan_in + fan_out)) ** 0.5)
            assert 0.9 * limit <= float(values.abs().max()) <= limit * 1.0001, name  # the largest of 200 or more
        elif name.endswith("bias") and not adm:
            assert not values.any(), name


def test_fourier_frequencies_need_no_checkpoint():
    """Fault: the frequencies depend on torch's seed, or are saved with the weights."""
    a, b = tiny("ncsnpp"), UNet(NetworkConfig(arch="ncsnpp", **TINY), 8, 3, 0)
    assert torch.equal(a.fourier, b.fourier)
    wide = UNet(NetworkConfig(arch="ncsnpp", **{**TINY, "channels": 64}), 8, 3, 0).fourier
    assert float(wide.std()) == pytest.approx(16, abs=5.6)  # 4 standard errors
    assert set(a.state_dict()) == {name for name, _ in a.named_parameters()}


@ARCHS
def test_activation_checkpointing_changes_no_gradient(arch):
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        network = wake(UNet(NetworkConfig(arch=arch, **TINY, dropout=0.3), 8, 3, 0)).train()
        network.checkpointing = checkpointing
        torch.manual_seed(5)
        x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
        network(x, torch.zeros(2), torch.ones(2)).square().mean().backward()
        gradients.append([p.grad for p in network.parameters() if p.grad is not None])
    assert len(gradients[0]) > 10  # one a block
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_build_follows_the_config():
    """Fault: a key of the config that changes the network is not handed to it."""
    path = ROOT / "configs" / "quickstart.json"
    one_head = build(load_config(path, ["process.preconditioning=per_frequency", "train.augment=0.1"]))
    assert len(weight(one_head, "conv_out.weight")) == 3
    assert weight(one_head, "map_augment.weight").shape[1] == 9
    two = build(load_config(path, ["parallel.activation_checkpointing=true"]))
    assert len(weight(two, "conv_out.weight")) == 6
    assert not any(tensor.name.startswith("map_augment") for tensor in published(two))
    assert two.checkpointing


@ARCHS
@pytest.mark.parametrize("channels", [4, 6, 62, 126, 192])
def test_a_network_that_the_config_takes_can_be_run(arch, channels):
    """Fault: a number of channels is accepted that embeddings, groups or attention heads cannot share; or gives NaN."""
    config = NetworkConfig(arch=arch, channels=channels, channel_mult=(1, 2), num_blocks=1, attention_resolutions=(2,))
    config.check_heads(4)
    with torch.device("meta"):
        network = UNet(config, 4, 3, 0).to("meta")
        assert network(torch.zeros(1, 3, 4, 4), torch.zeros(1), torch.zeros(1)).shape == (1, 6, 4, 4)
    assert positional(torch.ones(1), network.noise_channels, endpoint=arch != "adm").isfinite().all()
