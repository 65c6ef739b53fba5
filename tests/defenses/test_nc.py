"""NC as a repair: the unlearning objective by hand, what it does where nothing is found, and its effect."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from backdoorlab.attacks import Backdoor
from backdoorlab.core.errors import InputError
from backdoorlab.data.sources import balanced_subset
from backdoorlab.data.split import Split
from backdoorlab.defenses import DefenderView
from backdoorlab.defenses.common.inversion import verdict
from backdoorlab.defenses.model.neural_cleanse import NeuralCleanse
from backdoorlab.defenses.repair import nc
from backdoorlab.defenses.repair.nc import NeuralCleanseRepair, unlearning
from backdoorlab.modalities.text import TextModality
from backdoorlab.models import build_model
from backdoorlab.tasks import Task
from backdoorlab.training import Context
from effect_tools import Numbers, case, effects, least, most, repaired

SHORT = {"epochs": 1, "batch_size": 16, "min_steps": 2}


@pytest.fixture(scope="module")
def few(digits_task: Task) -> Split:
    return balanced_subset(digits_task.train, 40, 0, "digits training set")


def test_the_last_fifth_of_a_batch_is_stamped_and_keeps_its_labels(badnets_digits: Backdoor, few: Split) -> None:
    model = badnets_digits.model
    x, labels = model.modality.prepare(few.inputs[:10]), few.labels[:10]
    generator = torch.Generator().manual_seed(0)
    recovered = {name: torch.rand(10, 1, 16, 16, generator=generator) for name in ("mask", "pattern")}
    with torch.no_grad():
        found = unlearning(model, recovered, (3, 7), 0.2)(model, x, labels, torch.arange(10))
        expected = x.clone()
        for row, k in ((8, 3), (9, 7)):
            m, p = recovered["mask"][k], recovered["pattern"][k]
            expected[row] = (1 - m) * x[row] + m * p
        assert float(found) == pytest.approx(float(F.cross_entropy(model(expected), labels)), rel=1e-4)
        one = unlearning(model, recovered, (3,), 0.01)(model, x[:2], labels[:2], torch.arange(2))
        m, p = recovered["mask"][3], recovered["pattern"][3]
        both = torch.stack([x[0], (1 - m) * x[1] + m * p])
        assert float(one) == pytest.approx(float(F.cross_entropy(model(both), labels[:2])), rel=1e-4)


def test_texts_are_stamped_with_prompts_where_words_are_inserted() -> None:
    modality = TextModality(("<pad>", "<unk>", "cf", "mn", "bb", "tq", "mb", "a", "good", "film", "bad"), max_len=8)
    model = build_model("textcnn", modality, 3).eval()
    ids = modality.encode(np.array(["a good film", "bad film", "film", "a bad film", "good"], dtype=object))
    labels = torch.tensor([0, 1, 2, 1, 0])
    with torch.no_grad():
        words = model.net.embed(torch.tensor([[2], [8], [9]]))  # a trigger word for each class
        found = unlearning(model, {"prompt": words, "nearest": torch.zeros(3, 1)}, (1,), 0.2)(
            model, ids, labels, torch.arange(5)
        )
        stamped = ids.clone()
        stamped[4] = torch.cat([torch.tensor([8]), ids[4, :-1]])
        assert float(found) == pytest.approx(float(F.cross_entropy(model(stamped), labels)), rel=1e-4)


def test_the_scan_is_that_of_neural_cleanse(badnets_digits: Backdoor, few: Split) -> None:
    """The same settings and generators of its own name; the costs agree where the name does not matter."""
    scan, repair = NeuralCleanse(**SHORT), NeuralCleanseRepair(**SHORT)
    shared = {k: v for k, v in scan.settings().items() if k in repair.settings()}
    assert shared == {k: repair.settings()[k] for k in shared} and len(shared) >= 12
    costs, _ = repair.invert(badnets_digits.model, few, Context())
    score, targets = verdict(costs, repair.anomaly_threshold)
    assert np.isfinite(score) and len(targets) <= 10


def test_where_nothing_is_suspected_the_model_stays_and_the_card_says_so(
    badnets_digits: Backdoor, few: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nc, "verdict", lambda costs, threshold: (0.5, ()))
    ctx = Context()
    model = NeuralCleanseRepair(**SHORT).run(DefenderView(model=badnets_digits.model, clean=few), ctx)
    assert model is not badnets_digits.model and not model.training
    before = badnets_digits.model.state_dict()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert ["no class is suspected" in text for text in ctx.warnings] == [True]


def test_the_given_model_is_left_as_it_was(
    badnets_digits: Backdoor, few: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nc, "verdict", lambda costs, threshold: (5.0, (0,)))
    before = copy.deepcopy(badnets_digits.model.state_dict())
    model = NeuralCleanseRepair(**SHORT, tune_epochs=2).run(
        DefenderView(model=badnets_digits.model, clean=few), Context()
    )
    assert all(torch.equal(value, before[name]) for name, value in badnets_digits.model.state_dict().items())
    assert all(p.requires_grad for p in badnets_digits.model.parameters())
    assert any(not torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(InputError, match="nc needs clean samples"):
        NeuralCleanseRepair().run(DefenderView(model=badnets_digits.model, clean=few[torch.arange(0)]), Context())


@case(
    "defense/repair/nc",
    fragile="in fp32 no class is suspected, so nothing is repaired",
    asr_before=least(0.85),
    asr_lost=least(0.5),
    acc_lost=most(0.08),
    benign_lost=most(0.05),
)
def unlearned(seed: int) -> Numbers:
    """What a false alarm costs a benign model, too."""
    method = NeuralCleanseRepair(epochs=40, batch_size=32, min_steps=3, patience=3, tune_epochs=40)
    return repaired(seed, method, harmless=True)


test_effect = effects(__name__)
