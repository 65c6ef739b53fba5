from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from benchmark_cases import BADNETS, FT, TINY
from torch import Tensor

from backdoorlab.attacks.result import Backdoor
from backdoorlab.benchmark import Card, Experiment, MethodSpec, Runner, RunResult, Store
from backdoorlab.core.errors import InputError, NotApplicable
from backdoorlab.data.split import BACKDOOR, clean_indices
from backdoorlab.defenses import DefenderView
from backdoorlab.defenses.base import (
    DatasetDefense,
    InputDefense,
    InputDetector,
    ModelDefense,
    RepairDefense,
    ScanReport,
    TrainingDefense,
    TrainingReport,
    defenses,
)
from backdoorlab.metrics.classification import defense_effectiveness, robust_improvement
from backdoorlab.metrics.result import Metrics
from backdoorlab.training import Context

FACTS = {"paper": "a test", "year": 2024, "modalities": ("image",)}


def toy(base: type, label: str, **body: object) -> type:
    """A defense that lives as long as this test module."""
    hints = {
        "name": ClassVar[str],
        "paper": ClassVar[str],
        "year": ClassVar[int],
        "modalities": ClassVar[tuple[str, ...]],
    }
    cls = type(
        f"Toy_{label}", (base,), {"name": label, **FACTS, "__annotations__": hints, "__module__": __name__, **body}
    )
    return defenses.register(dataclass(frozen=True, kw_only=True)(cls))


@pytest.fixture(scope="module", autouse=True)
def _toys():
    defenses.names()
    before = dict(defenses._entries)

    def corner(inputs: Tensor) -> Tensor:
        """The BadNets patch is white: on digits the corner is nearly always black."""
        return inputs[:, :, -1, -1].float().mean(1)

    class Detector(InputDetector):
        threshold = 254.0

        def score(self, inputs: Tensor) -> Tensor:
            return corner(inputs)

    def broken(self, view, ctx):
        raise ZeroDivisionError("a bug")

    def unfit(self, view, ctx):
        raise NotApplicable("needs a transformer")

    def wary(self, view, ctx):
        ctx.warn("few samples")
        raise ZeroDivisionError("a bug")

    def choosy(self, view, ctx):
        raise InputError("give me something else")

    def hooked(self, view, ctx):
        import copy

        shown = copy.deepcopy(view.model)
        shown.net.register_forward_hook(lambda m, i, out: torch.zeros_like(out))  # an effect outside of the weights
        return shown

    def train(self, view: DefenderView, ctx: Context) -> TrainingReport:
        data = view.suspicious
        flags = corner(data.inputs) > 254
        model, _ = view.blueprint.fit(data[~flags], ctx)
        return TrainingReport(model, corner(data.inputs), flags, {"isolated": int(flags.sum())})

    toy(InputDefense, "toy_input", run=lambda self, view, ctx: Detector())
    toy(
        DatasetDefense,
        "toy_all",
        score=lambda s, view, ctx: torch.ones(len(view.suspicious)),
        flags=lambda s, scores, view: torch.ones(len(scores)).bool(),
    )
    toy(
        DatasetDefense,
        "toy_corner",
        score=lambda s, view, ctx: corner(view.suspicious.inputs),
        flags=lambda s, scores, view: scores > 254,
    )
    toy(TrainingDefense, "toy_train", run=train)
    toy(
        ModelDefense,
        "toy_scan",
        run=lambda self, view, ctx: ScanReport(float("inf"), True, (0,), (9.0, float("nan")), {"mask": torch.ones(2)}),
    )
    for label, repair in (("broken", broken), ("wary", wary), ("unfit", unfit), ("choosy", choosy), ("hooked", hooked)):
        toy(RepairDefense, f"toy_{label}", run=repair)
    yield
    defenses._entries.clear()
    defenses._entries.update(before)


def run(runner: Runner, name: str, attack: MethodSpec | None = BADNETS, **more: object) -> RunResult:
    return runner.run(Experiment(task=TINY, attack=attack, defense=MethodSpec(name), **more))


def defend(runner: Runner, name: str, attack: MethodSpec | None = BADNETS, **more: object) -> Card:
    return run(runner, name, attack, **more).card


def test_same_experiment_twice_gives_the_same_bits(filled: Runner, tmp_path: Path):
    card = Runner(Store(tmp_path)).run(Experiment(task=TINY, attack=BADNETS, defense=FT)).card
    found = filled.run(Experiment(task=TINY, attack=BADNETS, defense=FT))
    other = found.card
    assert found.reused and found.base is None
    assert card.metrics == other.metrics
    assert card.digests == other.digests
    first, second = Store(tmp_path).runs("attack")[0].card(), filled.store.runs("attack")[0].card()
    assert first.key == second.key
    assert first.digests["model.safetensors"] == second.digests["model.safetensors"]
    assert Runner(Store(tmp_path)).run(Experiment(task=TINY, attack=BADNETS, seed=1)).card.digests != first.digests


