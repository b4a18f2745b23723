"""One flat tensor for all parameters of a module, and its views under their published names.

An optimizer, a ZeRO stage and an average then handle one tensor a block instead of a dozen. Convolutions lie in it
channels-last, which is the order their kernels read. Files keep EDM's names, shapes and orders: `publish` and `adopt`
convert.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Piece(NamedTuple):
    """A published tensor of `shape` inside a flat one: it is viewed as `split`, its axes are put in the order `axes`.

    name: inside its module, such as "conv0.weight". used: the shape in which the module computes with it.
    """

    name: str
    shape: tuple[int, ...]
    split: tuple[int, ...]
    axes: tuple[int, ...]
    used: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def adopt(self, tensor: Tensor) -> Tensor:
        """A published tensor → its elements in the flat order."""
        return tensor.reshape(self.split).permute(self.axes).reshape(-1)

    def publish(self, part: Tensor) -> Tensor:
        """The inverse of `adopt`: a part of the flat tensor → the published tensor, a copy where the orders differ."""
        inverse = [self.axes.index(axis) for axis in range(len(self.axes))]
        return part.view([self.split[axis] for axis in self.axes]).permute(inverse).reshape(self.shape).contiguous()


def _piece(name: str, p: Tensor, num_heads: int) -> Piece:
    shape = tuple(p.shape)
    split, axes, used = shape, tuple(range(len(shape))), shape
    if ".qkv." in f".{name}":
        # EDM orders the rows (head, channel, qkv); in (qkv, head, channel) each of the three is contiguous
        split, axes = (num_heads, shape[0] // 3 // num_heads, 3, *shape[1:2]), (2, 0, 1, 3)[: len(shape[:2]) + 2]
        used = shape[:2]
    elif len(shape) == 4 and shape[2:] == (1, 1):
        split, axes, used = shape[:2], (0, 1), shape[:2]
    elif len(shape) == 4:
        axes, used = (0, 2, 3, 1), (shape[0], *shape[2:], shape[1])
    return Piece(name, shape, split, axes, used)


class Flat(nn.Module):
    """A module whose parameters are views of one parameter, `flat`.

    A subclass makes its layers as usual and calls `flatten` at the end of its __init__; in `forward`, inside `keeping`,
    it takes the tensors by `views`.
    """

    flat: nn.Parameter
    pieces: tuple[Piece, ...]
    regathered = False
    """Whether the weights are gathered anew for the backward pass (ZeRO stage 3, a large network): the forward's must go."""

    def flatten(self, layers: Mapping[str, nn.Module], num_heads: int = 1) -> None:
        """Take over the layers' parameters, named LAYER.PARAMETER, in the layers' order.

        num_heads: of attention, which the order of the layer "qkv" depends on.
        """
        found = [(f"{layer}.{name}", p) for layer, module in layers.items() for name, p in module.named_parameters()]
        self.pieces = tuple(_piece(name, p, num_heads) for name, p in found)
        self.flat = nn.Parameter(
            torch.cat([piece.adopt(p.detach()) for piece, (_, p) in zip(self.pieces, found, strict=True)])
        )

    def keeping(self) -> AbstractContextManager[object]:
        """The context of a forward pass: autograd keeps the weights, or not if they are gathered anew for it."""
        return released(self.flat) if self.regathered else nullcontext()


def released(flat: Tensor) -> AbstractContextManager[object]:
    """Inside, autograd notes which part of `flat` a tensor is instead of keeping it, and takes that part when needed.

    Without this the views of a gathered parameter would keep all of it in memory from the forward to the backward pass.
    """
    first, storage = int(flat.storage_offset()), flat.untyped_storage()._cdata

    def pack(tensor: Tensor) -> Tensor | tuple[torch.Size, tuple[int, ...], int]:
        if tensor.untyped_storage()._cdata != storage:  # not its base: a compiled graph saves views made anew
            return tensor
        return tensor.shape, tensor.stride(), int(tensor.storage_offset()) - first

    def unpack(packed: Tensor | tuple[torch.Size, tuple[int, ...], int]) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        shape, stride, offset = packed
        whole = flat.detach()
        return whole.as_strided(shape, stride, int(whole.storage_offset()) + offset)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def views(flat: Tensor, pieces: tuple[Piece, ...]) -> dict[str, Tensor]:
    """The tensors to compute with, by name; convolutions (O, I, h, w) in channels-last memory, no copies.

    One split, so that the gradient of `flat` is one concatenation.
    """
    parts = flat.split([piece.numel for piece in pieces])
    out = {}
    for piece, part in zip(pieces, parts, strict=True):
        tensor = part.view(piece.used) if len(piece.used) > 1 else part
        out[piece.name] = tensor.permute(0, 3, 1, 2) if len(piece.used) == 4 else tensor
    return out


class Published(NamedTuple):
    """A published tensor: its name in the network, the flat parameter that holds it, and from which element on."""

    name: str
    flat: str
    start: int
    piece: Piece

    @property
    def stop(self) -> int:
        """The element of the flat parameter after the last one."""
        return self.start + self.piece.numel


def published(network: nn.Module) -> Iterator[Published]:
    """Every published tensor, in the order of the flat parameters. The network may be on the meta device."""
    for prefix, module in network.named_modules():
        if isinstance(module, Flat):
            dot, start = f"{prefix}." if prefix else "", 0
            for piece in module.pieces:
                yield Published(dot + piece.name, f"{dot}flat", start, piece)
                start += piece.numel


def publish(network: nn.Module, flats: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The weights by published names. flats: by parameter names, (n,) each; None: the network's own, detached."""
    if flats is None:
        flats = {name: p.detach() for name, p in network.named_parameters()}
    return {p.name: p.piece.publish(flats[p.flat].view(-1)[p.start : p.stop]) for p in published(network)}


@torch.no_grad()
def adopt(network: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Load published weights, all of them.

    Raises ValueError, and changes nothing, if one is missing, unknown or of another shape.
    """
    flats, wanted = dict(network.named_parameters()), list(published(network))
    if wrong := sorted({p.name for p in wanted} ^ tensors.keys()):
        raise ValueError(f"{len(wrong)} tensors are missing or unknown, first {wrong[0]}")
    for p in wanted:
        if tuple(tensors[p.name].shape) != p.piece.shape:
            raise ValueError(f"{p.name} is {tuple(tensors[p.name].shape)}, this network needs {p.piece.shape}")
    for p in wanted:
        flats[p.flat][p.start : p.stop] = p.piece.adopt(tensors[p.name])
