"""The unit tier: no process, no socket; its data set lies in a folder."""

from __future__ import annotations

from collections.abc import Generator, Iterator

import pytest

from tests.support.packed import Packed
from tests.unit.guard import Guard

GUARD = Guard()


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    with GUARD.reading():
        report = yield
    if caught := GUARD.taken():
        report.outcome, report.longrepr = "failed", caught[0]
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup() -> Iterator[None]:
    with GUARD.watching():
        yield


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Iterator[None]:
    with GUARD.watching():
        yield


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown() -> Iterator[None]:
    with GUARD.watching():
        yield


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Packed:
    """scikit-learn's 1,797 digits, 8x8 grey, 10 classes, in shards of 500, in a folder."""
    from data_pipelines.pack import pack
    from data_pipelines.sources.open import open_source

    url = str(tmp_path_factory.mktemp("digits"))
    return Packed(url, None, pack(open_source("digits", 8), url, shard_size=500))
