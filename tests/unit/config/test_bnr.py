"""BNR paths: constants, power laws and tables, and how they are described."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from warm_dist.config.bnr import ConstantBNR, PowerBNR, TableBNR, as_path, describe
from warm_dist.config.values import exact

SIGMA = torch.tensor([0.0, 0.002, 0.3, 1.0, 4.0, 80.0], dtype=torch.float64)


def test_a_number_is_a_constant_path():
    torch.testing.assert_close(as_path(0.5).alpha(SIGMA), 0.5 * SIGMA)
    assert as_path(0) == ConstantBNR(bnr=0)


@pytest.mark.parametrize("exponent", [-0.9, -0.3, 0.0, 0.7])
def test_power_law(exponent):
    """Fault: NaN at sigma 0 for a negative exponent, or a cap that bounds alpha in place of the ratio alpha / sigma."""
    alpha = PowerBNR(kind="power", bnr=0.5, exponent=exponent, sigma_ref=2.0).alpha(SIGMA)
    assert float(alpha[0]) == 0.0  # no 0 · infinity
    torch.testing.assert_close(alpha[1:] / SIGMA[1:], 0.5 * (SIGMA[1:] / 2) ** exponent)
    assert bool((alpha.diff() > 0).all())
    capped = PowerBNR(kind="power", bnr=0.5, exponent=exponent, sigma_ref=2.0, cap=0.6).alpha(SIGMA)
    torch.testing.assert_close(capped, torch.minimum(alpha, 0.6 * SIGMA))


def test_table_goes_through_its_rows_and_keeps_their_ratio_outside():
    table = TableBNR(kind="table", sigma=(0.3, 1.0, 4.0), bnr=(1.0, 0.5, 0.25))
    ratio = table.alpha(SIGMA)[1:] / SIGMA[1:]
    torch.testing.assert_close(ratio, torch.tensor([1.0, 1.0, 0.5, 0.25, 0.25], dtype=torch.float64))
    torch.testing.assert_close(table.alpha(torch.tensor([2.5])).double(), torch.tensor([0.75]).double())  # 0.5 … 1 px
    one = TableBNR(kind="table", sigma=(1.0,), bnr=(0.3,))
    torch.testing.assert_close(one.alpha(SIGMA), 0.3 * SIGMA)


@pytest.mark.parametrize(("sigma", "bnr", "words"), [
    ((1.0, 0.5), (1.0, 1.0), "must rise"),
    ((1.0, 2.0), (1.0, 0.4), "must not fall"),
    ((1.0, 2.0), (1.0,), "as many"),
    ((), (), "at least 1"),
])  # fmt: skip
def test_tables_that_are_no_path_are_refused(sigma, bnr, words):
    with pytest.raises(ValidationError, match=words):
        TableBNR(kind="table", sigma=sigma, bnr=bnr)


def test_description_names_what_matters():
    """Fault: a parameter of a path is missing from its description, or one that is null appears in it."""
    assert describe(0.5) == "0.5"
    assert describe(PowerBNR(kind="power", bnr=0.5, exponent=0.2)) == "power(bnr 0.5, exponent 0.2, sigma_ref 1.0)"


def test_descriptions_of_different_numbers_differ():
    assert [describe(value) for value in (0, 1.0, 0.65, 10.0, None)] == ["0", "1", "0.65", "10", "none"]
    assert describe(0.1234567) == "0.1234567"
    assert describe(0.12345671) == "0.12345671"
    assert exact(1e-05) == "1e-05"
    assert exact(1234567.0) == "1234567.0"
    assert exact(float("inf")) == "inf"
