"""NAB: the stamp, pseudo labels and the detector's score by hand, the model's storage, and the effect."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from safetensors.torch import load, save

from backdoorlab.core.errors import ArtifactError, InputError
from backdoorlab.data.split import Split
from backdoorlab.defenses.input.nab import NonAdversarialBackdoorInput, StampDetector, disagreement
from backdoorlab.defenses.training import nab
from backdoorlab.defenses.training.nab import (
    NonAdversarialBackdoorTraining,
    StampedClassifier,
    nearest_centroids,
    stamp_color,
    stamped,
)
from backdoorlab.defenses.view import DefenderView
from backdoorlab.modalities.image import ImageModality
from backdoorlab.models import build_model
from backdoorlab.models.persistence import restore_model
from backdoorlab.testing import tiny_task
from backdoorlab.training import Context, predict
from effect_tools import Numbers, accuracy, benign, case, effects, least, most, task, trained

MEAN = (0.25, 0.5, 0.75)


def colored(side: int = 3) -> StampedClassifier:
    modality = ImageModality(3, 16, 16, MEAN, (0.2, 0.2, 0.2))
    return StampedClassifier(build_model("convnet3", modality, 4), side, stamp_color(modality)).eval()


def test_the_stamp_lies_in_the_top_left_corner_of_a_copy() -> None:
    images = torch.zeros(2, 3, 5, 5)
    marked = stamped(images, 2, torch.tensor(MEAN))
    assert float(images.sum()) == 0
    assert marked[1, :, 1, 1].tolist() == list(MEAN)
    assert float(marked.sum()) == pytest.approx(2 * 4 * sum(MEAN))
    assert float(marked[:, :, 2:].sum() + marked[:, :, :, 2:].sum()) == 0


def test_its_color_is_zero_after_normalisation_or_grey() -> None:
    assert stamp_color(ImageModality(3, 8, 8, MEAN, (0.2,) * 3)) == MEAN
    assert stamp_color(ImageModality(3, 8, 8)) == (0.5, 0.5, 0.5)
    assert stamp_color(ImageModality(1, 8, 8, (0.3,), (0.33,))) == (0.3,)


def test_the_model_stamps_whatever_it_is_given() -> None:
    model = colored()
    x = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(model(x), model.without_stamp(stamped(x, 3, torch.tensor(MEAN))))
        assert not torch.equal(model(x), model.without_stamp(x))


def test_the_stamp_comes_back_from_the_store_with_the_model() -> None:
    model = colored()
    tensors, record = model.state()
    stored = load(save({name: tensor.contiguous() for name, tensor in tensors["model"].items()}))
    restored = restore_model(({"model": stored}, record))
    assert isinstance(restored, StampedClassifier)
    assert (restored.side, restored.color) == (3, MEAN)
    images = torch.randint(0, 256, (9, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    assert torch.equal(predict(restored, images), predict(model, images))
    with pytest.raises(ArtifactError, match="lacks 'side'"):
        restore_model((tensors, {k: v for k, v in record.items() if k != "side"}))


def test_labels_of_the_nearest_centroids() -> None:
    found = torch.tensor([[1.0, 0.1], [5.0, 0.0], [0.0, 1.0], [0.1, 3.0], [4.0, 1.0]])
    labels = torch.tensor([0, 0, 2, 2, 2])  # the last one is mislabelled; class 1 does not occur
    used = torch.tensor([True, True, True, True, False])
    assert nearest_centroids(found, labels, used, 3).tolist() == [0, 0, 2, 2, 0]


def test_suspects_with_another_pseudo_label_are_stamped_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    mine, seen = tiny_task(), {}
    labels = mine.train.labels
    losses = torch.arange(80.0)  # the first ones are suspected
    pseudo = torch.where(torch.arange(80) % 2 == 0, (labels + 1) % 10, labels)
    monkeypatch.setattr(nab.AntiBackdoorLearning, "isolate", lambda *_: (None, losses))
    monkeypatch.setattr(NonAdversarialBackdoorTraining, "pseudo_labels", lambda *_: pseudo)
    usual = NonAdversarialBackdoorTraining.train_model

    def train(self: NonAdversarialBackdoorTraining, data: Split, marked: torch.Tensor, *rest: object) -> object:
        seen.update(data=data, marked=marked)
        return usual(self, data, marked, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(NonAdversarialBackdoorTraining, "train_model", train)
    view = DefenderView(suspicious=mine.train, blueprint=mine.blueprint)
    report = NonAdversarialBackdoorTraining(isolation=0.1).run(view, Context())
    assert seen["marked"].nonzero().flatten().tolist() == [0, 2, 4, 6]
    assert torch.equal(seen["data"].labels[:8], pseudo[:8])
    assert torch.equal(seen["data"].labels[8:], labels[8:])
    assert report.isolated is not None
    assert report.isolated.nonzero().flatten().tolist() == list(range(8))
    assert report.notes == {"suspected": 8, "stamped": 4}
    assert isinstance(report.model, StampedClassifier)


def test_a_stamp_larger_than_the_image_is_refused() -> None:
    mine = tiny_task()
    with pytest.raises(InputError, match="a stamp of 17 px does not fit images of 16x16"):
        NonAdversarialBackdoorTraining(stamp=17).run(
            DefenderView(suspicious=mine.train, blueprint=mine.blueprint), Context()
        )


def test_the_score_is_above_zero_where_the_prediction_changes() -> None:
    plain = torch.tensor([[2.0, 0.0, 0.0], [2.0, 0.0, 0.0]])
    sure = torch.tensor([[0.7, 0.2, 0.1], [0.3, 0.6, 0.1]]).log()
    assert disagreement(plain, sure).tolist() == pytest.approx([-0.5, 0.3])


def test_the_detector_compares_predictions_with_and_without_the_stamp() -> None:
    model = colored()
    images = torch.randint(0, 256, (30, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    detector = StampDetector(model, batch_size=7)
    scores = detector.score(images)
    x = model.modality.prepare(images)
    with torch.no_grad():
        changed = model.without_stamp(x).argmax(1) != model(x).argmax(1)
    assert torch.equal(detector.flags(scores), changed)
    assert detector.score(images[:0]).shape == (0,)


def test_the_detector_is_made_of_the_training_set_alone() -> None:
    mine = tiny_task()
    settings = {"contrastive": 0.5, "isolation": 0.1}
    detector = NonAdversarialBackdoorInput.build(settings).detector(
        build_model("convnet3", mine.modality, 10),
        suspicious=mine.train,
        blueprint=dataclasses.replace(mine.blueprint),
        seed=3,
        device="cpu",
    )
    assert detector.score(mine.test.inputs).shape == (20,)


SETTINGS = {"isolation": 0.2, "excluded": 0.3, "turning": 0.14, "isolation_lr": 0.1, "stamp": 4}
"""Digits are learned as fast as the trigger: more suspects, found more slowly, and a stamp that few samples teach."""


@case("defense/training/nab", asr_lost=least(0.3), acc_lost=most(0.25))
def effect_of_nab(seed: int) -> Numbers:
    return trained(seed, NonAdversarialBackdoorTraining.build(SETTINGS))[2]


@case("defense/training/nab_benign", acc_lost=most(0.25))
def effect_of_nab_benign(seed: int) -> Numbers:
    report = NonAdversarialBackdoorTraining.build(SETTINGS).run(
        DefenderView(suspicious=task(seed).train, blueprint=task(seed).blueprint), Context(seed)
    )
    return {"acc_lost": accuracy(benign(seed), task(seed).test) - accuracy(report.model, task(seed).test)}


test_effect = effects(__name__)
