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
from warm_dist.networks.unet import UNet

_FOURIER = "map_noise.freqs"
_ATTENTION = {"norm": "norm2", "qkv": "qkv", "proj": "proj"}


def edm_names(network: UNet) -> dict[str, str]:
    """Our name → EDM's, for every parameter that EDM has. The network may be on the meta device."""
    out = {}
    for ours, theirs in _modules(network):
        for name, _ in network.get_submodule(ours).named_parameters():
            head, _, leaf = name.rpartition(".")
            inside = {"attention." + key: value for key, value in _ATTENTION.items()}.get(head, head)
            out[f"{ours}.{name}"] = ".".join(part for part in (theirs, inside, leaf) if part)
    return out


def _modules(network: UNet) -> Iterator[tuple[str, str]]:
    for name in ("map_label", "map_augment", "map_layer0", "map_layer1"):
        if getattr(network, name) is not None:
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
    parameters = dict(network.named_parameters())
    targets: dict[str, Tensor] = {
        theirs: parameters[ours][: network.channels] if ours.startswith("conv_out.") else parameters[ours]
        for ours, theirs in edm_names(network).items()
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
    for name, target in targets.items():
        target.copy_(given[name])
