from __future__ import annotations

import pytest
import torch
from benchmark_cases import BADNETS, FT, TINY

from backdoorlab.benchmark import Experiment, Runner, Store


@pytest.fixture(autouse=True)
def _one_thread():
    """Small problems are slower on two threads, and equal numbers of threads give equal bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Runner:
    """A runner over a store with one attack, one benign model and fine-tuning of both; treat as read-only."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    runner = Runner(Store(tmp_path_factory.mktemp("filled") / "store"))
    for attack in (BADNETS, None):
        assert runner.run(Experiment(task=TINY, attack=attack, defense=FT)).card.status == "ok"
    torch.set_num_threads(before)
    return runner
