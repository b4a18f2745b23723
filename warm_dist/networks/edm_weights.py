"""EDM's published weights in our network: the map between parameter names.

EDM's SongUNet (DDPM++, NCSN++) and DhariwalUNet (ADM) have one head and one level; the second head and the blur level's
map keep their initial values. Source: the state dicts of EDM's release (arXiv 2206.00364).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from warm_dist.errors import CheckpointError
from warm_dist.networks.blocks import Block
from warm_dist.networks.flat import adopt, publish, published
from warm_dist.networks.unet import UNet

_FOURIER = "map_noise.freqs"
_ATTENTION = {"attention.norm": "norm2", "attention.qkv": "qkv", "attention.proj": "proj"}


def edm_names(network: UNet) -> dict[str, str]:
    """Our name → EDM's, for every parameter that EDM has. The network may be on the meta device."""
    modules = dict(_modules(network))
    out = {}
    for tensor in published(network):
        layer, _, leaf = tensor.name.rpartition(".")
        ours, inside = layer, ""
        if layer not in modules:  # a layer of a block
            number = ".".join(layer.split(".")[:2])
            ours, inside = number, layer.removeprefix(f"{number}.")
        if ours in modules:
            inside = _ATTENTION.get(inside, inside)
            out[tensor.name] = ".".join(part for part in (modules[ours], inside, leaf) if part)
    return out


def _modules(network: UNet) -> Iterator[tuple[str, str]]:
    for name in ("map_label", "map_augment", "map_layer0", "map_layer1"):
        yield name, name
    resolution = network.resolution
    yield "stem", f"enc.{resolution}x{resolution}_conv"
    for k in range(len(network.pyramid)):
        halved = resolution >> (k + 1)
        yield f"pyramid.{k}.conv", f"enc.{halved}x{halved}_aux_residual"
    for part, blocks in (("encoder", network.encoder), ("decoder", network.decoder)):
        if part == "decoder":
            for k in range(2):
                yield f"middle.{k}", f"dec.{resolution}x{resolution}_in{k}"
        count = 0
        for k, block in enumerate(blocks):
            assert isinstance(block, Block)
            if block.mode:
                resolution, count = resolution // 2 if block.mode == "down" else resolution * 2, 0
            role = block.mode or f"block{count}"
            count += not block.mode
            yield f"{part}.{k}", f"{part[:3]}.{resolution}x{resolution}_{role}"
    ends = (
        ("out_norm", "out_conv")
        if network.adm
        else (f"dec.{resolution}x{resolution}_aux_{part}" for part in ("norm", "conv"))
    )
    yield from zip(("norm_out", "conv_out"), ends, strict=True)


@torch.no_grad()
def load_edm(network: UNet, state: Mapping[str, Tensor]) -> None:
    """Copy a published state dict into the network; the output convolution becomes the denoiser head.

    Keys may have the prefix "model."; filter buffers are ignored. Raises CheckpointError for missing or unknown keys or
    wrong shapes, and then changes nothing.
    """
    given = {key.removeprefix("model."): value for key, value in state.items() if not key.endswith("resample_filter")}
    weights, names = publish(network), edm_names(network)
    targets = {
        theirs: weights[ours][: network.channels] if ours.startswith("conv_out.") else weights[ours]
        for ours, theirs in names.items()
    }
    if network.fourier is not None:
        targets[_FOURIER] = network.fourier
    missing, unknown = sorted(targets.keys() - given.keys()), sorted(given.keys() - targets.keys())
    if missing or unknown:
        raise CheckpointError(
            f"these are not EDM's weights for this network: {len(missing)} keys missing ({', '.join(missing[:3])}), "
            f"{len(unknown)} unknown ({', '.join(unknown[:3])})"
        )
    for name, target in targets.items():
        if target.shape != given[name].shape:
            raise CheckpointError(f"{name} is {tuple(given[name].shape)}, this network needs {tuple(target.shape)}")
    if network.fourier is not None:
        network.fourier.copy_(given[_FOURIER])
    for ours, theirs in names.items():
        value = given[theirs].to(weights[ours])
        second = weights[ours][len(value) :]  # of conv_out, whose first head is EDM's
        weights[ours] = torch.cat([value, second])
    adopt(network, weights)
