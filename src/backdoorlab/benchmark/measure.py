"""What the outcome of a defense is worth, measured by whoever knows the truth: the attack, or that there was none.

What a defense leaves behind (a repaired or retrained model) is measured as it comes back from its stored form, so that
the stored artifact always reproduces the numbers. "before" values are those of the undefended model; for input
defenses both are taken on the same samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from backdoorlab.attacks.result import Backdoor
from backdoorlab.benchmark.card import complete
from backdoorlab.benchmark.meter import Meter
from backdoorlab.core.errors import NotApplicable
from backdoorlab.data.split import BACKDOOR, COVER, PoisonedSplit, Split, take
from backdoorlab.defenses.base import InputDetector, Outcome, Repair, ScanReport, Screening, TrainingReport
from backdoorlab.defenses.view import DefenderView
from backdoorlab.metrics.classification import defense_effectiveness, rate, robust_improvement
from backdoorlab.metrics.detection import detection_metrics, detection_reasons
from backdoorlab.metrics.result import Metrics
from backdoorlab.models.classifier import Classifier
from backdoorlab.models.persistence import State, restore_model
from backdoorlab.tasks import Task
from backdoorlab.training.context import Context
from backdoorlab.training.evaluate import predict

INPUT_POOL = 2000
"""Input detectors are scored on at most so many clean, and as many triggered, test samples."""

_DETECTION = ("auroc", "tpr", "fpr", "precision", "f1")
_SCAN = ("score", "verdict", "targets")


@dataclass
class Measured:
    """What a stage gives: numbers for the card, tensors and records for the artifact."""

    metrics: Mapping[str, Any]
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
        if not isinstance(self.task, Task):
            raise NotApplicable("this defense works on labelled training sets of classifiers")
        if self.attacked and self.backdoor is not None:
            return self.backdoor.poison.apply(clean)
        return PoisonedSplit(
            clean.inputs, clean.labels, clean.classes, torch.zeros(len(clean), dtype=torch.uint8), clean.labels
        )

    def view(self, clean: Split, reads: Sequence[str]) -> DefenderView:
        """What a defender sees of it.

        Args:
            clean: the defender's clean samples.
            reads: parts that the defense declares; the others are left out, since they may not exist (a diffusion task
                has no labelled training set).
        """
        return DefenderView(
            model=self.model,
            clean=clean,
            suspicious=self.training_set().as_seen() if "suspicious" in reads else None,
            blueprint=self.task.blueprint if "blueprint" in reads else None,
        )

    def measure(self, model: Classifier) -> Metrics:
        """ACC, ASR, RA of a model; ACC alone without a backdoor."""
        if self.backdoor is None:
            return self.task.measure_benign(model, self.measuring)
        return self.backdoor.measure(self.task, self.measuring, model)


def measure_outcome(outcome: Outcome, victim: Victim, retraining: Context | None, meter: Meter) -> Measured:
    """Measure what a defense gave.

    Args:
        outcome: of :meth:`~backdoorlab.defenses.base.Defense.apply`.
        victim: what the defense was applied to, with the truth.
        retraining: context of the training on what a dataset defense kept; None leaves it out.
        meter: takes the time of each part.
    """
    match outcome:
        case Screening():
            return _screened(outcome, victim, retraining, meter)
        case TrainingReport():
            return _trained(outcome, victim, meter)
        case Repair():
            return _repaired(outcome, victim, meter)
        case InputDetector():
            return _detected(outcome, victim, meter)
        case ScanReport():
            return _scanned(outcome, victim)


def finish(
    metrics: Mapping[str, Any], reasons: Mapping[str, str], victim: Victim | None
) -> tuple[dict[str, Any], dict[str, str]]:
    """All keys of a card, with reasons for the nulls.

    Args:
        metrics: what was measured, with its own reasons.
        reasons: further reasons.
        victim: None for undefended cards.
    """
    notes = dict(metrics.reasons) if isinstance(metrics, Metrics) else {}
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
    return complete(dict(metrics), why | notes | dict(reasons), "was not measured")


def _compared(after: Metrics, victim: Victim, before: Mapping[str, Any] | None = None) -> Metrics:
    """Metrics of a defended model with the undefended values, DER and RIR beside them."""
    before = victim.before if before is None else before
    merged = {**after} | {f"{k}_before": before.get(k) for k in ("acc", "asr", "ra")}
    acc, asr, ra = (merged[f"{k}_before"] for k in ("acc", "asr", "ra"))
    if victim.attacked and None not in (acc, asr, after.get("acc"), after.get("asr")):
        merged["der"] = defense_effectiveness(acc, asr, after["acc"], after["asr"])
    if victim.attacked and None not in (acc, ra, after.get("acc"), after.get("ra")):
        merged["rir"] = robust_improvement(acc, ra, after["acc"], after["ra"])
    reasons = dict(after.reasons)
    if after.get("acc") is None and "acc" in reasons:
        reasons |= dict.fromkeys(("acc_before", "ra_before", "der", "rir", "ra"), reasons["acc"])
    return Metrics(merged, reasons)


def _model_metrics(model: Classifier, victim: Victim, meter: Meter) -> tuple[Metrics, State]:
    """Metrics of a model as it comes back from its stored form, and that form."""
    state = model.state()
    with meter.part("measure"):
        return _compared(victim.measure(cast(Classifier, restore_model(state, victim.measuring.device))), victim), state


def _repaired(repair: Repair, victim: Victim, meter: Meter) -> Measured:
    metrics, (tensors, record) = _model_metrics(repair.model, victim, meter)
    return Measured(metrics, {}, tensors, record)


def _trained(report: TrainingReport, victim: Victim, meter: Meter) -> Measured:
    data = victim.training_set()
    metrics, (tensors, record) = _model_metrics(report.model, victim, meter)
    reasons: dict[str, str] = {}
    if report.scores is not None or report.isolated is not None:
        found, reasons = _detection(report.scores, report.isolated, data)
        metrics |= found
        tensors["scores"] = _verdicts(report.scores, report.isolated)
    return Measured(metrics, reasons, tensors, record, notes=dict(report.notes))


def _screened(screening: Screening, victim: Victim, retraining: Context | None, meter: Meter) -> Measured:
    data, kept = victim.training_set(), screening.kept
    metrics: Mapping[str, Any]
    metrics, reasons = _detection(screening.scores, screening.flags, data)
    tensors, record, log, notes = {"scores": _verdicts(screening.scores, screening.flags)}, None, [], {}
    left = int((data.roles[kept] == BACKDOOR).sum())
    share = left / len(kept) if len(kept) else None
    metrics = {**metrics, "n_kept": len(kept), "residual_poison": left, "residual_rate": share}
    if retraining is None or not len(kept):
        why = (
            "not retrained on request"
            if retraining is None
            else "the defense flagged every sample: nothing to train on"
        )
        reasons |= dict.fromkeys(("acc", "asr", "ra", "der", "rir", "residual_rate"), why)
        metrics = {**metrics} | {f"{k}_before": victim.before.get(k) for k in ("acc", "asr", "ra")}
    else:
        with meter.part("retrain"):
            model, fitted = victim.task.fit(data.as_seen()[kept], retraining, label="training on what was kept")
        after, (weights, record) = _model_metrics(model, victim, meter)
        metrics, tensors, log, notes = after | metrics, tensors | weights, fitted.rows(), fitted.notes()
    return Measured(metrics, reasons, tensors, record, log, notes)


def _detected(detector: InputDetector, victim: Victim, meter: Meter) -> Measured:
    """Scored on equal numbers of clean and triggered *test* samples; the detector is calibrated on training samples."""
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
    metrics |= {**_compared(Metrics(after), victim, before)} | {
        "threshold": float(detector.threshold),
        "n_clean": size,
        "n_triggered": len(hits),
    }
    tensors = {"scores": {"scores": scores, "flags": flags, "triggered": positives, "clean_rows": rows}}
    return Measured(metrics, reasons, tensors)


def _scanned(report: ScanReport, victim: Victim) -> Measured:
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
    return Measured(metrics, reasons, {"recovered": dict(report.recovered)} if report.recovered else {})


def _detection(
    scores: Tensor | None, flags: Tensor | None, data: PoisonedSplit
) -> tuple[dict[str, Any], dict[str, str]]:
    metrics = detection_metrics(scores, flags, data.roles == BACKDOOR, data.roles == COVER)
    return metrics, detection_reasons(metrics)


def _verdicts(scores: Tensor | None, flags: Tensor | None) -> dict[str, Tensor]:
    found = {"scores": scores, "flags": flags}
    return {name: tensor for name, tensor in found.items() if tensor is not None}
