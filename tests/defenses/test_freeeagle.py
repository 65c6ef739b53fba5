"""FreeEagle: where networks can be split, the matrix of class pairs of a constructed head, and its verdict."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from backdoorlab.attacks import Backdoor
from backdoorlab.core.errors import InputError
from backdoorlab.core.seeding import isolated_rng
from backdoorlab.defenses import DefenderView
from backdoorlab.defenses.model.freeeagle import FreeEagle, anomaly_metric, class_matrix, find_cuts, lean
from backdoorlab.modalities.image import ImageModality
from backdoorlab.models import Classifier, build_model
from backdoorlab.models.anatomy import frozen
from backdoorlab.training import Context
from effect_tools import Numbers, case, effects, least, most, scanned


class Headed(nn.Module):
    """A known head on rectified features: unit k speaks for class k, and all of them a little for ``favoured``."""

    def __init__(self, classes: int, favoured: int | None) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Flatten(), nn.Linear(16, classes), nn.ReLU())
        self.linear = nn.Linear(classes, classes, bias=False)
        weight = torch.eye(classes) * 2 - 0.2
        if favoured is not None:
            weight[favoured] += 0.9
        with torch.no_grad():
            self.linear.weight.copy_(weight)
            self.features[1].weight.copy_(torch.randn(classes, 16, generator=torch.Generator().manual_seed(0)))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.linear(self.features(x))
        return logits


def headed(classes: int, favoured: int | None) -> Classifier:
    with isolated_rng(0):
        return Classifier(Headed(classes, favoured), ImageModality(1, 4, 4, crop=0), "headed", classes).eval()


def test_matrix_columns_and_metric_by_hand() -> None:
    logits = torch.tensor([[4.0, 0.0, 1.0], [0.0, 3.0, 2.0], [0.0, 0.0, 5.0]])
    matrix = class_matrix(logits)
    wanted = logits.double().exp().numpy()
    wanted /= wanted.sum(1, keepdims=True)
    np.fill_diagonal(wanted, 0)
    np.testing.assert_allclose(matrix.numpy(), wanted, atol=1e-6)
    np.testing.assert_allclose(lean(matrix).numpy(), wanted.sum(0) / 2, atol=1e-6)
    values = np.array([0.1, 0.12, 0.11, 0.5, 0.13, 0.09])
    q1, q3 = np.quantile(values, [0.25, 0.75])
    assert anomaly_metric(torch.tensor(values)) == pytest.approx((0.5 - q3) / (q3 - q1))
    assert anomaly_metric(torch.tensor([0.2, 0.1])) == pytest.approx(2.0)
    assert np.isfinite(anomaly_metric(torch.zeros(6)))


def test_a_favoured_class_stands_out_of_a_constructed_head() -> None:
    """Only the head differs. The optimal representation of c lies along unit c; its column is known in closed form."""
    found = {}
    for favoured in (None, 5):
        report = FreeEagle(steps=400).run(DefenderView(model=headed(8, favoured)), Context())
        found[favoured] = report
        matrix = report.recovered["matrix"]
        assert matrix.shape == (8, 8) and float(matrix.diagonal().abs().max()) == 0
        assert report.per_class == pytest.approx((matrix.double().sum(0) / 7).tolist())
    assert found[5].targets == (5,) and found[5].score > 10 * max(1.0, found[None].score)
    assert max(found[None].per_class) < 2 * min(found[None].per_class)


def test_representations_stay_where_rectified_features_can_be() -> None:
    model = headed(6, None)
    with frozen(model):
        cuts = {cut.name: cut for cut in find_cuts(model, torch.Generator().manual_seed(0))}
    assert cuts["net.features"].rectified and not cuts["net.features.1"].rectified
    assert FreeEagle(depth=0.1).choose(list(cuts.values()), model).rectified
    assert FreeEagle(layer="net.features.1").choose(list(cuts.values()), model).name == "net.features.1"
    with pytest.raises(InputError, match=r"cannot be split at 'net\.featurs'.*net\.features"):
        FreeEagle(layer="net.featurs").choose(list(cuts.values()), model)


def test_a_branch_is_no_cut() -> None:
    """Inside a block with a shortcut nothing passes through one layer alone."""
    model = build_model("preact_resnet8", ImageModality(1, 16, 16, crop=0), 4).eval()
    with frozen(model):
        names = {cut.name for cut in find_cuts(model, torch.Generator().manual_seed(0))}
    assert {"net.conv1", "net.layer2.0.bn1", "net.layer2", "net.layer3", "net.pool"} <= names
    inside = ("0.conv1", "0.bn2", "0.conv2", "shortcut")
    assert not [name for name in names if name.endswith(inside)]
    assert "net.linear" not in names


def test_reads_nothing_but_the_model_and_leaves_it_alone(badnets_digits: Backdoor) -> None:
    model = badnets_digits.model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = FreeEagle(steps=20).scan(model, device="cpu", progress=False)
    assert len(report.per_class) == 10
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@case("defense/model/freeeagle", accused=least(1), benign_accused=most(0), score=least(2.2), benign_score=most(2.0))
def badnets(seed: int) -> Numbers:
    return scanned(seed, FreeEagle(steps=300))[2]


test_effect = effects(__name__)
