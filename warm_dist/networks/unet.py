"""The two-head U-Net: EDM's DDPM++, NCSN++ and ADM with doubled output channels and a second level input.

Source: EDM (arXiv 2206.00364), appendix F.2; doubled output and two levels: Warm Diffusion (arXiv 2511.16904).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from warm_dist import rng
from warm_dist.config.run import Config, NetworkConfig
from warm_dist.networks.blocks import (
    AuxiliaryDown,
    Block,
    BlockOptions,
    Norm,
    fourier,
    initialised,
    kaiming_init,
    num_groups,
    positional,
    xavier_init,
)
from warm_dist.networks.flat import Flat, views
from warm_dist.networks.group_norm import group_norm

NUM_AUGMENT = 9
"""Number of augmentation labels per image, see `training.augment`."""


class UNet(Flat):
    """A U-Net whose first C output channels are the denoiser head and whose last C are the deblurrer head.

    c_blur enters through a zero-initialised map, so that an untrained network ignores it and BNR 0 is EDM.
    num_augment: 0 for training without augmentation. checkpointing: recompute every block in the backward pass instead
    of keeping its activations. dtype: what it computes in, whatever its parameters are; activations are channels-last.
    """

    fourier: Tensor | None

    def __init__(
        self,
        config: NetworkConfig,
        resolution: int,
        channels: int,
        num_classes: int,
        num_heads: int = 2,
        num_augment: int = 0,
    ) -> None:
        super().__init__()
        adm, ncsnpp = config.arch == "adm", config.arch == "ncsnpp"
        self.resolution, self.channels, self.num_classes = resolution, channels, num_classes
        self.adm, self.checkpointing, self.dtype = adm, False, torch.float32
        self.noise_channels = config.channels * (2 if ncsnpp else 1)
        self.num_augment = num_augment
        emb_channels = 4 * config.channels
        self.options = options = BlockOptions(config.arch, emb_channels, config.dropout)
        init = options.init
        # fixed random frequencies from a constant seed: checkpoints hold parameters only
        frequencies = torch.from_numpy(16 * rng.normals(0, "fourier", [0], (self.noise_channels // 2,))[0])
        self.register_buffer("fourier", frequencies if ncsnpp else None, persistent=False)

        map_blur = nn.Linear(self.noise_channels, self.noise_channels, bias=False)
        nn.init.zeros_(map_blur.weight)
        layers: dict[str, nn.Module] = {"map_blur": map_blur}
        layers["map_layer0"] = initialised(nn.Linear(self.noise_channels, emb_channels), init)
        layers["map_layer1"] = initialised(nn.Linear(emb_channels, emb_channels), init)
        if num_classes and adm:
            layers["map_label"] = map_label = nn.Linear(num_classes, emb_channels, bias=False)
            nn.init.normal_(map_label.weight, std=1.0)  # EDM: sqrt(num_classes) over fan-in
        elif num_classes:
            layers["map_label"] = initialised(nn.Linear(num_classes, self.noise_channels), init)
        if num_augment:
            layer = nn.Linear(num_augment, self.noise_channels, bias=False)
            layers["map_augment"] = initialised(layer, options.init_zero if adm else init)

        widths = [config.channels * m for m in config.channel_mult]
        resolutions = [resolution >> level for level in range(len(widths))]
        attended = set(config.attention_resolutions)
        layers["stem"] = initialised(nn.Conv2d(channels, widths[0] if adm else config.channels, 3), init)
        current = widths[0] if adm else config.channels
        skips, self.encoder, self.pyramid = [current], nn.ModuleList(), nn.ModuleList()
        image = channels
        for level, (width, res) in enumerate(zip(widths, resolutions, strict=True)):
            if level:
                self.encoder.append(Block(current, current, options, mode="down"))
                skips.append(current)
                if ncsnpp:
                    self.pyramid.append(AuxiliaryDown(image, current, options))
                    image = current
            for _ in range(config.num_blocks):
                self.encoder.append(Block(current, width, options, num_heads=config.heads(width) * (res in attended)))
                current = width
                skips.append(current)

        self.middle = nn.ModuleList(
            [Block(current, current, options, num_heads=config.heads(current)), Block(current, current, options)]
        )
        self.decoder = nn.ModuleList()
        for level, (width, res) in reversed(list(enumerate(zip(widths, resolutions, strict=True)))):
            if level < len(widths) - 1:
                self.decoder.append(Block(current, current, options, mode="up"))
            for index in range(config.num_blocks + 1):
                attention = res in attended and (adm or index == config.num_blocks)
                heads = config.heads(width) * attention
                self.decoder.append(Block(current + skips.pop(), width, options, num_heads=heads))
                current = width
        self.groups = num_groups(current)
        layers["norm_out"] = Norm(current)
        layers["conv_out"] = initialised(
            nn.Conv2d(current, num_heads * channels, 3), kaiming_init(0.0) if adm else xavier_init(1e-5)
        )
        self.flatten(layers)

    def embed(
        self, w: dict[str, Tensor], c_noise: Tensor, c_blur: Tensor, labels: Tensor | None, augment: Tensor | None
    ) -> Tensor:
        """The (B, 4·channels) embedding of both levels, the class and the augmentation, in the dtype of the tensors w.

        Other arguments as `forward`.
        """
        dtype = w["map_blur.weight"].dtype
        if self.fourier is not None:
            emb = fourier(c_noise, self.fourier)
        else:
            emb = positional(c_noise, self.noise_channels, endpoint=not self.adm)
        if not self.adm:
            emb = emb.reshape(len(emb), 2, -1).flip(1).reshape(emb.shape)  # SongUNet puts the sines first
        blur = positional(c_blur, self.noise_channels, endpoint=not self.adm).to(dtype)
        emb = emb.to(dtype) + functional.linear(blur, w["map_blur.weight"])
        label = self._one_hot(labels, len(emb), emb.device).to(dtype) if self.num_classes else None
        if label is not None and not self.adm:
            emb = emb + functional.linear(
                label * math.sqrt(self.num_classes), w["map_label.weight"], w["map_label.bias"]
            )
        if self.num_augment and augment is not None:
            emb = emb + functional.linear(augment.to(dtype), w["map_augment.weight"])
        emb = functional.silu(functional.linear(emb, w["map_layer0.weight"], w["map_layer0.bias"]))
        emb = functional.linear(emb, w["map_layer1.weight"], w["map_layer1.bias"])
        if label is not None and self.adm:
            emb = emb + functional.linear(label, w["map_label.weight"])
        return functional.silu(emb)

    def _one_hot(self, labels: Tensor | None, batch: int, device: torch.device) -> Tensor:
        if labels is None:
            return torch.zeros(batch, self.num_classes, device=device)
        one_hot = functional.one_hot(labels.clamp_min(0), self.num_classes).float()
        return one_hot * (labels >= 0)[:, None]  # -1 is "no class"

    def forward(
        self, x: Tensor, c_noise: Tensor, c_blur: Tensor, labels: Tensor | None = None, augment: Tensor | None = None
    ) -> Tensor:
        """x: (B, C, H, W), c_noise, c_blur: (B,), labels: (B,) int64, -1 for none, augment: (B, 9) → (B, 2C, H, W)."""
        with self.keeping():
            return self._forward(x, c_noise, c_blur, labels, augment)

    def _forward(
        self, x: Tensor, c_noise: Tensor, c_blur: Tensor, labels: Tensor | None, augment: Tensor | None
    ) -> Tensor:
        w = views(self.flat.to(self.dtype), self.pieces)
        emb = self.embed(w, c_noise, c_blur, labels, augment)
        image = x.to(self.dtype, memory_format=torch.channels_last)
        h = functional.conv2d(image, w["stem.weight"], w["stem.bias"], padding=1)
        skips, pyramid = [h], iter(self.pyramid)
        for block in self.encoder:
            h = self._run(block, h, emb)
            if block.mode and len(self.pyramid):
                h = image = (h + next(pyramid)(image)) * math.sqrt(0.5)
            skips.append(h)
        for block in self.middle:
            h = self._run(block, h, emb)
        for block in self.decoder:
            h = self._run(block, h if block.mode else torch.cat([h, skips.pop()], dim=1), emb)
        h = group_norm(h, w["norm_out.weight"], w["norm_out.bias"], self.groups, self.options.eps)
        return functional.conv2d(h, w["conv_out.weight"], w["conv_out.bias"], padding=1)

    def _run(self, block: nn.Module, h: Tensor, emb: Tensor) -> Tensor:
        if self.checkpointing and self.training:
            return checkpoint(block, h, emb, use_reentrant=False)  # type: ignore[no-any-return]
        return block(h, emb)  # type: ignore[no-any-return]


def build(config: Config) -> UNet:
    """The network of a config, its weights drawn from torch's generator."""
    network = UNet(
        config.network,
        config.data.resolution,
        config.data.channels,
        config.data.num_classes,
        num_heads=1 if config.process.preconditioning == "per_frequency" else 2,
        num_augment=NUM_AUGMENT if config.train.augment else 0,
    )
    network.checkpointing = config.parallel.activation_checkpointing
    return network


def num_parameters(module: nn.Module) -> int:
    """Number of trainable parameters; works on the meta device."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def build_network(config: Config) -> UNet:
    """The network of a config, its weights drawn from train.seed: equal on every rank and device."""
    rng.seed_torch(config.train.seed, 0, 0)
    return build(config)
