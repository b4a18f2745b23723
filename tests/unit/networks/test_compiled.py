"""Compiled blocks: what is compiled, what the user is told, and what happens if it fails. Inductor itself: make soak."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.exc

from tests.support.networks import wake
from warm_dist.config.run import NetworkConfig
from warm_dist.networks import compiled as module
from warm_dist.networks.blocks import Block
from warm_dist.networks.compiled import Compiler, compile_blocks, compiles
from warm_dist.networks.unet import UNet


@pytest.fixture
def network() -> UNet:
    torch.manual_seed(0)
    return wake(UNet(NetworkConfig(arch="ddpmpp", channels=16, channel_mult=(1, 2), num_blocks=1), 8, 3, 0).eval())


@pytest.fixture
def folder(monkeypatch, tmp_path) -> str:
    monkeypatch.setattr(Compiler, "announced", False)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "unset")
    return str(tmp_path / "kernels")


def run(network: UNet) -> torch.Tensor:
    x = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return network(x, torch.zeros(1), torch.zeros(1))


@pytest.mark.parametrize(
    ("setting", "device", "expected"),
    [(None, "cuda", True), (None, "cpu", False), (True, "cpu", True), (False, "cuda", False)],
)
def test_null_compiles_on_cuda(setting, device, expected):
    assert compiles(setting, torch.device(device)) is expected


def test_every_block_is_compiled_and_the_user_is_told_once_where_it_is_kept(network, folder, monkeypatch):
    made, lines = [], []

    def compile(function, dynamic):
        assert dynamic is False
        made.append(function)
        return function

    monkeypatch.setattr(torch, "compile", compile)
    before = run(network)
    compile_blocks(network, folder, lines.append)
    assert len(made) == sum(isinstance(block, Block) for block in network.modules())
    assert not lines  # nothing is compiled before its first call
    assert torch.equal(run(network), before)
    run(network)
    compile_blocks(network, folder, lines.append)  # again, as for sampling after training
    run(network)
    assert lines == [f"compiling the network: about 2 minutes the first time, then kept in {folder}"]


def test_long_compiling_is_told_while_it_runs(network, folder, monkeypatch):
    lines, graphs, clock = [], iter(range(1000)), iter(range(0, 10_000, 4))
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)
    monkeypatch.setattr(module, "_graphs", lambda: next(graphs))
    monkeypatch.setattr(module.time, "monotonic", lambda: float(next(clock)))
    compile_blocks(network, folder, lines.append)
    run(network)
    # every look at the clock is 4 s after the last: a block takes 4 s, and only the first ends within SILENCE_S of a line
    assert lines[1] == "compiling the network: 2 kinds of block in 8 s"
    assert lines[2] == "compiling the network: 3 kinds of block in 12 s"


def test_a_failure_is_one_warning_with_its_reason_and_the_network_runs_on(network, folder, monkeypatch):
    calls, lines = [], []

    def compile(function, dynamic):
        def broken(*given):
            calls.append(given)
            raise torch._dynamo.exc.TorchDynamoException("\nno compiler found: ptxas\nmore lines")

        return broken

    monkeypatch.setattr(torch, "compile", compile)
    before = run(network)
    compile_blocks(network, folder, lines.append)
    for _ in range(2):
        assert torch.equal(run(network), before)
    assert lines[1:] == ["warning: the network is not compiled and will be slower (no compiler found: ptxas)"]
    assert len(calls) == 1  # the other blocks do not try


def test_an_error_of_the_network_is_not_taken_for_one_of_compiling(network, folder, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)
    compile_blocks(network, folder, lambda line: None)
    block = next(block for block in network.modules() if isinstance(block, Block))
    with pytest.raises(RuntimeError):
        block(torch.zeros(1, 5, 8, 8), torch.zeros(1, 64))
