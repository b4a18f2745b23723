"""What many tests share: one embedded S3 server, and one small data set on it."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch

from tests.support.packed import Packed
from warm_dist import errors
from warm_dist.store.seaweedfs import S3Server

pytest_plugins = ["pytester"]
pytest.register_assert_rewrite("tests.support.store_contract")

hypothesis.settings.register_profile("tests", deadline=None)  # a busy machine is no failure
hypothesis.settings.load_profile("tests")

# two workers on two cores: threads beyond these only wait for one another
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

# a shell's background job ignores Ctrl-C, and so would every process that a test starts and interrupts
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The unit tier first, then files in the order of the time that they may take.

    The longest begin first, so that no worker is left alone with one at the end; without workers the quick ones do.
    """
    longest: dict[Path, float] = {}
    for item in items:
        timeout = item.get_closest_marker("timeout")
        longest[item.path] = max(longest.get(item.path, 0), timeout.args[0] if timeout else 0)
    sign = -1 if "PYTEST_XDIST_WORKER" in os.environ else 1
    items.sort(key=lambda item: (not item.nodeid.startswith("tests/unit/"), sign * longest[item.path]))


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A running S3 server with the bucket `warm-dist`; its credentials are in the environment."""
    with S3Server(tmp_path_factory.mktemp("s3"), "warm-dist") as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.env.items():
            patch.setenv(name, value)
        yield server


@pytest.fixture(scope="session")
def digits(s3: S3Server) -> Packed:
    """scikit-learn's 1,797 digits, 8x8 grey, 10 classes, in shards of 500."""
    from data_pipelines.pack import pack
    from data_pipelines.sources.open import open_source

    url = "s3://warm-dist/digits8"
    return Packed(url, s3.endpoint_url, pack(open_source("digits", 8), url, s3.endpoint_url, shard_size=500))


@pytest.fixture(autouse=True)
def nothing_printed_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines that a process prints once are printed in each test."""
    monkeypatch.setattr(errors, "_printed", set())
