import json
import os
import time

import pytest

from tests.processes import ROOT
from warm_dist.config.batch import batch_equation, check_world_size
from warm_dist.config.run import load_config
from warm_dist.errors import ConfigError, DataError, OutputError, Stopped, WorldSizeError
from warm_dist.runs.folder import claim_run, describe_run, end_since, write_end
from warm_dist.training.dry_run import memory_bytes

QUICKSTART = load_config(ROOT / "configs" / "quickstart.json")


def test_attempts_are_counted_and_the_folder_is_claimed_once(tmp_path):
    attempt, lock = claim_run(tmp_path / "run")
    assert attempt == 1
    with pytest.raises(OutputError, match="another process"):
        claim_run(tmp_path / "run")
    describe_run(tmp_path / "run", QUICKSTART, attempt, {"fingerprint": "x"})
    lock.close()
    assert claim_run(tmp_path / "run")[0] == 2


def test_the_first_reason_stays(tmp_path):
    write_end(tmp_path, 1, 64, DataError("image x"))
    write_end(tmp_path, 1, 64, RuntimeError("lost a peer"))
    told = json.loads((tmp_path / "exit.json").read_text())
    assert told == {"code": 3, "reason": "DataError: image x", "nimg": 64, "resumable": False, "attempt": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["exit.json"]


def test_an_earlier_attempt_s_end_is_not_this_one_s(tmp_path):
    assert end_since(tmp_path, 0.0) is None
    write_end(tmp_path, 1, 64, DataError("image x"))
    now = time.time()
    assert end_since(tmp_path, now)["code"] == 3
    os.utime(tmp_path / "exit.json", (now - 60, now - 60))
    assert end_since(tmp_path, now) is None


def test_a_new_claim_forgets_the_last_end(tmp_path):
    write_end(tmp_path, 1, 64, Stopped("SIGTERM"))
    _, lock = claim_run(tmp_path)
    assert not (tmp_path / "exit.json").exists()
    lock.close()


def test_batch_arithmetic():
    assert batch_equation(QUICKSTART, 2).startswith("batch 32 = 2 ranks x 16 images x 1 accumulations")
    with pytest.raises(WorldSizeError, match="legal world sizes: 1, 2, 4, 8, 16, 32"):
        check_world_size(QUICKSTART, 3)
    odd = load_config(ROOT / "configs" / "quickstart.json", ["train.micro_batch_size=5"])
    with pytest.raises(ConfigError, match="micro_batch_size 5"):
        check_world_size(odd, 1)


def test_memory_is_the_zero_papers():
    # arXiv 1910.02054, section 5: 16-bit weights and gradients, 12 bytes of optimizer state a parameter; EMA 4 more, sharded
    p = 1_000_000
    assert memory_bytes(p, 64, 1, "bf16") == pytest.approx(2 * p + 2 * p + 16 * p / 64, rel=0.9)
    assert memory_bytes(p, 64, 3, "bf16") == pytest.approx((2 + 2 + 4 + 4) * p / 64 + 8 * p / 64, rel=1e-6)
    assert memory_bytes(p, 1, 0, "fp32") == (4 + 4 + 8 + 4) * p
    sizes = [memory_bytes(p, 8, stage, "bf16") for stage in range(4)]
    assert sizes == sorted(sizes, reverse=True)
