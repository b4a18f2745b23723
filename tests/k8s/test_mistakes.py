"""Every check tells of the mistakes it is there for, by the name of the object, and no other check cries with it."""

from __future__ import annotations

import pytest

from tests.k8s.checks import CHECKS, NEED_CRDS, findings
from tests.k8s.crds import lacking, need_crds
from tests.k8s.mistakes import MISTAKES, Mistake, plant
from tests.k8s.render import world


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.what.replace(" ", "-"))
def test_a_mistake_is_caught(mistake: Mistake):
    wanted = set(mistake.checks.split())
    checks = CHECKS
    if lacking():
        if wanted & {check.__name__ for check in NEED_CRDS}:
            need_crds()
        checks = [check for check in CHECKS if check not in NEED_CRDS]
    objects = world(mistake.world)
    plant(objects, mistake)
    found = findings(objects, checks)
    assert found.keys() == wanted, found
    told = mistake.told or mistake.target
    assert any(told in message for messages in found.values() for message in messages), found


def test_no_check_is_without_a_mistake():
    assert {check.__name__ for check in CHECKS} == {name for mistake in MISTAKES for name in mistake.checks.split()}


def test_mistakes_have_names_of_their_own():
    assert len({mistake.what for mistake in MISTAKES}) == len(MISTAKES) >= 25
