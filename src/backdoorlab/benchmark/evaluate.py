"""How a defense of each stage is run and measured, on an attacked model or on a benign one.

What a defense leaves behind (a repaired or retrained model) is measured as it comes back from its stored form, so that
the stored artifact always reproduces the numbers. "before" values are those of the undefended model; for input
defenses both are taken on the same samples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from backdoorlab.attacks.base import Backdoor
from backdoorlab.benchmark.card import complete
from backdoorlab.benchmark.meter import Meter
from backdoorlab.benchmark.worlds import State, load_model, measure, measure_benign, model_state
from backdoorlab.core.errors import BackdoorLabError, NotApplicable
from backdoorlab.core.seeding import make_generator
from backdoorlab.data.split import BACKDOOR, COVER, PoisonedSplit, Split, take
from backdoorlab.defenses.base import (
    DatasetDefense,
    Defense,
    InputDefense,
    ModelDefense,
    RepairDefense,
    TrainingDefense,
)
from backdoorlab.metrics.classification import defense_effectiveness, rate, robust_improvement
from backdoorlab.metrics.detection import detection_metrics, detection_reasons
from backdoorlab.models.classifier import Classifier
from backdoorlab.training.context import Context
from backdoorlab.training.evaluate import predict
from backdoorlab.training.task import Task

INPUT_POOL = 2000
"""Input detectors are scored on at most so many clean, and as many triggered, test samples."""

_DETECTION = ("auroc", "tpr", "fpr", "precision", "f1")
_SCAN = ("score", "verdict", "targets")


@dataclass
class Outcome:
    """What a stage gives: numbers for the card, tensors and records for the artifact."""

    metrics: dict[str, Any]
    reasons: dict[str, str] = field(default_factory=dict)
    tensors: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    record: dict[str, Any] | None = None
    log: list[dict[str, Any]] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Victim:
    """What a defense is run on.

    Attributes:
        task: the task.
        model: attacked or benign.
        backdoor: None for a benign classifier.
        attacked: False for benign models of either kind.
        before: metrics of the undefended model.
        measuring: context of all measurements.
    """

    task: Task
    model: Classifier
    backdoor: Backdoor | None
    attacked: bool
    before: Mapping[str, Any]
    measuring: Context

    def training_set(self) -> PoisonedSplit:
        """The (poisoned) training set, with roles that only metrics read."""
        clean = self.task.train
        if self.task.spec.kind != "classifier":
            raise NotApplicable("this defense works on labelled training sets of classifiers")
        if self.attacked and self.backdoor is not None:
            return self.backdoor.poison.apply(clean)
        return PoisonedSplit(clean.inputs, clean.labels, clean.classes,
                             torch.zeros(len(clean), dtype=torch.uint8), clean.labels)  # fmt: skip

    def measure(self, model: Classifier) -> dict[str, Any]:
        """ACC, ASR, RA of a model; ACC alone without a backdoor."""
        if self.backdoor is None:
            return measure_benign(self.task, model)
        return measure(self.backdoor, self.task, self.measuring, model)


def clean_indices(labels: Tensor, num_classes: int, fraction: float, seed: int) -> Tensor:
    """Rows of the clean training set that the defender owns: int64, sorted.

    Class counts are as equal as the data allow. All defenses of one seed get the same rows at the same fraction, and
    the rows of a smaller fraction are among those of a larger one.
    """
    count = min(len(labels), max(1, round(fraction * len(labels)))) if fraction > 0 else 0
    order = torch.randperm(len(labels), generator=make_generator(seed, "clean samples"))
    shuffled, rank = labels[order], torch.zeros(len(labels), dtype=torch.int64)
    for k in range(num_classes):
        mine = shuffled == k
        rank[mine] = torch.arange(int(mine.sum()))
    return order[torch.argsort(rank, stable=True)[:count]].sort().values


def evaluate(
    defense: Defense, victim: Victim, clean: Split, ctx: Context, retraining: Context | None, meter: Meter
) -> Outcome:
    """Run a defense and measure what it did.

    Args:
        defense: of any stage.
        victim: attacked or benign.
        clean: the defender's clean samples.
        ctx: of the defense.
        retraining: context of the training after a dataset defense; None leaves it out.
        meter: takes the time of each part.
    """
    if isinstance(defense, DatasetDefense):
        return _dataset(defense, victim, ctx, retraining, meter)
    table: dict[type[Defense], Callable[..., Outcome]] = {
        RepairDefense: _repair, TrainingDefense: _training, InputDefense: _input, ModelDefense: _scan,
    }  # fmt: skip
    for base, function in table.items():
        if isinstance(defense, base):
            return function(defense, victim, clean, ctx, meter)
    raise BackdoorLabError(f"{defense.name}: no stage of this library runs a {type(defense).__name__}")


def finish(
    metrics: Mapping[str, Any], reasons: Mapping[str, str], victim: Victim | None
) -> tuple[dict[str, Any], dict[str, str]]:
    """All keys of a card, with reasons for the nulls.

    Args:
        metrics: what was measured; ``x_note`` is the reason of a null ``x``.
        reasons: further reasons.
        victim: None for undefended cards.
    """
    notes = {k.removesuffix("_note"): str(v) for k, v in metrics.items() if k.endswith("_note")}
    why = {
        **dict.fromkeys(_DETECTION, "this stage detects nothing" if victim else "nothing was defended"),
        **dict.fromkeys(_SCAN, "only scans of models give a verdict"),
        **dict.fromkeys(("der", "rir"), "compares a defended model with the undefended one"),
        "asr_per_class": "no triggered test samples of this class",
        "acc_per_class": "no test samples of this class",
    }
    if victim is None or not victim.attacked:
        why |= dict.fromkeys(("asr", "ra"), "the model is benign: there is no trigger")
    if victim and not victim.attacked:
        why |= dict.fromkeys(("der", "rir", "asr_before", "ra_before"), "the model is benign: there is no attack")
    kept = {k: v for k, v in metrics.items() if not k.endswith("_note")}
    return complete(kept, why | notes | dict(reasons), "was not measured")


def _compared(after: dict[str, Any], victim: Victim, before: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Metrics of a defended model with the undefended values, DER and RIR beside them."""
    before = victim.before if before is None else before
    merged = after | {f"{k}_before": before.get(k) for k in ("acc", "asr", "ra")}
    acc, asr, ra = (merged[f"{k}_before"] for k in ("acc", "asr", "ra"))
    if victim.attacked and None not in (acc, asr, after.get("acc"), after.get("asr")):
        merged["der"] = defense_effectiveness(acc, asr, after["acc"], after["asr"])
    if victim.attacked and None not in (acc, ra, after.get("acc"), after.get("ra")):
        merged["rir"] = robust_improvement(acc, ra, after["acc"], after["ra"])
    if after.get("acc") is None and "acc_note" in after:
        merged |= {f"{k}_note": after["acc_note"] for k in ("acc_before", "ra_before", "der", "rir", "ra")}
    return merged


