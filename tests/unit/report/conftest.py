"""Three made-up runs, an evaluation, and their page."""

from __future__ import annotations

import pytest

from tests.support.report_runs import Made, make


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make(tmp_path_factory.mktemp("report"))
