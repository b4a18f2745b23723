"""Parameters that lie in one flat tensor, their published names and orders, and the layout of what is computed."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch.utils._pytree import tree_leaves

from tests.support.networks import scaled, wake, weight
from warm_dist.config.run import NetworkConfig
from warm_dist.networks import blocks
from warm_dist.networks.blocks import Block, BlockOptions
from warm_dist.networks.flat import Flat, adopt, publish, published, released, views
from warm_dist.networks.unet import UNet

ARCHS = pytest.mark.parametrize("arch", ["ddpmpp", "ncsnpp", "adm"])
CHANNELS_LAST = torch.channels_last


def network(arch: str) -> UNet:
    """With two heads of attention in ADM."""
    torch.manual_seed(0)
    channels = 64 if arch == "adm" else 16
    config = NetworkConfig(
        arch=arch, channels=channels, channel_mult=(1, 2), num_blocks=1, attention_resolutions=(4,)
    )  # fmt: skip
    return wake(UNet(config, 8, 3, 5, num_augment=9))


class Layers(Flat):
    def __init__(self, **layers: nn.Module) -> None:
        super().__init__()
        self.flatten(layers, num_heads=2)


@ARCHS
def test_published_weights_come_back_as_they_were(arch):
    """Fault: an order is turned once more in one direction than in the other."""
    one, other = network(arch), network(arch)
    drawn = {name: torch.randn_like(value) for name, value in publish(one).items()}
    adopt(other, drawn)
    assert all(torch.equal(value, drawn[name]) for name, value in publish(other).items())
    assert sum(value.numel() for value in drawn.values()) == sum(p.numel() for p in other.parameters())
    assert len(list(other.parameters())) == sum(isinstance(module, Flat) for module in other.modules())


def test_a_convolution_lies_channels_last_and_is_seen_as_it_is_published():
    layer = nn.Conv2d(3, 4, 3)
    flat = Layers(conv=layer)
    seen = views(flat.flat, flat.pieces)["conv.weight"]
    assert torch.equal(seen, layer.weight)
    assert seen.is_contiguous(memory_format=CHANNELS_LAST)
    assert seen.untyped_storage().data_ptr() == flat.flat.untyped_storage().data_ptr()
    assert torch.equal(flat.flat[: seen.numel()], layer.weight.permute(0, 2, 3, 1).flatten())


def test_attention_s_rows_are_ordered_by_query_key_and_value():
    """EDM's row h·(3 d) + 3 c + k, of head h, channel c of d and k of (q, k, v), becomes row k·(2 d) + h·d + c."""
    d, layer = 2, nn.Conv2d(4, 12, 1)
    flat = Layers(**{"attention.qkv": layer})
    seen = views(flat.flat, flat.pieces)
    for head in range(2):
        for channel in range(d):
            for k in range(3):
                theirs, ours = head * 3 * d + 3 * channel + k, k * 2 * d + head * d + channel
                assert torch.equal(seen["attention.qkv.weight"][ours], layer.weight[theirs, :, 0, 0])
                assert seen["attention.qkv.bias"][ours] == layer.bias[theirs]


def test_gradients_of_the_views_make_that_of_the_flat_tensor():
    flat = Layers(conv=nn.Conv2d(2, 3, 3), linear=nn.Linear(3, 2))
    w = views(flat.flat, flat.pieces)
    factors = {name: torch.randn(value.shape) for name, value in w.items()}
    sum((value * factors[name]).sum() for name, value in w.items()).backward()
    gradients = publish(flat, {"flat": flat.flat.grad})
    assert all(torch.equal(value, factors[name]) for name, value in gradients.items())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: w.pop("stem.bias"), "1 tensors are missing or unknown, first stem.bias"),
        (lambda w: w.update(other=torch.zeros(1)), "first other"),
        (lambda w: w.update({"stem.bias": torch.zeros(7)}), r"stem.bias is \(7,\), this network needs \(16,\)"),
    ],
)
def test_other_weights_are_refused_and_nothing_changes(change, words):
    mine = network("ddpmpp")
    before = [p.clone() for p in mine.parameters()]
    weights = {name: value + 1 for name, value in publish(mine).items()}
    change(weights)
    with pytest.raises(ValueError, match=words):
        adopt(mine, weights)
    assert all(torch.equal(p, was) for p, was in zip(mine.parameters(), before, strict=True))


def test_parts_are_taken_anew_where_a_parameter_s_memory_is_another_s_meanwhile():
    """As stage 3 does: after the forward pass the parameter is empty, for the backward it is there again, elsewhere."""
    layer = Layers(linear=nn.Linear(4, 3))
    x, values = torch.randn(2, 4, requires_grad=True), layer.flat.detach().clone()
    with released(layer.flat):
        w = views(layer.flat, layer.pieces)
        out = nn.functional.linear(x, w["linear.weight"], w["linear.bias"])
    layer.flat.data.fill_(torch.nan)
    layer.flat.data = values
    out.sum().backward()
    assert torch.equal(x.grad, weight(layer, "linear.weight").sum(0).expand(2, 4))


@ARCHS
@pytest.mark.parametrize("mode", [None, "up", "down"])
def test_whatever_a_convolution_reads_or_makes_is_channels_last(arch, mode, monkeypatch):
    """Fault: an operation returns NCHW, so that a convolution, forward or backward, turns its tensors around."""
    monkeypatch.setattr(blocks, "group_norm", scaled)
    block = Block(64, 128, BlockOptions(arch, 32, dropout=0.1), mode=mode, num_heads=2 if arch == "adm" else 1).train()
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph, _):
        graphs.append(graph)
        return make_boxed_func(graph)

    torch._dynamo.reset()
    compiled = torch.compile(
        block.compute, dynamic=False, fullgraph=True, backend=aot_autograd(fw_compiler=keep, bw_compiler=keep)
    )
    x = torch.randn(2, 64, 8, 8).contiguous(memory_format=CHANNELS_LAST).requires_grad_()
    out = compiled(block.flat, x, torch.randn(2, 32, requires_grad=True))
    out.backward(torch.ones_like(out))
    convolutions = [node for graph in graphs for node in graph.graph.nodes if "convolution" in str(node.target)]
    turned = [
        f"{node.target}: {tuple(value.shape)} {value.stride()}"
        for node in convolutions
        for value in tree_leaves([node.meta["val"], [arg.meta["val"] for arg in node.all_input_nodes]])
        if isinstance(value, torch.Tensor)
        and value.ndim == 4
        and 0 not in value.stride()
        and not value.is_contiguous(memory_format=CHANNELS_LAST)
    ]
    assert len(convolutions) >= 4  # two, forward and backward; NCSN++'s filter is one number expanded, in any layout
    assert not turned, "\n".join(turned)
    assert not [node for graph in graphs for node in graph.graph.nodes if node.target == torch.ops.aten.clone.default
                and node.kwargs.get("memory_format") == torch.contiguous_format and node.meta["val"].ndim == 4
                and node.meta["val"].shape[1] in (64, 128)]  # fmt: skip
    assert out.is_contiguous(memory_format=CHANNELS_LAST)
    assert x.grad.is_contiguous(memory_format=CHANNELS_LAST)


@ARCHS
def test_the_output_of_the_network_is_channels_last(arch):
    mine = network(arch)
    out = mine(torch.randn(2, 3, 8, 8), torch.zeros(2), torch.zeros(2))
    assert out.is_contiguous(memory_format=CHANNELS_LAST)
    assert {tensor.name for tensor in published(mine)} == publish(mine).keys()