def _measured(model: Classifier, victim: Victim, meter: Meter) -> tuple[dict[str, Any], State]:
    """Metrics of a model as it comes back from its stored form, and that form."""
    state = model_state(model)
    with meter.part("measure"):
        return _compared(victim.measure(load_model(state, victim.measuring.device)), victim), state


def _repair(defense: RepairDefense, victim: Victim, clean: Split, ctx: Context, meter: Meter) -> Outcome:
    with meter.part("defense"):
        repaired = defense.repair(victim.model, clean, ctx)
    metrics, (tensors, record) = _measured(repaired, victim, meter)
    return Outcome(metrics, {}, tensors, record)


def _training(defense: TrainingDefense, victim: Victim, clean: Split, ctx: Context, meter: Meter) -> Outcome:
    data = victim.training_set()
    with meter.part("defense"):
        report = defense.train(data.as_seen(), victim.task, ctx)
    metrics, (tensors, record) = _measured(report.model, victim, meter)
    reasons: dict[str, str] = {}
    if report.scores is not None or report.isolated is not None:
        found, reasons = _detection(report.scores, report.isolated, data)
        metrics |= found
        tensors["scores"] = _verdicts(report.scores, report.isolated)
    return Outcome(metrics, reasons, tensors, record, notes=dict(report.notes))


def _dataset(
    defense: DatasetDefense, victim: Victim, ctx: Context, retraining: Context | None, meter: Meter
) -> Outcome:
    data = victim.training_set()
    seen = data.as_seen()
    with meter.part("defense"):
        scores = defense.score(seen, victim.model, ctx)
        flags = defense.flags(scores, seen)
    metrics, reasons = _detection(scores, flags, data)
    tensors, record, log, notes = {"scores": _verdicts(scores, flags)}, None, [], {}
    kept = (~flags.cpu().bool()).nonzero().flatten()
    left = int((data.roles[kept] == BACKDOOR).sum())
    metrics |= {"n_kept": len(kept), "residual_poison": left, "residual_rate": left / len(kept) if len(kept) else None}
    if retraining is None or not len(kept):
        why = (
            "not retrained on request"
            if retraining is None
            else "the defense flagged every sample: nothing to train on"
        )
        reasons |= dict.fromkeys(("acc", "asr", "ra", "der", "rir", "residual_rate"), why)
        metrics |= {f"{k}_before": victim.before.get(k) for k in ("acc", "asr", "ra")}
    else:
        with meter.part("retrain"):
            model, fitted = victim.task.fit(seen[kept], retraining, label="training on what was kept")
        after, (weights, record) = _measured(model, victim, meter)
        metrics, tensors, log, notes = after | metrics, tensors | weights, fitted.rows(), fitted.notes()
    return Outcome(metrics, reasons, tensors, record, log, notes)


