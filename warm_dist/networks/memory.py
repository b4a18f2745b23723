"""Peak memory of a network's passes on a GPU or a CPU, by running them on fake tensors: it needs neither.

A fake tensor has a shape and no numbers. What the passes allocate and free is followed as on the real device: a GPU's
fused normalization, its attention without a matrix of scores, and what a compiled block keeps and fuses. Not followed:
workspaces inside cuDNN's and attention's kernels, and what the allocator loses by fragmentation.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from warm_dist.config.run import Config
from warm_dist.networks import precision
from warm_dist.networks.blocks import Block
from warm_dist.networks.flat import Flat
from warm_dist.networks.unet import NUM_AUGMENT, UNet, build

Compute = Callable[[Tensor, Tensor, Tensor], Tensor]


class Meter(TorchDispatchMode):
    """Follows what operations allocate inside its context.

    given: tensors made before, which do not count. live: bytes in use. gradients: for the caller to count what it takes
    away. history: both at every allocation.
    """

    def __init__(self, given: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.gradients = 0
        self.history: list[tuple[int, int]] = []
        self.counting, self.tracing = True, False
        self._known = {tensor.untyped_storage()._cdata for tensor in given}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._see(tensor.untyped_storage())
        return out

    def _see(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes() if self.counting and not self.tracing else 0
        if key not in self._known:
            self._known.add(key)
            self.live += size
            self.history.append((self.live, self.gradients))
            weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


# operations that inductor does not write itself: they read and write memory, all others are fused into their readers
KERNELS = ("convolution", "mm", "addmm", "bmm", "_scaled_dot_product", "group_norm")


def _is_kernel(node: fx.Node) -> bool:
    return getattr(node.target, "__name__", "").startswith(KERNELS)


def _written(node: fx.Node) -> bool:
    """Whether a compiled graph writes a value to memory: a kernel's own, one that a kernel reads, or a result."""
    if _is_kernel(node) or node.op != "call_function":
        return True
    readers = list(node.users)
    for reader in readers:
        if reader.op == "output" or _is_kernel(reader):
            return True
        if getattr(reader.target, "is_view", False):
            readers.extend(reader.users)
    return False


class Graph(fx.Interpreter):
    """A compiled graph, run as inductor's code would allocate. Counted by `meter`."""

    _boxed_call = True  # it is given a list of arguments to empty, so that each is freed after its last use

    def __init__(self, module: fx.GraphModule, meter: Meter) -> None:
        super().__init__(module)
        self.meter = meter
        self.fused = {node for node in module.graph.nodes if not _written(node)}

    def __call__(self, arguments: list[Any]) -> Any:
        out = self.boxed_run(arguments)
        self.env = {}  # it would keep the results
        return out

    def run_node(self, n: fx.Node) -> Any:
        """Run a node; what is fused takes no memory."""
        self.meter.counting = n not in self.fused
        try:
            return super().run_node(n)
        finally:
            self.meter.counting = True


def _compiled(plain: Compute, meter: Meter, arguments: tuple[Tensor, ...]) -> Compute:
    """A block's function, split into forward and backward by the partitioner that torch.compile uses."""
    from torch._functorch.aot_autograd import aot_function
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor.decomposition import select_decomp_table

    compute: Compute = aot_function(
        plain,
        fw_compiler=lambda module, _: Graph(module, meter),
        bw_compiler=lambda module, _: Graph(module, meter),
        partition_fn=min_cut_rematerialization_partition,
        decompositions=select_decomp_table(),
    )
    meter.tracing = True
    # graphs keep the tensors that they are made with; and a checkpoint around the block must not see this call
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
        compute(*(torch.empty_like(t, requires_grad=t.requires_grad) for t in arguments))
    meter.tracing = False
    return compute


def _compile(network: nn.Module, meter: Meter) -> None:
    """Have equal blocks share a graph, which is made when the first of them is called."""
    graphs: dict[Any, Compute] = {}

    def shared(block: Block) -> Compute:
        plain = block.compute

        def compute(*arguments: Tensor) -> Tensor:
            kind = block.pieces, block.mode, block.num_heads, arguments[1].shape, arguments[1].requires_grad
            if kind not in graphs:
                graphs[kind] = _compiled(plain, meter, arguments)
            return graphs[kind](*arguments)

        return compute

    for module in network.modules():
        if isinstance(module, Block):
            module.compute = shared(module)


@contextmanager
def planned(
    config: Config, device: str, dtype: torch.dtype, weights: torch.dtype = torch.float32, compiled: bool = False
) -> Iterator[tuple[UNet, Meter]]:
    """The config's network on fake tensors, and the meter of what else is allocated inside the context.

    device: "cuda" or "cpu", whose operations are followed. dtype: what the network computes in. weights: what they are.
    """

    def on_gpu(x: Tensor) -> bool:  # not a mock, which would keep the tensors that it is called with
        return device == "cuda"

    with FakeTensorMode(allow_non_fake_inputs=True), torch._functorch.config.patch(decompose_custom_triton_ops=False):
        network = build(config)
        network.dtype = dtype
        for module in network.modules():
            if isinstance(module, Flat):
                module.flat = nn.Parameter(module.flat.detach().to(weights))
        meter = Meter(network.parameters())
        if compiled:
            _compile(network, meter)
        # the tensors say "cpu": autograd cannot go back through fake CUDA tensors on a machine without CUDA
        with mock.patch.object(precision, "on_gpu", on_gpu), meter:
            yield network, meter


def inputs(config: Config, batch: int) -> tuple[Tensor, ...]:
    """What the network is called with, empty tensors: images, both levels, labels, augmentation."""
    data = config.data
    image = torch.empty(batch, data.channels, data.resolution, data.resolution)
    labels = torch.zeros(batch, dtype=torch.int64)
    return image, torch.empty(batch), torch.empty(batch), labels, torch.empty(batch, NUM_AUGMENT)


def forward_bytes_per_image(config: Config, device: str = "cuda", dtype: torch.dtype = torch.float32) -> int:
    """Bytes that each image of a batch adds to the peak of a forward pass without gradients, as in sampling.

    Without the weights, which are there anyway. device, dtype: as `planned`.
    """
    peaks = []
    for batch in (16, 32):  # so many that the cast of the weights, once a batch, is no longer what counts
        with planned(config, device, dtype) as (network, meter), torch.no_grad():
            network.eval()(*inputs(config, batch))
        peaks.append(max(meter.history)[0])
    return (peaks[1] - peaks[0]) // 16
