"""What the tests of the benchmark share besides fixtures."""

from __future__ import annotations

from backdoorlab.benchmark import MethodSpec
from backdoorlab.data.sources import DatasetSpec
from backdoorlab.tasks import TaskSpec

TINY = TaskSpec(
    dataset=DatasetSpec(train_size=400, test_size=120),
    recipe="smoke",
    recipe_changes=(("epochs", 1), ("min_steps", 60)),
)
BADNETS = MethodSpec("badnets")
FT = MethodSpec("ft", {"epochs": 4, "batch_size": 16})
