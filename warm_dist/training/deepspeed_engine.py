"""DeepSpeed's ZeRO stages 0 to 3 as an engine."""

from __future__ import annotations

import logging
import os
import warnings
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from warm_dist.config.batch import micro_batches
from warm_dist.config.run import Config
from warm_dist.distributed.world import World
from warm_dist.networks.blocks import Block
from warm_dist.networks.compiled import Say
from warm_dist.networks.flat import Flat
from warm_dist.training.engine import Engine, Fragment, LocalEngine, clip_and_guard, ensure_state, make_adam, set_steps

REDUCED = 500_000_000  # gradients that DeepSpeed reduces together
KEPT = 500_000_000  # weights: of no more, stage 3 keeps those gathered for the forward pass until the backward pass


class DeepSpeedEngine(Engine):
    """ZeRO stages 0 to 3 of DeepSpeed 0.19.8, whose internal attributes it reads, with torch's Adam.

    At stage 0 the weights stay float32, and the network casts them: DeepSpeed's own bf16 stage 0 loses accuracy.
    """

    def __init__(self, module: nn.Module, config: Config, world: World, say: Say) -> None:
        self.stage = config.parallel.zero_stage
        super().__init__(module, config, world, say)
        deepspeed = _import_deepspeed()
        deepspeed.init_distributed(dist_init_required=False, verbose=False)
        optimizer = make_adam(module.parameters(), config)
        num_parameters = sum(p.numel() for p in module.parameters())
        self.engine, self.zero, _, _ = deepspeed.initialize(
            model=module.to(world.device),
            optimizer=optimizer,
            config=deepspeed_config(config, world.size, num_parameters),
            dist_init_required=False,
        )
        if self.stage == 3 and num_parameters <= KEPT:
            _gather_once(self.zero.parameter_offload, module)
        elif self.stage == 3:
            for part in module.modules():
                if isinstance(part, Flat):
                    # a checkpointed block keeps nothing anyway, and its own hooks would hide it from the checkpoint
                    part.regathered = not (config.parallel.activation_checkpointing and isinstance(part, Block))
        self.optimizer = optimizer if self.stage == 0 else self.zero.optimizer
        # the engine's own forward only adds hooks and timers, which stage 3 alone needs
        self.run = self.engine if self.stage == 3 else module
        self._norm = torch.zeros((), device=world.device)
        if _guards(config):
            self.optimizer.register_step_pre_hook(self._guard)
        self._micro_step = 0

    def __call__(self, x: Tensor, c_noise: Tensor, c_blur: Tensor, *condition: Tensor | None) -> Tensor:
        return self.run(x, c_noise, c_blur, *condition)  # type: ignore[no-any-return]

    def backward(self, loss: Tensor) -> None:
        self._micro_step += 1
        self.engine.backward(loss)
        if self._micro_step < self.num_accumulation:
            self.engine.step()  # only counts the micro-step

    def step(self, lr: float) -> Tensor:
        self._micro_step = 0
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if self.stage == 0:
            norm = clip_and_guard(self.optimizer, list(self.module.parameters()), self.config.train.clip)
            self.engine.step()
            return norm
        if _guards(self.config):
            self.engine.step()
            return self._norm
        self.engine.step()  # ZeRO's overflow check skips a non-finite update
        # the norm is a float after an overflow, and on the host with offload_optimizer
        norm = torch.as_tensor(self.engine.get_global_grad_norm(), dtype=torch.float32).detach()
        return norm.to(self.world.device, non_blocking=True)

    def _guard(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._norm = clip_and_guard(optimizer, parameters, self.config.train.clip, sharded=self.world.size > 1)

    def fragments(self) -> list[Fragment]:
        if self.stage == 0:
            return super().fragments()
        flats = self.zero.fp32_partitioned_groups_flat if self.stage == 3 else self.zero.single_partition_of_fp32_groups
        ensure_state(self.optimizer, flats)
        return [part for name, p in self.module.named_parameters() if (part := self._fragment(name, p))]

    def _fragment(self, name: str, p: Any) -> Fragment | None:
        if self.stage == 3:
            group, offset, padded = self.zero.grad_position[self.zero.get_param_id(p)]
            flat, start = self.zero.fp32_partitioned_groups_flat[group], self.world.rank * padded
            count = max(0, min(p.ds_numel - start, padded))  # the last partition is padded
        else:
            mapping = p._hp_mapping
            if mapping is None:
                return None
            flat = self.zero.single_partition_of_fp32_groups[mapping.param_group_index]
            offset, count = mapping.hp_fragment_address.start, mapping.hp_fragment_address.numel
            start = mapping.lp_fragment_address.start
        if not count:
            return None
        state = self.optimizer.state[flat]
        tensors = flat, state["exp_avg"], state["exp_avg_sq"]
        return Fragment(name, start, *(tensor.data.view(-1)[offset : offset + count] for tensor in tensors))

    def shard(self) -> list[Fragment]:
        return self.fragments() if self.stage else super().shard()

    def after_load(self, num_steps: int) -> None:
        set_steps(self.optimizer, num_steps)
        if self.stage in (1, 2):
            self.zero.update_lp_params()
        elif self.stage == 3:
            for index, flat in enumerate(self.zero.fp32_partitioned_groups_flat):
                self.zero.fp16_partitioned_groups_flat[index].data.copy_(flat.data)
                self.zero._unflatten_partitioned_parameters(index)


def deepspeed_config(config: Config, world_size: int, num_parameters: int) -> dict[str, Any]:
    """DeepSpeed's config, computed from ours."""
    micro, accumulation = micro_batches(config, world_size)
    stage = config.parallel.zero_stage
    out: dict[str, Any] = {
        "train_batch_size": config.train.batch_size,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        # DeepSpeed allocates a whole bucket, 5e8 elements by default, whatever the network's size
        "zero_optimization": {"stage": stage, "reduce_bucket_size": min(num_parameters, REDUCED)},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**62,
        "wall_clock_breakdown": False,
    }
    if stage in (1, 2):
        # its "reduce_scatter" all-reduces the bucket too, after slicing it by parameter and rank: 6 % of a small step
        out["zero_optimization"]["reduce_scatter"] = False
        # else every gradient is copied into a buffer as large as the network; ours are few and large
        out["zero_optimization"]["contiguous_gradients"] = False
    if _guards(config):
        out["zero_optimization"]["compute_grad_norm"] = False
    if stage == 3:
        # no parameter stays gathered between steps, so restoring the shards restores all of it
        out["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        # of a larger network it keeps what it needs again within so many weights, counted through forward and backward
        out["zero_optimization"]["stage3_max_reuse_distance"] = 2 * KEPT
        # would replace torch.nn.functional.linear, in the whole process, by a slower one that saves no memory here
        out["zero_optimization"]["memory_efficient_linear"] = False
    if config.parallel.offload_optimizer:
        out["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
        out["zero_force_ds_cpu_optimizer"] = False  # DeepSpeed's own would be compiled at the start
    # left out, it would be 1; at stages 0 to 2 we clip
    ours = not stage or _guards(config) or config.train.clip is None
    out["gradient_clipping"] = 0.0 if ours else config.train.clip
    if stage and config.parallel.precision == "bf16":
        out["bf16"] = {"enabled": True, "check_grad_overflow": not _guards(config)}
    return out


def _guards(config: Config) -> bool:
    """Whether we clip and guard the update: DeepSpeed looks at every parameter by itself, and waits for the device."""
    return config.parallel.zero_stage in (1, 2) and not config.parallel.offload_optimizer


def _gather_once(offload: Any, network: nn.Module) -> None:
    """Gather a module's weights before its forward pass, and free them once their gradient is there.

    Replaces DeepSpeed's hooks, which put an autograd function around each input and output of a module and were a third of
    the host's step. DeepSpeed's coordinator still gathers ahead, in the order that it saw in the first steps.
    """
    for hook in (*offload.forward_hooks, *offload.backward_hooks):
        hook.remove()
    for part in network.modules():
        if isinstance(part, Flat):
            part.register_forward_pre_hook(partial(_gather, offload.param_coordinator, part.flat))
            part.flat.register_post_accumulate_grad_hook(lambda flat: flat.partition())


def _gather(coordinator: Any, flat: Any, module: nn.Module, _: Any) -> None:
    if flat.ds_status.name == "AVAILABLE":  # activations are being recomputed
        return
    coordinator.trace_prologue(module)
    if coordinator.is_record_trace():
        coordinator.record_module(module)
    coordinator.fetch_sub_module(module, forward=True)
    flat.ds_active_sub_modules.clear()  # else reset_step would not free it


def _import_deepspeed() -> Any:
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # DeepSpeed 0.19.8 calls collectives that torch 2.14 renamed; users can do nothing about it
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    import deepspeed
    import deepspeed.ops
    import deepspeed.utils.nvtx
    from deepspeed.accelerator import get_accelerator

    deepspeed.utils.nvtx.enable_nvtx = False  # two calls around each of its functions, 700 times a step at stage 3
    if not torch.cuda.is_available():
        # stage 3 counts devices at every step, which on a CPU starts the program numactl
        accelerator = get_accelerator()
        accelerator.device_count = cache(accelerator.device_count)
    # its shared-memory op for CPU inference takes two minutes to compile, and training never calls it
    deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False, "deepspeed_not_implemented": False}
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    return deepspeed


def build_engine(module: nn.Module, config: Config, world: World, say: Say = print) -> Engine:
    """The engine named by `config.engine`. The module's parameters must be float32 and equal on all ranks.

    say: told of a compilation, and of a reason why there is none.
    """
    return (LocalEngine if config.engine == "local" else DeepSpeedEngine)(module, config, world, say)
