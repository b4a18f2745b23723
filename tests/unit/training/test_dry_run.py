"""What a rank's memory holds."""

import pytest

from warm_dist.training.dry_run import memory_bytes

P = 1_000_000


@pytest.mark.parametrize(
    ("world", "stage", "options", "bytes_each"),
    [
        (1, 0, {"precision": "fp32"}, 4 + 4 + 8 + 4),
        (8, 0, {}, 4 + 4 + 8 + 4 / 8),
        (8, 1, {}, 2 + 2 + 16 / 8),
        (8, 2, {"num_emas": 3}, 2 + 2 / 8 + 24 / 8),
        (8, 3, {"num_emas": 3}, 2 / 8 + 2 / 8 + 24 / 8),
        (8, 3, {"num_emas": 3, "offload": True}, 2 / 8 + 2 / 8),
    ],
)
def test_memory_is_the_zero_papers(world, stage, options, bytes_each):
    """bf16: weights 2, gradients 2, master 4, Adam 8, each EMA 4 bytes a parameter; sharded parts an eighth.

    Fault: what a stage shards is counted whole, or what is on the host is counted on the device. Source: arXiv 1910.02054,
    section 5.
    """
    assert memory_bytes(P, world, stage, **{"precision": "bf16", **options}) == bytes_each * P
