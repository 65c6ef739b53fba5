"""The clean surrogate."""

from __future__ import annotations

import dataclasses

import torch

from attack_tools import GREY, tiny_task
from backdoorlab.data.split import Split
from backdoorlab.training import Context


def test_surrogate_is_shared_between_runs_but_not_between_data() -> None:
    from backdoorlab.attacks.common.surrogate import clean_surrogate, surrogate_spec

    task, context = tiny_task(GREY), Context(seed=1)
    first, second = clean_surrogate(task, context), clean_surrogate(task, context.child("another run"))
    for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert not any(p.requires_grad for p in first.parameters())
    inputs = task.train.inputs.clone()
    inputs[0, 0, 0, 0] ^= 1
    split = Split(inputs, task.train.labels, task.train.classes)
    other = dataclasses.replace(task, dataset=dataclasses.replace(task.dataset, train=split))
    assert surrogate_spec(other) != surrogate_spec(task)
