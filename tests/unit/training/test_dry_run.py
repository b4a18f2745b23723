"""What a rank's memory holds."""

import pytest

from warm_dist.training.dry_run import memory_bytes


def test_memory_is_the_zero_papers():
    """Fault: what a ZeRO stage shards is counted whole, so that a higher stage saves nothing."""
    # arXiv 1910.02054, section 5: 16-bit weights and gradients, 12 bytes of optimizer state a parameter; EMA 4 more, sharded
    p = 1_000_000
    assert memory_bytes(p, 64, 1, "bf16") == pytest.approx(2 * p + 2 * p + 16 * p / 64, rel=0.9)
    assert memory_bytes(p, 64, 3, "bf16") == pytest.approx((2 + 2 + 4 + 4) * p / 64 + 8 * p / 64, rel=1e-6)
    assert memory_bytes(p, 1, 0, "fp32") == (4 + 4 + 8 + 4) * p
    sizes = [memory_bytes(p, 8, stage, "bf16") for stage in range(4)]
    assert sizes == sorted(sizes, reverse=True)
