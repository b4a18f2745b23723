"""The network on a GPU, skipped loudly without one; what Triton and inductor make of it is looked at anyway."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import triton
from torch import Tensor
from torch._inductor import cpu_vec_isa
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.utils import run_and_get_code
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tests.support.networks import scaled, wake
from tests.support.paths import ROOT
from tests.support.tiny_run import config, info, steps
from warm_dist.checkpoints.weights import Model
from warm_dist.config.run import SamplerConfig, load_config
from warm_dist.distributed.world import join, shutdown
from warm_dist.evaluation.generate import generate
from warm_dist.networks import blocks
from warm_dist.networks import group_norm_kernels as kernels
from warm_dist.networks.blocks import Block, BlockOptions
from warm_dist.networks.compiled import compile_blocks
from warm_dist.networks.group_norm import group_norm, reference
from warm_dist.networks.unet import build_network
from warm_dist.training.trainer import Trainer

gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="NO CUDA DEVICE: the kernels' results on a GPU are not tested here"
)
FP32_POINTERS = {"gain_ptr", "offset_ptr", "mean_ptr", "rstd_ptr", "dbefore_ptr", "dgain_ptr", "doffset_ptr"}


def compiled(kernel: Any, dtype: str, tile: kernels.Tile, before: bool) -> str:
    """The kernel's PTX for an H100, its arguments divisible by 16 as those of the shipped networks are."""
    constants = {**tile.constants(), "BEFORE": before, "SILU": True}
    options = {"num_warps": constants.pop("num_warps")}
    types = {
        name: "constexpr" if name in constants
        else ("*fp32" if name in FP32_POINTERS else f"*{dtype}") if name.endswith("_ptr")
        else "fp32" if name == "eps" else "i32"
        for name in kernel.arg_names
    }  # fmt: skip
    divisible = {
        (n,): [["tt.divisibility", 16]] for n, name in enumerate(types) if types[name] not in ("constexpr", "fp32")
    }
    values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, types, constexprs=values, attrs=divisible)
    return str(triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"])


def registers_and_spills(ptx: str, folder: Path) -> tuple[int, int]:
    """A thread's registers, and the bytes that it has to keep in memory for the lack of more."""
    (folder / "kernel.ptx").write_text(ptx)
    ptxas = [triton.knobs.nvidia.ptxas.path, "-v", "--gpu-name", "sm_90a", "-o", "/dev/null", "kernel.ptx"]
    told = subprocess.run(ptxas, cwd=folder, check=True, capture_output=True, text=True).stderr
    return int(re.search(r"Used (\d+) registers", told)[1]), int(re.search(r"(\d+) bytes spill stores", told)[1])


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize(
    ("channels", "pixels", "before"),
    [(192, 64**2, False), (256, 32**2, False), (256, 32**2, True), (768, 8**2, False), (960, 32**2, False)],
)
def test_the_kernels_compile_and_keep_all_in_registers(channels, pixels, before, dtype, tmp_path, monkeypatch):
    """Fault: a tile so large that its sums go through memory, or that no second program has room on a multiprocessor."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    for kernel, per_thread in (
        (kernels._forward, kernels.FORWARD_PER_THREAD),
        (kernels._backward, kernels.BACKWARD_PER_THREAD),
    ):
        tile = kernels.tile_for(channels, 32, pixels, per_thread)
        ptx = compiled(kernel, dtype, tile, before)
        assert re.search(r"ld\.global\S*\.v[24]\.", ptx), "numbers are read one by one"
        registers, spilled = registers_and_spills(ptx, tmp_path)
        assert spilled == 0
        assert 2 * registers * 32 * tile.warps <= 65536, (kernel, registers)  # what a multiprocessor has


def gradients(function: Any, arguments: dict[str, Tensor], gradient: Tensor, **options: Any) -> dict[str, Tensor]:
    leaves = {name: value.detach().requires_grad_() for name, value in arguments.items()}
    y = function(**leaves, **options)
    found = torch.autograd.grad(y, [*leaves.values()], gradient.to(y.dtype))
    return {"y": y.detach(), **dict(zip(leaves, found, strict=True))}


@gpu
@needs_gpu
@pytest.mark.parametrize("compile_it", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("shape", "groups", "given", "silu"),
    [
        ((3, 256, 32, 32), 32, ("before",), True),
        ((2, 192, 64, 64), 32, ("scale", "shift"), True),
        ((2, 960, 16, 16), 32, (), True),
        ((2, 256, 16, 16), 32, (), False),
        ((5, 24, 5, 7), 6, ("before", "scale", "shift"), True),
    ],
)
def test_the_kernels_give_what_the_plain_code_gives(shape, groups, given, silu, dtype, compile_it):
    torch.manual_seed(0)
    batch, channels = shape[:2]
    x = torch.randn(shape, device="cuda").to(dtype).contiguous(memory_format=torch.channels_last)
    arguments = {"x": x, "weight": torch.randn(channels, device="cuda"), "bias": torch.randn(channels, device="cuda")}
    arguments |= {name: torch.randn(batch, channels, device="cuda").to(dtype) for name in given}
    gradient, options = torch.randn_like(x), {"groups": groups, "eps": 1e-5, "silu": silu}
    torch._dynamo.reset()
    function = torch.compile(group_norm, fullgraph=True) if compile_it else group_norm
    found = gradients(function, arguments, gradient, **options)
    wide = {name: value.double() for name, value in arguments.items()}
    right = gradients(reference, wide, gradient, **options)
    for name in ("y", "x"):
        assert found[name].is_contiguous(memory_format=torch.channels_last)
    for name, value in found.items():
        # bfloat16 is rounded once, by 2^-8 at most; float32 sums thousands of numbers, and exp is the card's fast one
        tolerance = 2**-8 if value.dtype == torch.bfloat16 else 1e-5
        assert float((value.double() - right[name]).norm() / right[name].norm()) < tolerance, name


@gpu
@needs_gpu
def test_an_image_beyond_the_first_two_thousand_million_numbers():
    """Fault: addresses in 32 bits. 2^31 numbers of bf16 are 4 GiB, and the result as many."""
    images = 2**31 // (256 * 128 * 128) + 1
    if torch.cuda.mem_get_info()[0] < 10 * 2**30:
        pytest.skip("NO CUDA DEVICE with 10 GiB free: addresses beyond 2^31 are not tested here")
    x = torch.zeros((images, 128, 128, 256), dtype=torch.bfloat16, device="cuda").permute(0, 3, 1, 2)
    x[-1] = torch.randn(256, 128, 128, device="cuda")
    weight, bias = torch.ones(256, device="cuda"), torch.zeros(256, device="cuda")
    y = group_norm(x, weight, bias, 32, 1e-5)
    torch.testing.assert_close(y[-1:], reference(x[-1:], weight, bias, 32, 1e-5), atol=0.02, rtol=2**-7)


@gpu
@needs_gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_compiled_blocks_give_the_losses_of_plain_ones(precision, tmp_path):
    """Fault: a graph that rounds otherwise, or that a fallback has silently replaced."""
    found, lines = {}, []
    world = join(60)
    try:
        for compile_it in (False, True):
            settings = config(
                tmp_path / str(compile_it), engine="local", parallel__precision=precision, parallel__compile=compile_it
            )
            trainer = Trainer(settings, world, info(), lines.append)
            found[compile_it] = steps(world, trainer, 5)[0]
    finally:
        shutdown()
    assert any("compiling the network" in line for line in lines)
    assert not any("warning" in line for line in lines), lines
    assert found[True] == pytest.approx(found[False], rel=1e-4 if precision == "fp32" else 1e-2)


@pytest.mark.skipif(shutil.which("g++") is None, reason="NO C++ COMPILER: what torch.compile writes is not tested here")
@pytest.mark.parametrize("arch", ["ddpmpp", "ncsnpp", "adm"])
def test_the_code_that_inductor_generates_makes_no_tensor_in_another_layout(arch, monkeypatch, tmp_path):
    """Forward and backward of a block as torch.compile writes them, without the kernels, which take minutes of g++.

    Fault: a buffer in NCHW, which a kernel of its own has to fill and another to turn back.
    """
    monkeypatch.setattr(blocks, "group_norm", scaled)
    monkeypatch.setattr(AsyncCompile, "cpp_pybinding", lambda *_, **__: lambda *_: None)
    monkeypatch.setattr(AsyncCompile, "wait", lambda *_: None)
    monkeypatch.setattr(cpu_vec_isa, "valid_vec_isa_list", list)  # g++ would be tried for each
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    block = Block(64, 128, BlockOptions(arch, 32, dropout=0.1), mode="up", num_heads=1).train()

    def run() -> None:
        x = torch.randn(2, 64, 8, 8).contiguous(memory_format=torch.channels_last).requires_grad_()
        compiled = torch.compile(block.compute, dynamic=False, fullgraph=True)
        compiled(block.flat, x, torch.randn(2, 32, requires_grad=True)).sum().backward()

    torch._dynamo.reset()
    with torch._inductor.config.patch(fx_graph_cache=False), torch._functorch.config.patch(enable_autograd_cache=False):
        _, codes = run_and_get_code(run)
    four = r"\((\d+), (\d+), (\d+), (\d+)\)"  # a size, then the strides
    form = rf"(?:empty_strided_cpu|assert_size_stride|reinterpret_tensor)\((?:\w+, )?{four}, {four}"
    tensors = [tuple(int(n) for n in found) for code in codes for found in re.findall(form, code)]
    images = [t for t in tensors if t[1] > 1 and 1 < t[2] == t[3]]  # and the weights of 3x3 convolutions
    assert len(codes) == 2
    assert sum(code.count("convolution(") for code in codes) >= 2
    assert len(images) > 10
    assert not [t for t in images if t[5] != 1]


@gpu
@needs_gpu
@pytest.mark.parametrize("name", ["cifar10", "imagenet64"])
def test_the_shipped_networks_call_no_kernel_that_turns_a_layout(name):
    """Fault: cuDNN turns NCHW to NHWC and back around every convolution: 14 % of the time before."""
    settings = load_config(ROOT / "configs" / f"{name}.json")
    network = build_network(settings).cuda().train()
    network.dtype = torch.bfloat16
    size = settings.data.resolution
    x, level = torch.randn(4, 3, size, size, device="cuda"), torch.zeros(4, device="cuda")
    labels = torch.zeros(4, dtype=torch.int64, device="cuda") if settings.data.num_classes else None
    network(x, level, level, labels).float().square().mean().backward()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        network(x, level, level, labels).float().square().mean().backward()
    names = {event.key for event in profile.key_averages()}
    assert names
    assert not [key for key in names if "nchwToNhwc" in key or "nhwcToNchw" in key]
    assert any("flash" in key or "fmha" in key or "sdpa" in key for key in names), "attention is not fused"


@gpu
@needs_gpu
def test_samples_of_the_compiled_network_in_bfloat16_are_those_of_the_plain_one(tmp_path):
    """Fault: a compiled evaluation that draws other images, or compiles its smaller last batch anew."""
    settings = config(tmp_path)
    model = Model(wake(build_network(settings)).cuda(), settings, info())
    options = {"seed": 0, "device": torch.device("cuda"), "batch_size": 4, "fill": True}

    def images(count: int, precision: str) -> Tensor:
        sampler = SamplerConfig(num_steps=8, precision=precision)
        drawn = generate(model, range(count), np.full(count, -1), sampler=sampler, **options)
        return torch.from_numpy(drawn).double()

    plain, lines = images(6, "fp32"), []
    compile_blocks(model.network, None, lines.append)
    assert float((images(6, "bf16") - plain).square().mean().sqrt()) < 5  # of 255; on a CPU 1.1 with a trained network
    assert not any("warning" in line for line in lines), lines
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    images(7, "bf16")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
