"""Our networks against EDM's, whose forward passes are written out here by the names of their state dicts."""

import math

import pytest
import torch
from torch.nn.functional import (
    conv2d,
    conv_transpose2d,
    group_norm,
    linear,
    silu,
)

from tests.support.networks import weight
from tests.support.paths import ROOT
from warm_dist.config.run import NetworkConfig, load_config
from warm_dist.errors import CheckpointError
from warm_dist.networks import flat
from warm_dist.networks.edm_weights import edm_names, load_edm
from warm_dist.networks.unet import NUM_AUGMENT, UNet, num_parameters

CLASSES, RESOLUTION = 5, 8
HYPER = {"channels": 32, "channel_mult": (1, 2), "num_blocks": 2, "attention_resolutions": (4,)}


class Store(dict):
    """EDM's state dict: a tensor is drawn when its name is first asked for."""

    def __init__(self, meta: bool = False):
        super().__init__()
        self.meta, self.generator = meta, torch.Generator().manual_seed(0)

    def tensor(self, name, *shape):
        if name not in self:
            fan_in = math.prod(shape[1:]) if len(shape) > 1 else 10
            faint = 1e-3 if "8x8_conv" in name else 1.0  # the first layer's output, so that a norm's epsilon counts
            self[name] = (
                torch.empty(shape, device="meta")
                if self.meta
                else torch.randn(shape, generator=self.generator) / math.sqrt(fan_in) * faint
            )
        assert self[name].shape == shape
        return self[name]

    def linear(self, name, x, out, bias=True):
        b = self.tensor(f"{name}.bias", out) if bias else None
        return linear(x, self.tensor(f"{name}.weight", out, x.shape[-1]), b)

    def conv(self, name, x, out, size, padding=None):
        weight = self.tensor(f"{name}.weight", out, x.shape[1], size, size)
        return conv2d(x, weight, self.tensor(f"{name}.bias", out), padding=size // 2 if padding is None else padding)

    def norm(self, name, x, eps):
        c = x.shape[1]
        return group_norm(x, min(32, c // 4), self.tensor(f"{name}.weight", c), self.tensor(f"{name}.bias", c), eps)


def low_pass(taps, x, up):
    f = torch.tensor(taps, dtype=torch.float32, device=x.device)
    f = (f.outer(f) / f.sum() ** 2)[None, None].repeat(x.shape[1], 1, 1, 1)
    pad = (len(taps) - 1) // 2
    if up:
        return conv_transpose2d(x, f * 4, stride=2, padding=pad, groups=x.shape[1])
    return conv2d(x, f, stride=2, padding=pad, groups=x.shape[1])


def block(s, name, x, emb, out, song, taps, mode=None, attention=False):
    """EDM's UNetBlock."""
    eps = 1e-6 if song else 1e-5
    change = (lambda v: low_pass(taps, v, mode == "up")) if mode else (lambda v: v)
    h = s.conv(f"{name}.conv0", change(silu(s.norm(f"{name}.norm0", x, eps))), out, 3)
    params = s.linear(f"{name}.affine", emb, out if song else 2 * out)[:, :, None, None]
    if song:
        h = silu(s.norm(f"{name}.norm1", h + params, eps))
    else:
        scale, shift = params.chunk(2, dim=1)
        h = silu(shift + s.norm(f"{name}.norm1", h, eps) * (scale + 1))
    h = s.conv(f"{name}.conv1", h, out, 3)
    skip = change(x)
    if x.shape[1] != out or (mode and song):
        skip = s.conv(f"{name}.skip", skip, out, 1)
    gain = math.sqrt(0.5) if song else 1.0
    x = (h + skip) * gain
    if attention:
        heads = 1 if song else out // 64
        qkv = s.conv(f"{name}.qkv", s.norm(f"{name}.norm2", x, eps), 3 * out, 1)
        q, k, v = qkv.reshape(x.shape[0] * heads, out // heads, 3, -1).unbind(2)
        weight = torch.einsum("ncq,nck->nqk", q, k / math.sqrt(k.shape[1])).softmax(dim=2)
        a = torch.einsum("nqk,nck->ncq", weight, v)
        x = (s.conv(f"{name}.proj", a.reshape(x.shape), out, 1) + x) * gain
    return x


def edm(s, arch, hyper, x, c_noise, one_hot, augment):
    """EDM's SongUNet or DhariwalUNet, (B, C, H, W) → (B, C, H, W)."""
    song, ncsn = arch != "adm", arch == "ncsnpp"
    taps = (1, 3, 3, 1) if ncsn else (1, 1)
    base, mult = hyper["channels"], hyper["channel_mult"]
    width = 2 * base if ncsn else base
    if ncsn:
        angles = c_noise.outer(2 * math.pi * s.tensor("map_noise.freqs", width // 2))
    else:
        k = torch.arange(width // 2, device=x.device) / (width // 2 - (1 if song else 0))
        angles = c_noise.outer((1 / 10000) ** k)
    emb = torch.cat([angles.cos(), angles.sin()], dim=1)
    if song:
        emb = emb.reshape(len(emb), 2, -1).flip(1).reshape(emb.shape)
        if one_hot is not None:
            emb = emb + s.linear("map_label", one_hot * math.sqrt(one_hot.shape[1]), width)
    if augment is not None:
        emb = emb + s.linear("map_augment", augment, width, bias=False)
    emb = s.linear("map_layer1", silu(s.linear("map_layer0", emb, 4 * base)), 4 * base)
    if not song and one_hot is not None:
        emb = emb + s.linear("map_label", one_hot, 4 * base, bias=False)
    emb = silu(emb)
    image = x
    res, out = x.shape[-1], base if song else base * mult[0]
    x = s.conv(f"enc.{res}x{res}_conv", x, out, 3)
    skips = [x]
    for level, m in enumerate(mult):
        if level:
            res //= 2
            x = block(s, f"enc.{res}x{res}_down", x, emb, x.shape[1], song, taps, "down")
            if ncsn:
                f = torch.tensor(taps, dtype=torch.float32, device=x.device)
                f = (f.outer(f) / f.sum() ** 2)[None, None].repeat(x.shape[1], 1, 1, 1)
                image = s.conv(f"enc.{res}x{res}_aux_residual", image, x.shape[1], 3, padding=2)
                x = image = (x + conv2d(image, f, stride=2, groups=x.shape[1])) / math.sqrt(2)
            skips.append(x)
        for k in range(hyper["num_blocks"]):
            attention = res in hyper["attention_resolutions"]
            x = block(s, f"enc.{res}x{res}_block{k}", x, emb, base * m, song, taps, attention=attention)
            skips.append(x)
    x = block(s, f"dec.{res}x{res}_in0", x, emb, x.shape[1], song, taps, attention=True)
    x = block(s, f"dec.{res}x{res}_in1", x, emb, x.shape[1], song, taps)
    for level, m in reversed(list(enumerate(mult))):
        if level < len(mult) - 1:
            res *= 2
            x = block(s, f"dec.{res}x{res}_up", x, emb, x.shape[1], song, taps, "up")
        for k in range(hyper["num_blocks"] + 1):
            attention = res in hyper["attention_resolutions"] and (not song or k == hyper["num_blocks"])
            x = torch.cat([x, skips.pop()], dim=1)
            x = block(s, f"dec.{res}x{res}_block{k}", x, emb, base * m, song, taps, attention=attention)
    norm, conv = (f"dec.{res}x{res}_aux_norm", f"dec.{res}x{res}_aux_conv") if song else ("out_norm", "out_conv")
    return s.conv(conv, silu(s.norm(norm, x, 1e-6 if song else 1e-5)), image_channels, 3)


image_channels = 3


def inputs():
    generator = torch.Generator().manual_seed(1)
    x, augment = (torch.randn(*shape, generator=generator) for shape in ((3, 3, RESOLUTION, RESOLUTION), (3, 9)))
    return x, torch.tensor([-1.5, 0.1, 0.9]), torch.tensor([4, 0, -1]), augment


def one_hot(labels):
    return torch.nn.functional.one_hot(labels.clamp_min(0), CLASSES).float() * (labels >= 0)[:, None]


def published(arch):
    """Random weights under EDM's names, and what EDM's network makes of `inputs`."""
    hyper = {**HYPER, "channels": 64} if arch == "adm" else HYPER  # ADM's attention heads have 64 channels
    x, c_noise, labels, augment = inputs()
    state = Store()
    out = edm(state, arch, hyper, x, c_noise, one_hot(labels), augment)
    network = UNet(NetworkConfig(arch=arch, **hyper), RESOLUTION, 3, CLASSES, num_augment=NUM_AUGMENT).eval()
    return network, state, out


@pytest.mark.parametrize("arch", ["ddpmpp", "ncsnpp", "adm"])
def test_published_weights_give_edms_output_in_the_first_head(arch):
    network, state, expected = published(arch)
    second = weight(network, "conv_out.weight")[3:].clone()
    load_edm(
        network, {f"model.{key}": value for key, value in state.items()} | {"model.x.resample_filter": torch.ones(2)}
    )
    x, c_noise, labels, augment = inputs()
    with torch.no_grad():
        ours = network(x, c_noise, torch.tensor([0.0, 0.3, 1.0]), labels, augment)[:, :3]
        assert torch.equal(
            network(x, c_noise, c_noise, labels)[:, :3], network(x, c_noise, c_noise, labels, 0 * augment)[:, :3]
        )
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert torch.equal(weight(network, "conv_out.weight")[3:], second)
    assert not weight(network, "map_blur.weight").any()


@pytest.mark.parametrize("arch", ["ddpmpp", "ncsnpp", "adm"])
def test_other_weights_are_refused_and_nothing_changes(arch):
    network, state, _ = published(arch)
    before = {name: p.clone() for name, p in network.named_parameters()}
    key = "dec.8x8_block0.conv0.weight"
    for wrong, words in [
        ({k: v for k, v in state.items() if k != key}, f"1 keys missing \\({key}\\)"),
        (state | {"dec.8x8_block9.conv0.weight": state[key]}, r"1 unknown \(dec.8x8_block9"),
        (state | {key: state[key][:, :5]}, f"{key} is"),
        ({}, "keys missing"),
    ]:
        with pytest.raises(CheckpointError, match=words):
            load_edm(network, wrong)
    assert all(torch.equal(p, before[name]) for name, p in network.named_parameters())


@pytest.mark.parametrize(
    ("arch", "config", "augment", "millions"),
    [
        ("ddpmpp", "cifar10", NUM_AUGMENT, 55.7),
        ("ncsnpp", "cifar10", NUM_AUGMENT, 56.4),
        ("adm", "imagenet64", 0, 295.9),
    ],
)
def test_parameters_are_as_many_as_edms(arch, config, augment, millions):
    c = load_config(ROOT / "configs" / f"{config}.json", [f"network.arch={arch}"])
    size, classes = c.data.resolution, c.data.num_classes
    with torch.device("meta"):
        network = UNet(c.network, size, 3, classes, num_augment=augment)
        state = Store(meta=True)
        x, labels = torch.empty(1, 3, size, size), torch.empty(1, classes) if classes else None
        edm(state, arch, c.network.model_dump(), x, torch.empty(1), labels, torch.empty(1, 9) if augment else None)
    count = sum(value.numel() for key, value in state.items() if key != "map_noise.freqs")
    sizes = {tensor.name: tensor.piece.numel for tensor in flat.published(network)}
    second_head = (sizes["conv_out.weight"] + sizes["conv_out.bias"]) // 2
    assert num_parameters(network) == sum(sizes.values()) == count + second_head + sizes["map_blur.weight"]
    assert count / 1e6 == pytest.approx(millions, abs=0.05)
    assert set(edm_names(network).values()) == set(state) - {"map_noise.freqs"}
