"""Shared fixtures: one small task and a few trained models, made once for the whole run."""

from __future__ import annotations

import os
from pathlib import Path

# Small networks gain nothing from a second thread, and two test workers with two threads each slow one another down
# tenfold; subprocesses inherit this.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from backdoorlab.attacks import Backdoor, attacks
from backdoorlab.models import Classifier
from backdoorlab.tasks import Task, TaskSpec
from backdoorlab.training import Context, context

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


REAL_FAST_BF16 = context.fast_bf16


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Contracts and oracles compute in fp32 on every machine; effects, and what is marked so, as users do."""
    native = any(item.get_closest_marker(name) for name in ("effect", "slow", "auto_precision"))
    context.fast_bf16 = REAL_FAST_BF16 if native else lambda device: False


@pytest.fixture(scope="session")
def digits_task() -> Task:
    """Embedded digits, 16x16, trained in about two seconds; in fp32, whichever test asks first."""
    return Task.load(TaskSpec(recipe="smoke", recipe_changes=(("precision", "fp32"),)))


@pytest.fixture(scope="session")
def badnets_digits(digits_task: Task) -> Backdoor:
    """BadNets on digits; treat as read-only."""
    return attacks.get("badnets", "image")(poison_rate=0.1).run(digits_task, Context())


@pytest.fixture(scope="session")
def benign_digits(digits_task: Task) -> Classifier:
    """A benign model of the same recipe; treat as read-only."""
    model, _ = digits_task.fit(digits_task.train, Context())
    return model


@pytest.fixture(scope="session")
def data_root() -> Path:
    """Folder with the real data sets, or a skip with the reason."""
    root = os.environ.get("BACKDOORLAB_DATA")
    if not root or not Path(root).is_dir():
        pytest.skip("set BACKDOORLAB_DATA to the folder with the real data sets")
    return Path(root)


@pytest.fixture(autouse=True)
def _rng_untouched(request: pytest.FixtureRequest) -> object:
    """Library code must not draw from torch's global generator."""
    before = torch.random.get_rng_state()
    yield
    if "slow" not in request.keywords:
        assert torch.equal(before, torch.random.get_rng_state()), "a test or the library used torch's global generator"
