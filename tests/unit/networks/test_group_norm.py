"""Group normalization: the GPU's kernels, run by Triton's interpreter, and the plain code, against float64.

The interpreter computes with NumPy what one program after the other would on a GPU: the same sums, masks and addresses.
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from triton.backends.compiler import GPUTarget
from triton.runtime import interpreter
from triton.runtime.jit import JITFunction

from tests.support.paths import ROOT
from warm_dist import networks
from warm_dist.config.run import load_config
from warm_dist.networks import blocks, unet
from warm_dist.networks import group_norm as module
from warm_dist.networks import group_norm_kernels as kernels
from warm_dist.networks.group_norm import fused, group_norm, reference

FP32, BF16 = torch.float32, torch.bfloat16
# Relative errors of a whole tensor. A number in float32 is a few roundings of 2^-24 away. In bfloat16 it is rounded
# once: by 2^-8 at most, by 2^-7 in the interpreter, which truncates.
TOLERANCE = {FP32: 1e-6, BF16: 2**-7}
SHIPPED = ("cifar10", "ffhq64", "imagenet64", "lsun_church128", "quickstart")
PER_THREAD = (kernels.FORWARD_PER_THREAD, kernels.BACKWARD_PER_THREAD)
CONDITIONS = [(), ("before",), ("scale", "shift"), ("before", "scale", "shift"), ("scale",), ("shift",)]


@pytest.fixture(scope="module", autouse=True)
def interpreted() -> Iterator[None]:
    """Every kernel is interpreted, whenever it was decorated: TRITON_INTERPRET=1 had to be set before Triton's import."""

    def run(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        interpreter.InterpretedFunction(self.fn).run(*arguments, grid=grid, warmup=warmup, **options)

    def call(self: Any, *arguments: Any, **options: Any) -> Any:
        scope = interpreter._patch_lang(self.fn)  # which Triton's own call would leave patched
        try:
            return interpreter.InterpretedFunction(self.fn).rewrite()(*arguments, **options)
        finally:
            scope.restore()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "run", run)
        patch.setattr(JITFunction, "__call__", call)
        yield


def norm_shapes(name: str) -> set[tuple[int, int, int, int]]:
    """(channels, groups, H, W) of each normalization in the network of a shipped config."""
    config = load_config(ROOT / "configs" / f"{name}.json")
    found = set()

    def seen(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, **given: Any) -> Tensor:
        found.add((x.shape[1], groups, *x.shape[2:]))
        return group_norm(x, weight, bias, groups, eps, **given)

    with torch.device("meta"), torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "group_norm", seen)
        patch.setattr(unet, "group_norm", seen)
        network, size = unet.build(config).eval(), config.data.resolution
        network(torch.empty(1, config.data.channels, size, size), torch.empty(1), torch.empty(1))
    return found


