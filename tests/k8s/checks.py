"""All checks of the manifests, by the names of their functions: each file registers its own."""

from tests.k8s import failures, invariants, monitoring, network, queueing, references, trainings, validity  # noqa: F401
from tests.k8s.world import CHECKS, World, findings

__all__ = ["CHECKS", "World", "findings"]
