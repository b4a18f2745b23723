"""Every check tells of the mistakes it is there for, by the name of the object, and no other check cries with it."""

from __future__ import annotations

import pytest

from tests.k8s.checks import CHECKS, World, findings
from tests.k8s.crds import crds
from tests.k8s.mistakes import AREAS, MISTAKES, plant
from tests.k8s.render import objects_of


@pytest.mark.parametrize("area", AREAS)
def test_mistakes_are_caught(area: str):
    wrong = {}
    for mistake in AREAS[area]:
        wanted = {
            name for name in mistake.checks.split() if not name.startswith("KSV-")
        }  # those are trivy's: test_scanners
        wanted -= set() if crds() else {"custom_schema"}  # test_manifests tells that nothing was checked
        found = findings(World(plant(objects_of(mistake.world), mistake)))
        named = any((mistake.told or mistake.target) in message for messages in found.values() for message in messages)
        if found.keys() != wanted or named != bool(wanted):
            wrong[mistake.what] = found
    assert wrong == {}


def test_no_check_is_without_a_mistake():
    assert CHECKS.keys() == {
        name for mistake in MISTAKES for name in mistake.checks.split() if not name.startswith("KSV-")
    }


def test_mistakes_have_names_of_their_own():
    assert len({mistake.what for mistake in MISTAKES}) == len(MISTAKES)