class Case:
    """Arguments of a call and the gradient of its result, drawn from a seed."""

    def __init__(
        self,
        shape: tuple[int, int, int, int],
        groups: int,
        dtype: torch.dtype = FP32,
        given: tuple[str, ...] = (),
        silu: bool = True,
        parameters: torch.dtype = FP32,
    ) -> None:
        source = torch.Generator().manual_seed(0)

        def draw(*size: int) -> Tensor:
            return torch.randn(size, generator=source)

        batch, channels = shape[:2]
        # means and stds that differ between the channels: a mix-up of channels or groups shows
        x = draw(*shape) * (0.5 + draw(1, channels, 1, 1) ** 2) + draw(batch, channels, 1, 1)
        x = x.to(dtype).contiguous(memory_format=torch.channels_last)
        self.arguments = {"x": x, "weight": draw(channels).to(parameters), "bias": draw(channels).to(parameters)}
        self.arguments |= {name: draw(batch, channels).to(dtype) for name in given}
        self.gradient = draw(*shape).to(dtype).contiguous(memory_format=torch.channels_last)
        self.options: dict[str, Any] = {"groups": groups, "eps": 1e-5, "silu": silu}

    def run(self, function: Callable[..., Tensor], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """The result y and the gradient of every argument; dtype: of all arguments in place of their own."""
        leaves = {name: value.detach().to(dtype).requires_grad_() for name, value in self.arguments.items()}
        y = function(**leaves, **self.options)
        gradients = torch.autograd.grad(y, [*leaves.values()], self.gradient.to(y.dtype))
        return {"y": y.detach(), **dict(zip(leaves, gradients, strict=True))}

    def errors(self, function: Callable[..., Tensor]) -> dict[str, float]:
        """The relative error of each, against `exact`, as a share of what its type allows."""
        right = self.run(exact, torch.float64)
        return {
            name: float((value.double() - right[name]).norm() / right[name].norm()) / TOLERANCE[value.dtype]
            for name, value in self.run(function).items()
        }


def exact(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    silu: bool,
    before: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """The definition, as EDM writes it."""
    h = x if before is None else x + before[:, :, None, None]
    h = nn.functional.group_norm(h.contiguous(), groups, weight, bias, eps)
    h = h if scale is None else h * (1 + scale[:, :, None, None])
    h = h if shift is None else h + shift[:, :, None, None]
    return nn.functional.silu(h) if silu else h


@pytest.mark.parametrize("function", [fused, reference])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("silu", [True, False], ids=["silu", "linear"])
@pytest.mark.parametrize("given", CONDITIONS, ids="+".join)
def test_the_result_and_every_gradient(function, dtype, silu, given):
    """Odd sizes, groups of 6 channels in two blocks, more than one tile of pixels."""
    case = Case((2, 96, 5, 7), 16, dtype, given, silu)
    assert kernels.tile_for(96, 16, 35, kernels.FORWARD_PER_THREAD).groups < 16
    errors = case.errors(function)
    assert max(errors.values()) < 1, errors


def test_every_norm_of_the_shipped_networks(monkeypatch):
    """With its own tiles, on few pixels: one whole tile and a part of the next. Fault: a group over a tile's edge."""
    tile_for, seen = kernels.tile_for, set()
    for number, shape in enumerate(sorted(set().union(*map(norm_shapes, SHIPPED)))):
        channels, groups, height, width = shape
        tiles = {n: tile_for(channels, groups, height * width, n) for n in PER_THREAD}
        if tuple(tiles.values()) in seen:
            continue
        seen.add(tuple(tiles.values()))
        monkeypatch.setattr(kernels, "tile_for", lambda c, g, p, per_thread, tiles=tiles: tiles[per_thread])
        few = (1, channels, 1, max(tile.rows for tile in tiles.values()) + 3)
        errors = Case(few, groups, (BF16, FP32)[number % 2], CONDITIONS[number % 4]).errors(fused)
        assert max(errors.values()) < 1, (shape, errors)
    assert len(seen) > 20


@pytest.mark.parametrize(
    ("batch", "channels", "groups", "size"),
    [(2, 24, 6, 16), (3, 96, 24, 4), (1, 256, 32, 32), (2, 7, 1, 3), (1, 254, 1, 2), (2, 32, 4, 1)],
)
def test_full_sizes(batch, channels, groups, size):
    """One program or many, one pixel or many tiles, channels that no vector fits."""
    errors = Case((batch, channels, size, size), groups, given=("before",)).errors(fused)
    assert max(errors.values()) < 1, errors


@pytest.mark.parametrize("function", [fused, reference])
@pytest.mark.parametrize("large", ["x", "before", "both"])
def test_a_mean_of_ten_thousand_stds(function, large):
    """Fault: the variance as E[x²] - E[x]², which in float32 is off by 1e8 · 2^-24 = 6 variances."""
    case = Case((2, 32, 8, 8), 8, given=("before",))
    case.arguments["x"] = (case.gradient.flip(0) + (0 if large == "before" else 1e4)).contiguous(
        memory_format=torch.channels_last
    )
    case.arguments["before"] = case.arguments["before"] + {"x": 0, "before": 1e4, "both": -1e4}[large]
    right = case.run(exact, torch.float64)
    for name, value in case.run(function).items():
        # a mean near 1e4 is itself rounded by 2^-11 = 5e-4 stds
        assert float((value.double() - right[name]).abs().max() / right[name].abs().max()) < 2e-3, name


def test_a_channel_of_one_number_has_no_negative_variance():
    x = torch.full((1, 8, 4, 4), 0.1).contiguous(memory_format=torch.channels_last)
    for function in (fused, reference):
        y = function(x, torch.ones(8), torch.zeros(8), 2, 1e-6)
        assert float(y.abs().max()) < 1e-4


@pytest.mark.parametrize("parameters", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("function", [group_norm, fused])
def test_layout_and_types_are_kept(function, dtype, parameters):
    case = Case((2, 16, 4, 6), 4, dtype, ("before", "scale", "shift"), parameters=parameters)
    found = case.run(function)
    for name in ("y", "x"):
        assert found[name].is_contiguous(memory_format=torch.channels_last), name
        assert not found[name].is_contiguous(), name
    assert {name: value.dtype for name, value in found.items()} == {
        "y": dtype, **{name: value.dtype for name, value in case.arguments.items()}
    }  # fmt: skip


@pytest.mark.parametrize("function", [group_norm, fused])
def test_another_layout_is_brought_into_this_one(function):
    """Of the input, which `fused` leaves to `group_norm`, and of the gradient."""
    case = Case((2, 16, 4, 6), 4)
    right = case.run(function)
    case.gradient = case.gradient.contiguous()
    if function is group_norm:
        case.arguments["x"] = case.arguments["x"].contiguous()
    found = case.run(function)
    for name, value in right.items():
        torch.testing.assert_close(found[name], value, atol=1e-6, rtol=1e-5)  # sums in another order
    assert found["y"].stride() == right["y"].stride()


def test_a_processor_needs_no_triton(monkeypatch):
    """Fault: Triton is imported with the network, or for the sake of a type."""
    monkeypatch.setitem(sys.modules, "triton", None)  # its import raises
    monkeypatch.delitem(sys.modules, kernels.__name__)
    monkeypatch.delattr(networks, "group_norm_kernels")
    fresh = runpy.run_path(module.__file__)
    case = Case((1, 8, 4, 4), 2)
    assert torch.equal(case.run(fresh["group_norm"])["y"], case.run(group_norm)["y"])
    with pytest.raises(ImportError):
        case.run(fresh["fused"])


@pytest.fixture
def card(monkeypatch) -> None:
    """A GPU by name only, for torch's look into the kernels: it has Triton say what they write to."""
    target = SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32), get_current_device=lambda: 0)
    monkeypatch.setattr(triton.runtime.driver, "_active", target)


def test_the_operators_are_what_torch_expects(card):
    """Schemas, fake results with the right strides, gradients registered."""
    case = Case((2, 16, 4, 6), 4)
    x, gain, offset = (value.requires_grad_() for value in case.arguments.values())
    torch.library.opcheck(kernels.forward, (x, None, gain, offset, 4, 1e-5, True))
    _, mean, rstd = kernels.forward(x.detach(), None, gain.detach(), offset.detach(), 4, 1e-5, True)
    arguments = (case.gradient, x.detach(), None, gain.detach(), offset.detach(), mean, rstd, True)
    torch.library.opcheck(kernels.backward, arguments)


def test_it_compiles_to_one_graph_that_copies_no_input(card):
    """Both kernels are calls in the graphs, and torch finds out that they write to their results only."""
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return make_boxed_func(graph)

    case = Case((2, 64, 4, 6), 32, BF16, ("before", "scale", "shift"))
    right = case.run(fused)
    torch._dynamo.reset()
    compiled = torch.compile(fused, fullgraph=True, backend=aot_autograd(fw_compiler=keep, bw_compiler=keep))
    found = case.run(compiled)
    assert all(torch.equal(found[name], right[name]) for name in right)
    assert found["y"].stride() == right["y"].stride()
    written = [
        set(node.kwargs["tensors_to_clone"])
        for graph in graphs
        for node in graph.graph.nodes
        if "triton_kernel_wrapper" in str(node.target)
    ]
    assert written == [
        {"y_ptr", "mean_ptr", "rstd_ptr"}, {"dx_ptr", "dbefore_ptr", "dgain_ptr", "doffset_ptr"}
    ]  # fmt: skip