def _input(defense: InputDefense, victim: Victim, clean: Split, ctx: Context, meter: Meter) -> Outcome:
    """Scored on equal numbers of clean and triggered *test* samples; the detector is calibrated on training samples."""
    if victim.task.spec.kind != "classifier":
        raise NotApplicable("input defenses inspect the inputs of classifiers")
    with meter.part("defense"):
        detector = defense.fit(victim.model, clean, ctx)
    test, generator = victim.task.test, victim.measuring.generator("input pool")
    true, wanted, triggered = test.labels[:0], test.labels[:0], take(test.inputs, test.labels[:0])
    if victim.backdoor is not None:
        triggered, wanted, true = victim.backdoor.triggered_test(victim.task)
    size = min(INPUT_POOL, len(test), len(true) or len(test))
    rows = torch.randperm(len(test), generator=generator)[:size].sort().values
    hits = torch.randperm(len(true), generator=generator)[:size].sort().values
    with meter.part("score"):
        parts = [
            detector.score(inputs).float().cpu()
            for inputs in (take(test.inputs, rows), take(triggered, hits))
            if len(inputs)
        ]
        scores = torch.cat(parts)
        flags = detector.flags(scores).bool()
    positives = torch.arange(len(scores)) >= size
    metrics = detection_metrics(scores, flags, positives)
    reasons = detection_reasons(metrics)
    with meter.part("measure"):
        right = predict(victim.model, take(test.inputs, rows)).argmax(1) == test.labels[rows]
        after, before = {"acc": rate(right & ~flags[:size])}, {"acc": rate(right)}
        if len(hits):
            predicted, passed = predict(victim.model, take(triggered, hits)).argmax(1), ~flags[size:]
            for name, labels in (("asr", wanted[hits]), ("ra", true[hits])):
                after[name], before[name] = rate((predicted == labels) & passed), rate(predicted == labels)
    metrics |= _compared(after, victim, before) | {
        "threshold": float(detector.threshold),
        "n_clean": size,
        "n_triggered": len(hits),
    }
    tensors = {"scores": {"scores": scores, "flags": flags, "triggered": positives, "clean_rows": rows}}
    return Outcome(metrics, reasons, tensors)


def _scan(defense: ModelDefense, victim: Victim, clean: Split, ctx: Context, meter: Meter) -> Outcome:
    with meter.part("defense"):
        report = defense.scan(victim.model, clean, ctx)
    metrics: dict[str, Any] = {
        "score": float(report.score),
        "verdict": "backdoored" if report.backdoored else "clean",
        "targets": [int(t) for t in report.targets],
        "per_class": [float(v) for v in report.per_class],
        "target_hit": None,
    } | {f"{k}_before": victim.before.get(k) for k in ("acc", "asr", "ra")}
    reasons = dict.fromkeys(
        ("acc", "asr", "ra", "der", "rir"), "a scan leaves the model as it is; see the undefended row"
    )
    reasons |= {"score": "the method's score is not a finite number", "per_class": "not a finite number for this class"}
    reasons["target_hit"] = "the model is benign: it has no target"
    target_map = getattr(victim.backdoor, "target_map", None)
    if victim.attacked:
        reasons["target_hit"] = "the attack has no single target class"
        if target_map is not None and target_map.mode == "all-to-one":
            metrics["target_hit"] = target_map.target in metrics["targets"]
    reasons |= {f"{k}_before": "not defined for this model" for k in ("acc", "asr", "ra")}
    return Outcome(metrics, reasons, {"recovered": dict(report.recovered)} if report.recovered else {})


def _detection(
    scores: Tensor | None, flags: Tensor | None, data: PoisonedSplit
) -> tuple[dict[str, Any], dict[str, str]]:
    metrics = detection_metrics(scores, flags, data.roles == BACKDOOR, data.roles == COVER)
    return metrics, detection_reasons(metrics)


def _verdicts(scores: Tensor | None, flags: Tensor | None) -> dict[str, Tensor]:
    found = {"scores": scores, "flags": flags}
    return {name: tensor for name, tensor in found.items() if tensor is not None}
