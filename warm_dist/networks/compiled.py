"""The residual blocks compiled by torch.compile, one at a time: equal blocks share a graph, and ZeRO's hooks stay outside.

Of 21 blocks 14 were kinds of their own. Compiling them took about as long as the whole network (202 and 228 s of g++, on a
busy machine); a block at a time also bounds the number of graphs, and lets stage 3 gather weights between them.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn

from warm_dist.networks.blocks import Block

MAX_GRAPHS = 256  # kinds of block, times training, evaluation and batch sizes; dynamo gives up a function after 8
SILENCE_S = 10.0  # between two lines about compiling
Say = Callable[[str], None]


class Compiler:
    """What all blocks of a network share: the news of compiling, and whether it failed."""

    announced: ClassVar[bool] = False  # once a process, whose training and sampling have a compiler each

    def __init__(self, say: Say) -> None:
        self.say, self.failed = say, False
        self._graphs, self._seconds = 0, 0.0
        self._said: float | None = None

    def compiled(self, block: Block) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """The block's function, compiled when it is first called; the plain one once any compilation has failed."""
        plain, fast = block.compute, torch.compile(block.compute, dynamic=False)

        def compute(flat: Tensor, x: Tensor, emb: Tensor) -> Tensor:
            if self.failed:
                return plain(flat, x, emb)
            before, begun = _graphs(), time.monotonic()
            if self._said is None:
                self._said = begun
                if not Compiler.announced:
                    Compiler.announced = True
                    self.say(f"compiling the network: about 2 minutes the first time, then kept in {cache_folder()}")
            try:
                out: Tensor = fast(flat, x, emb)
            except torch._dynamo.exc.TorchDynamoException as error:
                self.failed = True
                reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
                self.say(f"warning: the network is not compiled and will be slower ({reason.strip()})")
                return plain(flat, x, emb)
            self._tell(_graphs() - before, time.monotonic() - begun)
            return out

        return compute

    def _tell(self, graphs: int, seconds: float) -> None:
        if not graphs:
            return
        self._graphs += graphs
        self._seconds += seconds
        if self._said is not None and time.monotonic() - self._said > SILENCE_S:
            self._said = time.monotonic()
            self.say(f"compiling the network: {self._graphs} kinds of block in {self._seconds:.0f} s")


def _graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def cache_folder() -> str:
    """Where compiled kernels are kept."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return str(cache_dir())


def compiles(setting: bool | None, device: torch.device) -> bool:
    """Whether parallel.compile, null for "where it pays", means to compile: on CUDA; on a CPU it takes minutes of g++."""
    return device.type == "cuda" if setting is None else setting


def compile_blocks(network: nn.Module, cache: str | None, say: Say) -> None:
    """Compile every residual block at its first call; a failure is one warning, and the network then runs as it is.

    cache: the folder that keeps compiled kernels, which ranks and later runs share; None for torch's own. Ranks may start
    together: torch writes its files under other names and renames them (`write_atomic` in its codecache.py).
    """
    if cache is not None:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
    import torch._dynamo
    import torch._functorch.config

    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MAX_GRAPHS)
    # the backward graph is then compiled at the forward, where a failure can be caught
    torch._functorch.config.force_non_lazy_backward_lowering = True
    compiler = Compiler(say)
    for block in network.modules():
        if isinstance(block, Block):
            block.compute = compiler.compiled(block)
