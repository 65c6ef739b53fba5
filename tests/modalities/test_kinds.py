"""Code that serves one modality, or one kind of model, refuses others with one line."""

from __future__ import annotations

import pytest
import torch

from backdoorlab.attacks.triggers.patch import PatchTrigger
from backdoorlab.attacks.triggers.pixels import constant_blend, key_of
from backdoorlab.core.errors import InputError
from backdoorlab.modalities.audio import AudioModality
from backdoorlab.modalities.base import Modality, expect_modality
from backdoorlab.modalities.image import ImageModality
from backdoorlab.modalities.text import TextModality
from backdoorlab.modalities.video import VideoModality
from backdoorlab.models.classifier import models
from backdoorlab.models.persistence import StoredModel
from backdoorlab.tasks import Task
from backdoorlab.testing import tiny_task
from backdoorlab.training.context import Context


def test_the_expected_kind_passes() -> None:
    modality = AudioModality(8000, 4000)
    assert expect_modality(modality, AudioModality) is modality


@pytest.mark.parametrize(
    ("name", "modality", "other"),
    [
        ("convnet3", "image", TextModality()),
        ("textcnn", "text", ImageModality()),
        ("audio_cnn", "audio", VideoModality()),
        ("cnn3d_small", "video", AudioModality()),
    ],
)
def test_a_builder_refuses_another_modality(name: str, modality: str, other: Modality) -> None:
    with pytest.raises(InputError, match=f"expected {modality} data, got {other.name} data"):
        models.get(name, modality)().build(other, 2)


def test_a_task_refuses_a_model_of_another_kind() -> None:
    class Other(StoredModel):
        """Not a classifier."""

        kind = "kind-of-a-test"

    task: Task = tiny_task("image")
    with pytest.raises(InputError, match="measures classifiers, got a model of kind 'kind-of-a-test'"):
        task.measure_benign(Other(), Context())


def test_only_blends_have_a_key() -> None:
    key = torch.arange(12, dtype=torch.uint8).reshape(3, 2, 2)
    assert torch.equal(key_of(constant_blend(key, 0.2)), key)
    with pytest.raises(InputError, match=r"kind 'image\.patch' has no key image"):
        key_of(PatchTrigger(key, torch.ones(2, 2, dtype=torch.bool)))
