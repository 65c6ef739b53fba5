"""Sample distinguishing: the measure on constructed models, the division of a set, and its effect."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from backdoorlab.data.split import Split
from backdoorlab.defenses.common import sensitivity as module
from backdoorlab.defenses.common.sensitivity import centroid_similarity, feature_distance, sensitivity
from backdoorlab.defenses.dataset.sd import SampleDistinguishing
from backdoorlab.defenses.view import DefenderView
from backdoorlab.modalities.image import ImageModality
from backdoorlab.models.classifier import Classifier
from backdoorlab.testing import tiny_task
from backdoorlab.training import Context
from effect_tools import Numbers, case, effects, least, screened

SIDE = 9


class Reader(nn.Module):
    """Features of a picture: its mean, and the value of its top left pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(torch.stack([x.mean((1, 2, 3)), x[:, 0, 0, 0]], 1))


def reader() -> Classifier:
    with torch.random.fork_rng(devices=[]):
        return Classifier(Reader(), ImageModality(1, SIDE, SIDE), "reader", 3).eval()


def marked(count: int = 6) -> Tensor:
    """Dark pictures; in each second one the top left pixel is white."""
    images = torch.zeros(count, 1, SIDE, SIDE, dtype=torch.uint8)
    images[1::2, :, 0, 0] = 255
    return images


def test_the_distance_by_hand() -> None:
    first, second = torch.zeros(2, 1, SIDE, SIDE), torch.zeros(2, 1, SIDE, SIDE)
    second[1] = 0.5
    found = feature_distance(reader(), first, second, normalise=False)
    torch.testing.assert_close(found, torch.tensor([0.0, (0.25 + 0.25) / 2]))


def test_normalised_features_differ_in_direction_only() -> None:
    first, second = torch.full((1, 1, SIDE, SIDE), 0.2), torch.full((1, 1, SIDE, SIDE), 0.8)
    found = feature_distance(reader(), first, second, normalise=True)
    torch.testing.assert_close(found, torch.zeros(1), atol=1e-10, rtol=0)


def test_pictures_whose_mark_is_moved_are_sensitive() -> None:
    data = Split(marked(), torch.zeros(6, dtype=torch.int64), ("a", "b", "c"))
    model = reader()
    found = sensitivity(model, data, Context(), transforms=5, normalise=False, batch_size=4)
    assert (found.dtype, found.shape) == (torch.float32, (6,))
    assert found[::2].tolist() == [0, 0, 0]
    assert bool((found[1::2] > 0.2).all())
    assert torch.equal(found, sensitivity(model, data, Context(), transforms=5, normalise=False, batch_size=4))


def test_the_mean_over_transformations_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    levels = iter([0.2, 0.4])

    def constant(images: Tensor, generator: torch.Generator, degrees: float, shift: float) -> Tensor:
        assert (degrees, shift) == (180, 0.2)
        return torch.full_like(images, next(levels))

    monkeypatch.setattr(module, "turned_and_shifted", constant)
    data = Split(marked(1), torch.zeros(1, dtype=torch.int64), ("a", "b", "c"))
    found = sensitivity(reader(), data, Context(), transforms=2, normalise=False)
    torch.testing.assert_close(found, torch.tensor([(0.04 + 0.16) / 2]))


def test_similarity_of_centroids_by_hand() -> None:
    """Classes 0 and 2 at right angles, 3 between them; 1 does not occur."""
    found = torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
    labels = torch.tensor([0, 0, 2, 3])
    assert float(centroid_similarity(found, labels, 4)) == pytest.approx((0 + 2 * 0.5**0.5) / 3)
    assert float(centroid_similarity(found[:2], labels[:2], 4)) == 0


def test_each_class_is_trusted_and_the_most_sensitive_are_suspected() -> None:
    scores = torch.arange(20.0)
    labels = torch.arange(20) // 10  # class 1 is more sensitive as a whole
    trusted, suspected = SampleDistinguishing(trusted=0.2, suspected=0.15).divided(scores, labels)
    assert trusted.nonzero().flatten().tolist() == [0, 1, 10, 11]
    assert suspected.nonzero().flatten().tolist() == [17, 18, 19]


def test_nothing_is_both() -> None:
    scores, labels = torch.tensor([0.0, 1.0, 9.0]), torch.tensor([0, 0, 1])
    trusted, suspected = SampleDistinguishing(trusted=0.5, suspected=0.5).divided(scores, labels)
    assert trusted.tolist() == [True, False, True]
    assert suspected.tolist() == [False, True, False]
    nobody = SampleDistinguishing().divided(torch.tensor([1.0, 2.0]), torch.tensor([0, 1]))
    assert [part.tolist() for part in nobody] == [[True, True], [False, False]]


def test_without_separation_the_first_training_decides() -> None:
    task = tiny_task()
    view = DefenderView(suspicious=task.train, blueprint=task.blueprint)
    with_it, without = (
        SampleDistinguishing(separate=share, transforms=1).apply(view, Context(1)).scores for share in (0.1, 0.0)
    )
    assert not torch.equal(with_it, without)


@case("defense/dataset/sd", auroc=least(0.7), tpr=least(0.2))
def effect_of_sd(seed: int) -> Numbers:
    return screened(seed, SampleDistinguishing())


test_effect = effects(__name__)
