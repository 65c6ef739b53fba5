"""Neural Cleanse: its schedule and verdict against slow oracles, and what it promises of the triggers it recovers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import median_abs_deviation

import effect_tools
from backdoorlab.attacks import Backdoor
from backdoorlab.core.errors import InputError, NotApplicable
from backdoorlab.data.sources import balanced_subset
from backdoorlab.data.split import Split
from backdoorlab.defenses import DefenderView
from backdoorlab.defenses.common.inversion import MaskedPatterns, Schedule, SoftPrompts, anomaly_index, verdict
from backdoorlab.defenses.model.neural_cleanse import NeuralCleanse
from backdoorlab.modalities.audio import AudioModality
from backdoorlab.modalities.text import TextModality
from backdoorlab.modalities.video import VideoModality
from backdoorlab.models import build_model
from backdoorlab.tasks import Task
from backdoorlab.training import Context
from effect_tools import PATCH, Numbers, benign, case, effects, least, most, task, victim


@pytest.fixture(scope="module")
def clean(digits_task: Task) -> Split:
    return balanced_subset(digits_task.train, 72, 0, "digits training set")


@pytest.mark.parametrize("count", [10, 43])
def test_anomaly_index_agrees_with_scipy(count: int) -> None:
    values = np.random.default_rng(count).gamma(4.0, 5.0, count)
    expected = np.abs(values - np.median(values)) / (1.4826 * median_abs_deviation(values))
    np.testing.assert_allclose(anomaly_index(torch.tensor(values)).numpy(), expected, rtol=1e-10)


def test_only_small_outliers_are_targets() -> None:
    costs = torch.tensor([20.0, 21, 19, 22, 60, 18, 23, 3, 20.5, 9])
    score, targets = verdict(costs)
    assert targets == (7, 9) and score == pytest.approx(float(anomaly_index(costs)[7]))
    assert verdict(torch.tensor([20.0, 21, 19, 22, 60, 18, 23, 20]))[1] == ()


def test_few_classes_are_judged_by_the_ratio() -> None:
    assert verdict(torch.tensor([10.0, 4.0, 11.0])) == (2.5, (1,))
    assert verdict(torch.tensor([10.0, 6.0]))[1] == ()
    assert math.isfinite(verdict(torch.tensor([0.0, 6.0]))[0])


def slow_schedule(accuracy: list[float], cost: list[float]) -> tuple[list[float], float, int]:
    """One class, written out: (lambda after each epoch, best cost, epochs until it stopped)."""
    weight, best, reference, above, below, stale, raised, lowered = 1e-3, math.inf, math.inf, 0, 0, 0, False, False
    weights: list[float] = []
    for epoch, (a, c) in enumerate(zip(accuracy, cost, strict=True)):
        if a >= 0.98 and c < best:
            best = c
        if best < math.inf:
            stale = stale + 1 if best >= 0.99 * reference else 0
        reference = min(reference, best)
        if raised and lowered and stale >= 6:
            return weights, best, epoch
        above, below = (above + 1, 0) if a >= 0.98 else (0, below + 1)
        if above >= 3:
            weight, above, raised = weight * 2, 0, True
        if below >= 3:
            weight, below, lowered = weight / 2**1.5, 0, True
        weights.append(weight)
    return weights, best, len(accuracy)


def test_schedule_agrees_with_one_class_at_a_time() -> None:
    rng = np.random.default_rng(0)
    runs = np.repeat(rng.random((20, 12)) < 0.5, 5, axis=0)  # stretches of success and failure
    accuracy, cost = np.where(runs, 0.99, 0.5), rng.uniform(5, 50, runs.shape)
    schedule = Schedule(12, 1e-3, 0.98, 3, 2.0, 6)
    for epoch in range(len(runs)):
        running = ~schedule.done
        schedule.update(torch.tensor(accuracy[epoch]), torch.tensor(cost[epoch]))
        for k in running.nonzero().flatten().tolist():
            weights, best, stopped = slow_schedule(accuracy[: epoch + 1, k].tolist(), cost[: epoch + 1, k].tolist())
            assert schedule.best[k] == best and bool(schedule.done[k]) == (stopped == epoch)
            if not schedule.done[k]:
                assert schedule.weight[k] == pytest.approx(weights[-1])
    assert schedule.done.any()


def test_stopped_classes_keep_their_best_cost() -> None:
    schedule = Schedule(1, 1e-3, 0.98, 1, 2.0, 1)
    for a, c in ((0.99, 5.0), (0.5, 5.0), (0.99, 5.0)):
        schedule.update(torch.tensor([a]), torch.tensor([c]))
    assert schedule.done.all()
    assert not schedule.update(torch.tensor([0.99]), torch.tensor([1.0])).any() and schedule.best[0] == 5.0


def test_what_is_recovered_reaches_its_class_and_the_model_stays_as_it_was(
    badnets_digits: Backdoor, clean: Split
) -> None:
    """Each kept trigger as it stands, on all clean samples, for every class that was reached."""
    model = badnets_digits.model
    before = {k: v.clone() for k, v in model.state_dict().items()}
    report = NeuralCleanse(epochs=25, batch_size=32, min_steps=3, patience=3).run(
        DefenderView(model=model, clean=clean), Context()
    )
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())
    mask, pattern = report.recovered["mask"], report.recovered["pattern"]
    assert mask.shape == (10, 1, 16, 16) and pattern.shape == (10, 1, 16, 16)
    assert mask.min() >= 0 and mask.max() <= 1 and pattern.min() >= 0 and pattern.max() <= 1
    x = model.modality.prepare(clean.inputs)
    reached = [k for k in range(10) if report.per_class[k] < 16 * 16]
    assert reached
    for k in reached:
        assert float(mask[k].sum()) == pytest.approx(report.per_class[k], rel=1e-4)
        with torch.no_grad():
            hits = model((1 - mask[k]) * x + mask[k] * pattern[k]).argmax(1) == k
        assert float(hits.float().mean()) >= 0.98


@pytest.mark.parametrize("max_rows", [7, 100, 4096])
def test_attack_accuracy_is_counted_over_all_samples(badnets_digits: Backdoor, clean: Split, max_rows: int) -> None:
    model, every = badnets_digits.model, torch.tensor([1, 4, 8])
    x = model.modality.prepare(clean.inputs)
    made = MaskedPatterns(model, x[0], torch.Generator().manual_seed(0))
    found = NeuralCleanse(max_rows=max_rows).attack_accuracy(made, clean.inputs, model.modality.prepare, every)
    m, p = made.tensors()["mask"], made.tensors()["pattern"]
    with torch.no_grad():
        wanted = [float((model((1 - m[k]) * x + m[k] * p[k]).argmax(1) == k).float().mean()) for k in (1, 4, 8)]
    assert found.tolist() == pytest.approx(wanted, abs=1e-6)
    assert len(NeuralCleanse().attack_accuracy(made, clean.inputs, model.modality.prepare, every[:0])) == 0


def test_chunks_of_classes_do_not_change_the_result(badnets_digits: Backdoor, clean: Split) -> None:
    short = {"epochs": 2, "batch_size": 16, "min_steps": 2}
    both = [
        NeuralCleanse(**short, max_rows=rows).run(DefenderView(model=badnets_digits.model, clean=clean), Context())
        for rows in (16, 4096)
    ]
    torch.testing.assert_close(both[0].recovered["mask"], both[1].recovered["mask"], atol=1e-3, rtol=0)


def test_candidates_of_the_other_continuous_modalities() -> None:
    generator = torch.Generator().manual_seed(0)
    every = torch.arange(4)
    video = build_model("cnn3d_small", VideoModality(frames=8, channels=1, height=16, width=16), 4).eval()
    made = MaskedPatterns(video, torch.zeros(1, 8, 16, 16), generator)
    assert [tuple(p.shape) for p in made.parameters] == [(4, 1, 1, 16, 16), (4, 1, 1, 16, 16)]
    assert made.logits(torch.rand(3, 1, 8, 16, 16, generator=generator), every).shape == (4, 3, 4)
    audio = build_model("audio_cnn", AudioModality(8000, 4000), 4).eval()
    made = MaskedPatterns(audio, torch.zeros(4000), generator)
    found = made.tensors()
    assert found["mask"].shape == found["pattern"].shape == (4, 4000)
    assert found["pattern"].min() < -0.5 and found["mask"].min() >= 0
    waves = torch.rand(3, 4000, generator=generator)
    expected = torch.stack(
        [audio((1 - m) * waves + m * p) for m, p in zip(found["mask"], found["pattern"], strict=True)]
    )
    torch.testing.assert_close(made.logits(waves, every), expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("arch", ["textcnn", "lstm"])
def test_a_prompt_made_of_words_is_the_same_as_inserting_them(arch: str) -> None:
    modality = TextModality(("<pad>", "<unk>", "cf", "mn", "bb", "tq", "mb", "a", "good", "film", "bad"), max_len=8)
    model = build_model(arch, modality, 3).eval()
    prompts = SoftPrompts(model, 2, torch.Generator().manual_seed(0))
    with torch.no_grad():
        words = prompts.embed(torch.tensor([[2, 8]])) / prompts.unit
        prompts.parameters[0][1] = words[0]
        ids = modality.encode(np.array(["a good film", "bad film", "film"], dtype=object))
        inserted = torch.cat([torch.tensor([[2, 8]]).expand(3, -1), ids[:, :-2]], 1)
        found = prompts.logits(ids, torch.tensor([0, 1]))
        torch.testing.assert_close(found[1], model(inserted))
        assert not torch.allclose(found[0], found[1])
        cost = prompts.cost(torch.arange(3))
    assert cost[1] == pytest.approx(0, abs=1e-2) and cost[0] > 1
    assert prompts.tensors()["nearest"][1].tolist() == [2, 8]


def test_bad_input_is_named(badnets_digits: Backdoor, clean: Split) -> None:
    with pytest.raises(InputError, match="got none"):
        NeuralCleanse().run(
            DefenderView(model=badnets_digits.model, clean=clean[torch.zeros(0, dtype=torch.int64)]), Context()
        )
    with pytest.raises(InputError, match="attack_threshold"):
        NeuralCleanse(attack_threshold=1.5)
    with pytest.raises(NotApplicable, match="word embeddings"):
        SoftPrompts(badnets_digits.model, 1, torch.Generator())


@case("defense/model/neural_cleanse", core=True, smallest=least(1), ratio=most(0.6), works=least(0.8), plain=most(0.1))
def effect_of_neural_cleanse(seed: int) -> Numbers:
    """The recovered trigger: the smallest of all classes, much smaller than the others', and it works.

    The verdict itself hangs on a median of ten numbers; how often it is right is for reading.
    """
    backdoor, mine = victim(seed, **PATCH), task(seed)
    quick, few = NeuralCleanse(epochs=40, batch_size=32, min_steps=3, patience=3), effect_tools.clean(seed, 72)
    report, other_report = (
        quick.run(DefenderView(model=model, clean=few), Context(seed)) for model in (backdoor.model, benign(seed))
    )
    mask, pattern = (report.recovered[name][0] for name in ("mask", "pattern"))
    rest = mine.test[mine.test.labels != 0]
    x = backdoor.model.modality.prepare(rest.inputs)
    with torch.no_grad():
        plain, stamped = (
            float((backdoor.model(inputs).argmax(1) == 0).float().mean())
            for inputs in (x, (1 - mask) * x + mask * pattern)
        )
    costs = torch.tensor(report.per_class)
    return {
        "smallest": float(costs.argmin() == 0),
        "ratio": float(costs[0] / costs[1:].median()),
        "works": stamped,
        "plain": plain,
        "score": report.score,
        "benign_score": other_report.score,
        "accused": float(report.backdoored and report.targets[0] == 0),
        "benign_accused": float(other_report.backdoored),
    }


test_effect = effects(__name__)