def test_repair_row(filled: Runner):
    attack = filled.run(Experiment(task=TINY, attack=BADNETS)).card
    card = filled.run(Experiment(task=TINY, attack=BADNETS, defense=FT)).card
    m = card.metrics
    assert attack.metrics["asr"] > 0.7, "the toy attack must work for this file to mean anything"
    assert (m["acc_before"], m["asr_before"]) == (attack.metrics["acc"], attack.metrics["asr"])
    assert m["der"] == defense_effectiveness(m["acc_before"], m["asr_before"], m["acc"], m["asr"])
    assert m["rir"] == robust_improvement(m["acc_before"], m["ra_before"], m["acc"], m["ra"])
    assert m["auroc"] is None and card.null_reasons["auroc"] == "this stage detects nothing"
    assert m["n_defender"] == 20
    benign = filled.run(Experiment(task=TINY, defense=FT)).card
    assert benign.parents[0].startswith("benign/")
    assert benign.metrics["asr"] is None and "benign" in benign.null_reasons["der"]
    assert benign.metrics["acc_before"] == filled.run(Experiment(task=TINY)).card.metrics["acc"]


def test_stored_models_reproduce_their_numbers(filled: Runner):
    task, backdoor = filled.load_backdoor(filled.store.runs("attack")[0].key)
    for run in filled.store.runs("attack", "defense"):
        card = run.card()
        if card.spec["attack"] is None:
            continue
        measured = backdoor.measure(task, Context(), filled.load_model(card))
        assert {k: measured[k] for k in ("acc", "asr", "ra")} == {k: card.metrics[k] for k in ("acc", "asr", "ra")}
    benign = filled.store.runs("benign")[0]
    assert filled.load_model(benign.id).num_classes == 10
    with pytest.raises(InputError, match="benign model: it has no backdoor"):
        filled.load_backdoor(benign)
    assert filled.load_backdoor(filled.store.runs("defense")[0])[1].poison.indices.equal(backdoor.poison.indices)


def test_an_effect_outside_of_the_weights_is_not_credited(filled: Runner):
    assert (
        defend(filled, "toy_hooked").metrics["acc"]
        == filled.run(Experiment(task=TINY, attack=BADNETS)).card.metrics["acc"]
    )


def test_dataset_row_with_and_without_retraining(filled: Runner):
    card = defend(filled, "toy_corner")
    m = card.metrics
    assert m["tpr"] == 1.0 and m["fpr"] < 0.02 and m["auroc"] > 0.99
    assert m["residual_poison"] == 0
    assert m["asr"] < 0.2 < m["asr_before"] and m["der"] > 0.7
    scores = filled.store.find(card.id).tensors("scores")
    _, backdoor = filled.load_backdoor(card)
    positives = torch.zeros(400, dtype=torch.bool)
    positives[backdoor.poison.indices[backdoor.poison.roles == BACKDOOR]] = True
    assert torch.equal(scores["flags"] & positives, positives)
    quick = defend(filled, "toy_corner", retrain=False)
    assert quick.key != card.key
    assert quick.metrics["tpr"] == 1.0
    assert quick.metrics["asr"] is None and quick.null_reasons["der"] == "not retrained on request"
    with pytest.raises(InputError, match="left the model as it was; load attack/"):
        filled.load_model(quick)
    everything = defend(filled, "toy_all")
    assert everything.status == "ok"
    assert "nothing to train on" in everything.null_reasons["acc"]
    assert everything.metrics["auroc"] == 0.5
    benign = defend(filled, "toy_corner", None, retrain=False)
    assert benign.metrics["fpr"] < 0.02 and benign.metrics["auroc"] is None


def test_training_row(filled: Runner):
    card = defend(filled, "toy_train")
    assert card.metrics["precision"] > 0.9 and card.metrics["der"] > 0.7
    assert card.notes["isolated"] >= 40
    assert {"model.safetensors", "scores.safetensors", "clean.safetensors"} <= set(card.digests)


def test_input_row(filled: Runner):
    m = defend(filled, "toy_input").metrics
    assert m["n_clean"] == m["n_triggered"] == m["n_positive"]
    assert (m["tpr"], m["asr"]) == (1.0, 0.0)
    assert m["acc"] <= m["acc_before"] and m["der"] > 0.8
    benign = defend(filled, "toy_input", None)
    assert benign.metrics["tpr"] is None and benign.metrics["fpr"] < 0.02
    assert benign.null_reasons["auroc"] == "no poisoned samples to be found"


def test_scan_row(filled: Runner):
    card = defend(filled, "toy_scan")
    m = card.metrics
    assert (m["verdict"], m["targets"], m["target_hit"]) == ("backdoored", [0], True)
    assert m["score"] is None and "finite" in card.null_reasons["score"]
    assert m["per_class"] == [9.0, None]
    assert filled.store.find(card.key).tensors("recovered")["mask"].tolist() == [1, 1]
    assert defend(filled, "toy_scan", None).null_reasons["target_hit"] == "the model is benign: it has no target"


