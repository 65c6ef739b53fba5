"""Samples through a classifier are counted, forward and backward."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from backdoorlab.models.anatomy import features
from backdoorlab.models.classifier import Classifier
from backdoorlab.models.passes import Passes, counted
from backdoorlab.tasks import Task
from backdoorlab.training import Context, Recipe, predict


def test_forward_and_backward_samples(benign_digits: Classifier, digits_task: Task) -> None:
    images = digits_task.test.inputs[:12].float() / 255
    with counted() as outer:
        with torch.no_grad():
            benign_digits(images)
        with counted() as inner:
            x = images[:5].clone().requires_grad_()
            loss = F.cross_entropy(benign_digits(x), digits_task.test.labels[:5])
            for _ in range(2):
                torch.autograd.grad(loss, x, retain_graph=True)
        predict(benign_digits, digits_task.test.inputs[:7])
        features(benign_digits, images[:3])
    assert inner == Passes(5, 10)
    assert outer == Passes(12 + 5 + 7 + 3, 10)
    benign_digits(images)
    assert outer.forward == 27


def test_a_training_passes_each_sample_once_an_epoch(digits_task: Task) -> None:
    recipe = Recipe(epochs=3, batch_size=16, lr=0.01)
    with counted() as passes:
        digits_task.fit(digits_task.train[torch.arange(64)], Context(), recipe=recipe)
    assert passes == Passes(3 * 64, 3 * 64)
