"""Pixels to [-1, 1] and back."""

import torch

from warm_dist.data import centre, to_uint8


def test_centre_and_back():
    """Fault: the mean is added in place of subtracted, levels are lost to rounding, or bright pixels wrap to black."""
    x = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    mean = torch.tensor([0.3], dtype=torch.float64)
    assert torch.equal(to_uint8(centre(x, mean).double(), mean), x)
    assert float(to_uint8(torch.full((1, 1, 1, 1), 9.0), mean)) == 255
