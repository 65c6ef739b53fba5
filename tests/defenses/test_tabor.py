"""TABOR: its terms by hand, a linear model with a known trigger, and its verdict."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backdoorlab.core.errors import NotApplicable
from backdoorlab.core.seeding import isolated_rng
from backdoorlab.data.split import Split
from backdoorlab.defenses import DefenderView
from backdoorlab.defenses.common.inversion import MaskedPatterns
from backdoorlab.defenses.model.tabor import Tabor, elastic, qualities, quality_verdict, total_variation
from backdoorlab.modalities.image import ImageModality
from backdoorlab.modalities.text import TextModality
from backdoorlab.models import Classifier, build_model
from backdoorlab.training import Context
from effect_tools import Numbers, case, effects, least, most, scanned


def test_terms_by_hand() -> None:
    values = torch.tensor([[[[0.5, -1.0], [0.0, 2.0]]]])
    assert elastic(values).tolist() == [3.5 + 0.25 + 1 + 4]
    assert total_variation(values).tolist() == [0.25 + 9 + 1.5**2 + 2**2]
    assert total_variation(torch.tensor([[0.0, 1.0, 3.0]])).tolist() == [5.0]
    rgb = torch.zeros(1, 3, 2, 2)
    rgb[0, 1] = 7.0  # no neighbours across channels
    assert total_variation(rgb).tolist() == [0.0]


class Marked(nn.Module):
    """Six classes told apart by the mean grey in a stripe each; the pixel at (0, 0) adds to class 4 if it is bright."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 6)
        weight = torch.zeros(6, 8, 8)
        for k in range(6):
            weight[k, 2 + k] = 2.0
        weight[4, 0, 0] = 60.0
        with torch.no_grad():
            self.linear.weight.copy_(weight.flatten(1))
            self.linear.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.linear(x.flatten(1))
        return logits


def stripes(count: int = 60) -> Split:
    labels = torch.arange(count) % 6
    images = torch.zeros(count, 1, 8, 8, dtype=torch.uint8)
    for row, label in enumerate(labels.tolist()):
        images[row, 0, 2 + label] = 150
    return Split(images, labels, tuple("abcdef"))


@pytest.fixture(scope="module")
def marked() -> Classifier:
    with isolated_rng(0):
        return Classifier(Marked(), ImageModality(1, 8, 8, crop=0), "marked", 6).eval()


def test_the_penalty_is_the_sum_of_the_four_terms(marked: Classifier) -> None:
    x = marked.modality.prepare(stripes(8).inputs)
    made = MaskedPatterns(marked, x[0], torch.Generator().manual_seed(0))
    labels, classes = stripes(8).labels, torch.tensor([1, 4])
    weights = {"mask_size": 0.1, "outside_size": 0.2, "mask_rough": 0.3, "outside_rough": 0.4}
    method = Tabor(**weights, blocking=0.5, overlaying=0.6)
    found = method.penalty(made, x, labels, classes)
    assert found is not None and found.requires_grad
    for row, k in enumerate(classes.tolist()):
        m, p = made.tensors()["mask"][k], made.tensors()["pattern"][k]
        outside = (1 - m) * p
        wanted = 0.0
        for value, size, rough in ((m, 0.1, 0.3), (outside, 0.2, 0.4)):
            wanted += size * float(value.abs().sum() + value.square().sum())
            wanted += rough * float(value.diff(dim=1).square().sum() + value.diff(dim=2).square().sum())
        with torch.no_grad():
            wanted += 0.5 * float(F.cross_entropy(marked((1 - m) * x), labels))
            wanted += 0.6 * float(F.cross_entropy(marked((m * p)[None]), torch.tensor([k])))
        assert found[row].item() == pytest.approx(wanted, rel=1e-4)


def test_a_known_trigger_is_restored_and_named(marked: Classifier) -> None:
    report = Tabor(epochs=40, batch_size=30, min_steps=3, patience=3).run(
        DefenderView(model=marked, clean=stripes()), Context()
    )
    assert report.backdoored and report.targets == (4,)
    mask, pattern = report.recovered["mask"][4, 0], report.recovered["pattern"][4, 0]
    assert int(mask.argmax()) == 0 and float(mask[0, 0]) > 0.1 and float(pattern[0, 0]) > 0.5
    assert float(mask.sum()) < 3


def test_quality_and_verdict() -> None:
    found = qualities(torch.tensor([4.0, 2.0]), torch.tensor([1.0, 0.5]), torch.tensor([0.5, 0.0]), torch.ones(2), 8.0)
    assert found.tolist() == pytest.approx([math.log(0.5 / 0.5), math.log(0.25 / 0.5 / 1e-3)])
    usual = torch.tensor([-1.0, -1.1, -0.9, -1.2, -0.8, -1.0, -1.05, -5.0])
    score, targets = quality_verdict(usual, 2.0, 2.0)
    assert targets == (7,) and score > 10
    close = torch.tensor([-1.0, -1.01, -0.99, -1.02, -0.98, -1.0, -1.01, -1.2])
    assert quality_verdict(close, 2.0, 1.0)[1] == (7,)
    assert quality_verdict(close, 2.0, 2.0)[1] == ()
    few, named = quality_verdict(torch.tensor([-3.0, -1.0]), 2.0, 2.0)
    assert named == (0,) and few == pytest.approx(math.exp(2.0))
    assert quality_verdict(torch.tensor([-1.3, -1.0]), 2.0, 2.0)[1] == ()


def test_texts_have_no_masks(marked: Classifier) -> None:
    modality = TextModality(("<pad>", "<unk>", "cf", "mn", "bb", "tq", "mb", "a"), max_len=8)
    model = build_model("textcnn", modality, 3).eval()
    with pytest.raises(NotApplicable, match="texts have none"):
        Tabor().run(DefenderView(model=model, clean=stripes()), Context())


@case("defense/model/tabor", accused=least(1), benign_accused=most(0), score=least(2.5), benign_score=most(2.5))
def badnets(seed: int) -> Numbers:
    return scanned(seed, Tabor(epochs=40, batch_size=32, min_steps=3, patience=3))[2]


test_effect = effects(__name__)
