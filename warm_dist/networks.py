"""The two-head U-Net: EDM's DDPM++ and ADM with doubled output channels and a second level input.

Source: EDM (arXiv 2206.00364), appendix F.2; doubled output and two levels: Warm Diffusion (arXiv 2511.16904).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from warm_dist.blocks import Block, BlockOptions, group_norm, initialised, kaiming_init, positional, xavier_init
from warm_dist.config import NetworkConfig


class UNet(nn.Module):
    """(B, C, H, W), (B,) c_noise, (B,) c_blur, (B,) int64 labels (-1: none) → (B, 2C, H, W).

    The first C output channels are the denoiser head, the last C the deblurrer head. c_blur enters through a
    zero-initialised map, so that an untrained network ignores it and BNR 0 is EDM.
    """

    def __init__(self, config: NetworkConfig, resolution: int, channels: int, num_classes: int) -> None:
        super().__init__()
        adm = config.arch == "adm"
        self.adm, self.num_classes = adm, num_classes
        self.noise_channels = config.channels
        emb_channels = 4 * config.channels
        options = BlockOptions(config.arch, emb_channels, config.dropout)
        init = options.init

        self.map_blur = nn.Linear(self.noise_channels, self.noise_channels, bias=False)
        nn.init.zeros_(self.map_blur.weight)
        self.map_layer0 = initialised(nn.Linear(self.noise_channels, emb_channels), init)
        self.map_layer1 = initialised(nn.Linear(emb_channels, emb_channels), init)
        self.map_label: nn.Module | None = None
        if num_classes and adm:
            self.map_label = nn.Linear(num_classes, emb_channels, bias=False)
            nn.init.normal_(self.map_label.weight, std=1.0)  # EDM: sqrt(num_classes) over fan-in
        elif num_classes:
            self.map_label = initialised(nn.Linear(num_classes, self.noise_channels), init)

        widths = [config.channels * m for m in config.channel_mult]
        resolutions = [resolution >> level for level in range(len(widths))]
        attended = set(config.attention_resolutions)
        self.stem = initialised(nn.Conv2d(channels, widths[0] if adm else config.channels, 3, padding=1), init)
        current = widths[0] if adm else config.channels
        skips, self.encoder = [current], nn.ModuleList()
        for level, (width, res) in enumerate(zip(widths, resolutions, strict=True)):
            if level:
                self.encoder.append(Block(current, current, options, mode="down"))
                skips.append(current)
            for _ in range(config.num_blocks):
                self.encoder.append(Block(current, width, options, attention=res in attended))
                current = width
                skips.append(current)

        self.middle = nn.ModuleList(
            [Block(current, current, options, attention=True), Block(current, current, options)]
        )
        self.decoder = nn.ModuleList()
        for level, (width, res) in reversed(list(enumerate(zip(widths, resolutions, strict=True)))):
            if level < len(widths) - 1:
                self.decoder.append(Block(current, current, options, mode="up"))
            for index in range(config.num_blocks + 1):
                attention = res in attended and (adm or index == config.num_blocks)
                self.decoder.append(Block(current + skips.pop(), width, options, attention=attention))
                current = width
        self.norm_out = group_norm(current, options.eps)
        self.conv_out = initialised(
            nn.Conv2d(current, 2 * channels, 3, padding=1), kaiming_init(0.0) if adm else xavier_init(1e-5)
        )

    def embed(self, c_noise: Tensor, c_blur: Tensor, labels: Tensor | None) -> Tensor:
        """(B, 4·channels) embedding of both levels and the class."""
        dtype = self.map_blur.weight.dtype
        emb = positional(c_noise, self.noise_channels, endpoint=not self.adm)
        if not self.adm:
            emb = emb.reshape(len(emb), 2, -1).flip(1).reshape(emb.shape)  # DDPM++ puts the sines first
        emb = emb.to(dtype) + self.map_blur(positional(c_blur, self.noise_channels, endpoint=not self.adm).to(dtype))
        label = self._one_hot(labels, len(emb), emb.device).to(dtype) if self.map_label is not None else None
        if self.adm:
            emb = self.map_layer1(functional.silu(self.map_layer0(emb)))
            return functional.silu(emb + self.map_label(label)) if self.map_label is not None else functional.silu(emb)
        if self.map_label is not None and label is not None:
            emb = emb + self.map_label(label * math.sqrt(self.num_classes))
        return functional.silu(self.map_layer1(functional.silu(self.map_layer0(emb))))

    def _one_hot(self, labels: Tensor | None, batch: int, device: torch.device) -> Tensor:
        if labels is None:
            return torch.zeros(batch, self.num_classes, device=device)
        one_hot = functional.one_hot(labels.clamp_min(0), self.num_classes).float()
        return one_hot * (labels >= 0)[:, None]  # a label of -1 is "no class"

    def forward(self, x: Tensor, c_noise: Tensor, c_blur: Tensor, labels: Tensor | None = None) -> Tensor:
        emb = self.embed(c_noise, c_blur, labels)
        h = self.stem(x)
        skips = [h]
        for block in self.encoder:
            h = block(h, emb)
            skips.append(h)
        for block in self.middle:
            h = block(h, emb)
        for block in self.decoder:
            takes_skip = block.mode is None
            h = block(torch.cat([h, skips.pop()], dim=1) if takes_skip else h, emb)
        return self.conv_out(functional.silu(self.norm_out(h)))  # type: ignore[no-any-return]


def num_parameters(module: nn.Module) -> int:
    """Trainable numbers; also right on the meta device."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)