def test_failures_become_cards_and_bad_input_does_not(filled: Runner):
    card = defend(filled, "toy_broken")
    assert card.status == "failed"
    assert card.reason.startswith("ZeroDivisionError: a bug (test_runner.py:")
    assert card.metrics["acc"] is None
    assert "in broken" in filled.store.find(card.id).log()[0]["traceback"]
    again = run(filled, "toy_broken")
    assert again.card.status == "failed" and not again.reused
    assert again.base is not None and again.base.reused and again.base.card.id == again.card.parents[0]
    assert defend(filled, "toy_unfit").status == "not_applicable"
    unfit = run(filled, "toy_unfit")
    assert unfit.card.reason == "needs a transformer" and unfit.reused
    before = len(filled.store.runs())
    with pytest.raises(InputError, match="something else"):
        defend(filled, "toy_choosy")
    with pytest.raises(InputError, match="largest possible rate"):
        filled.run(Experiment(task=TINY, attack=MethodSpec("badnets", {"poison_rate": 1.0, "exclude_target": True})))
    with pytest.raises(InputError, match="Did you mean 'badnets'"):
        filled.run(Experiment(task=TINY, attack=MethodSpec("badnet")))
    assert len(filled.store.runs()) == before


def test_reasons_for_missing_metrics_reach_the_card_of_a_defense(filled: Runner, monkeypatch: pytest.MonkeyPatch):
    unmeasured = Metrics({"acc": None, "asr": 0.5, "ra": 0.1}, {"acc": "no clean samples"})
    monkeypatch.setattr(Backdoor, "measure", lambda self, task, context, model=None: unmeasured)
    card = run(filled, "toy_hooked", seed=11).card
    assert {card.null_reasons[name] for name in ("acc", "der")} == {"no clean samples"}


def test_warnings_of_a_run_that_failed_are_on_its_card(filled: Runner):
    card = defend(filled, "toy_wary")
    assert card.status == "failed" and card.notes["warnings"] == ["few samples"]


def test_a_failed_attack_fails_its_defenses(filled: Runner, monkeypatch: pytest.MonkeyPatch):
    from backdoorlab.attacks.image.badnets import BadNets

    monkeypatch.setattr(BadNets, "make_trigger", lambda *a: 1 / 0)
    card = filled.run(Experiment(task=TINY, attack=BADNETS, defense=FT, seed=7)).card
    assert card.status == "failed" and "has status failed: ZeroDivisionError" in card.reason


def test_interrupt_leaves_a_clean_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from backdoorlab.attacks.image.badnets import BadNets

    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(BadNets, "make_trigger", interrupted)
    runner = Runner(Store(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        runner.run(Experiment(task=TINY, attack=BADNETS))
    assert [p for p in tmp_path.rglob("*") if p.is_file() and p.suffix != ".lock"] == []
    monkeypatch.undo()
    assert runner.run(Experiment(task=TINY, attack=BADNETS)).card.status == "ok"


def test_fresh_repeats_and_replaces(filled: Runner, tmp_path: Path):
    runner = Runner(Store(tmp_path))
    experiment = Experiment(task=TINY)
    first = runner.run(experiment).card
    assert runner.run(experiment) == RunResult(first, reused=True)
    repeated = runner.run(experiment, fresh=True)
    again = repeated.card
    assert not repeated.reused
    assert again.metrics == first.metrics
    assert again.digests["model.safetensors"] == first.digests["model.safetensors"]
    assert len(runner.store.runs()) == 1


def test_experiment_on_a_stored_run(filled: Runner):
    run = filled.store.runs("defense")[0]
    built = filled.experiment_on(run.key, FT)
    assert filled.resolve(built).key == run.key


def test_clean_samples_are_shared_nested_and_balanced():
    labels = torch.arange(1000) % 10
    large, small = clean_indices(labels, 10, 0.1, 3), clean_indices(labels, 10, 0.02, 3)
    assert set(small.tolist()) < set(large.tolist())
    assert labels[large].bincount().tolist() == [10] * 10
    assert torch.equal(large, clean_indices(labels, 10, 0.1, 3))
    assert not torch.equal(large, clean_indices(labels, 10, 0.1, 4))
    assert len(clean_indices(labels, 10, 0.0, 3)) == 0
    assert len(clean_indices(labels, 10, 1e-9, 3)) == 1


def test_defender_owns_the_stored_rows(filled: Runner):
    cards = [defend(filled, "toy_scan"), filled.run(Experiment(task=TINY, attack=BADNETS, defense=FT)).card]
    rows = [filled.store.find(c.id).tensors("clean")["indices"] for c in cards]
    assert torch.equal(rows[0], rows[1]) and len(rows[0]) == 20
    half = filled.run(Experiment(task=TINY, attack=BADNETS, defense=FT, clean_fraction=0.5)).card
    assert len(filled.store.find(half.id).tensors("clean")["indices"]) == 200
    assert half.command.endswith("--clean-fraction 0.5 --set epochs=4 --set batch_size=16")


def test_changed_data_are_noticed(filled: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from backdoorlab.benchmark import runner as module

    runner = Runner(filled.store)
    monkeypatch.setattr(module, "data_digest", lambda task: "f" * 20)
    with pytest.raises(InputError, match="made from other data"):
        runner.load_backdoor(filled.store.runs("attack")[0])
