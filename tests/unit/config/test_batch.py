"""Which world sizes a batch can be dealt to."""

import pytest

from tests.support.paths import ROOT
from warm_dist.config.batch import batch_equation, check_world_size
from warm_dist.config.run import load_config
from warm_dist.errors import ConfigError, WorldSizeError

QUICKSTART = load_config(ROOT / "configs" / "quickstart.json")


def test_batch_arithmetic():
    """Fault: a world size, or a micro-batch, that does not divide the batch is accepted."""
    assert batch_equation(QUICKSTART, 2).startswith("batch 32 = 2 ranks x 16 images x 1 accumulations")
    with pytest.raises(WorldSizeError, match="valid world sizes: 1, 2, 4, 8, 16, 32"):
        check_world_size(QUICKSTART, 3)
    odd = load_config(ROOT / "configs" / "quickstart.json", ["train.micro_batch_size=5"])
    with pytest.raises(ConfigError, match="micro_batch_size 5"):
        check_world_size(odd, 1)
