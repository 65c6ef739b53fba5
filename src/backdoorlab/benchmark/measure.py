"""How well a defense works, measured with what the defense does not know: the backdoor, or that there is none.

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

from backdoorlab.attacks.result import Backdoor, Planted
from backdoorlab.benchmark.card import complete
from backdoorlab.benchmark.meter import Meter
from backdoorlab.core.errors import NotApplicable
from backdoorlab.data.split import BACKDOOR, COVER, PoisonedSplit, Split, take
from backdoorlab.defenses.base import Defense, InputDetector, Outcome, Repair, ScanReport, Screening, TrainingReport
from backdoorlab.defenses.view import DefenderView
from backdoorlab.metrics.classification import defense_effectiveness, rate, robust_improvement
from backdoorlab.metrics.detection import detection_metrics, detection_reasons
from backdoorlab.metrics.result import Metrics
from backdoorlab.models.classifier import Classifier
from backdoorlab.models.persistence import State, StoredModel, restore_model
from backdoorlab.tasks import BaseTask, Task
from backdoorlab.training.context import Context
from backdoorlab.training.evaluate import predict

INPUT_POOL = 2000
"""Input detectors are scored on at most so many clean, and as many triggered, test samples."""

_DETECTION = ("auroc", "tpr", "fpr", "precision", "f1")
_SCAN = ("score", "verdict", "targets")
_BEFORE = ("acc", "asr", "ra")


@dataclass
class Measured:
    """What a stage gives: metrics and notes for the card, tensors and records for the artifact."""

    metrics: Metrics
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

    task: BaseTask
    model: StoredModel
    backdoor: Planted | None
    attacked: bool
    before: Mapping[str, Any]
    measuring: Context

    def classification(self) -> tuple[Task, Classifier, Backdoor | None]:
        """Task, model and backdoor, if it is a classifier.

        Raises:
            NotApplicable: if it is not.
        """
        backdoor = self.backdoor
        if not isinstance(self.task, Task) or not isinstance(self.model, Classifier):
            raise NotApplicable("this defense works on labelled training sets of classifiers")
        return self.task, self.model, backdoor if isinstance(backdoor, Backdoor) else None

    def training_set(self) -> PoisonedSplit:
        """The (poisoned) training set, with roles that only metrics read.

        Raises:
            NotApplicable: if the task is no classification.
        """
        task, _, backdoor = self.classification()
        clean = task.train
        if self.attacked and backdoor is not None:
            return backdoor.poison.apply(clean)
        return PoisonedSplit(
            clean.inputs, clean.labels, clean.classes, torch.zeros(len(clean), dtype=torch.uint8), clean.labels
        )

    @property
    def replay(self) -> bool:
        """Was the poisoned training set made after training, as a snapshot?"""
        return isinstance(self.backdoor, Backdoor) and self.backdoor.poison.replay

    def view(self, clean: Split, reads: Sequence[str]) -> DefenderView:
        """What a defender sees of it.

        Args:
            clean: the defender's clean samples.
            reads: parts that the defense declares; the others are left out, since they may not exist (a diffusion task
                has no labelled training set).
        """
        return DefenderView(
            model=cast(Classifier, self.model),  # or a model of another kind, for defenses of that kind
            clean=clean,
            suspicious=self.training_set().as_seen() if "suspicious" in reads else None,
            blueprint=self.task.blueprint if "blueprint" in reads else None,
        )

    def measure(self, model: StoredModel) -> Metrics:
        """ACC, ASR, RA of a model; ACC alone without a backdoor."""
        if self.backdoor is None:
            return self.task.measure_benign(model, self.measuring)
        return self.backdoor.measure(self.task, self.measuring, model)


def run_defense(
    defense: Defense, victim: Victim, rows: Tensor, ctx: Context, retraining: Context | None, meter: Meter
) -> Measured:
    """Apply a defense and measure how well it works.

    Args:
        defense: with all hyper-parameters set.
        victim: what it is applied to, with the backdoor.
        rows: int64, the defender's clean samples among the training samples.
        ctx: of the defense.
        retraining: context of the training on what a dataset defense kept; None leaves it out.
        meter: takes the time of each part.

    Returns:
        All metrics of a card; the rows are among the tensors.

    Raises:
        NotApplicable: if the method cannot work on such a model or such data.
    """
    with meter.part("defense"):
        outcome = defense.apply(victim.view(victim.task.train[rows], (*defense.reads, *defense.may_read)), ctx)
    measured = _measured(outcome, victim, retraining, meter)
    measured.tensors["clean"] = {"indices": rows}
    measured.metrics = finish(measured.metrics | {"n_defender": len(rows)}, attacked=victim.attacked, defended=True)
    if victim.replay and "suspicious" in defense.reads:
        measured.notes["replay"] = True
    return measured


def _measured(outcome: Outcome, victim: Victim, retraining: Context | None, meter: Meter) -> Measured:
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


def finish(metrics: Metrics, *, attacked: bool, defended: bool) -> Metrics:
    """All metrics of a card, with a reason for every null.

    Args:
        metrics: what was measured, with reasons that take precedence.
        attacked: False for benign models.
        defended: False for undefended models.
    """
    reasons = {
        **dict.fromkeys(_DETECTION, "this stage detects nothing" if defended else "nothing was defended"),
        **dict.fromkeys(_SCAN, "only scans of models give a verdict"),
        **dict.fromkeys(("der", "rir"), "compares a defended model with the undefended one"),
        "asr_per_class": "no triggered test samples of this class",
        "acc_per_class": "no test samples of this class",
    }
    if not attacked:
        reasons |= dict.fromkeys(("asr", "ra"), "the model is benign: there is no trigger")
    elif not defended:
        reasons |= dict.fromkeys(("asr", "ra"), "no test samples to measure it on")
    if defended and not attacked:
        reasons |= dict.fromkeys(("der", "rir", "asr_before", "ra_before"), "the model is benign: there is no attack")
    return complete(Metrics({}, reasons) | metrics, "was not measured")


def _before(values: Mapping[str, Any]) -> dict[str, Any]:
    """ACC, ASR and RA of the undefended model under the names that defended models have for them."""
    return {f"{name}_before": values.get(name) for name in _BEFORE}


def _compared(after: Metrics, victim: Victim, before: Mapping[str, Any]) -> Metrics:
    """Metrics of a defended model with the undefended values, DER and RIR beside them."""
    (acc, asr, ra), (new_acc, new_asr, new_ra) = (map(values.get, _BEFORE) for values in (before, after))
    compared = _before(before)
    if victim.attacked and acc is not None and new_acc is not None:
        if asr is not None and new_asr is not None:
            compared["der"] = defense_effectiveness(acc, asr, new_acc, new_asr)
        if ra is not None and new_ra is not None:
            compared["rir"] = robust_improvement(acc, ra, new_acc, new_ra)
    reasons = {}
    if after.get("acc") is None and "acc" in after.reasons:
        reasons = dict.fromkeys(("acc_before", "ra_before", "der", "rir", "ra"), after.reasons["acc"])
    return after | Metrics(compared, reasons)


def _model_metrics(model: Classifier, victim: Victim, meter: Meter) -> tuple[Metrics, State]:
    """Metrics of a model as it comes back from its stored form, and that form."""
    state = model.state()
    with meter.part("measure"):
        after = victim.measure(restore_model(state, victim.measuring.device))
    return _compared(after, victim, victim.before), state


def _repaired(repair: Repair, victim: Victim, meter: Meter) -> Measured:
    metrics, (tensors, record) = _model_metrics(repair.model, victim, meter)
    return Measured(metrics, tensors, record)


def _trained(report: TrainingReport, victim: Victim, meter: Meter) -> Measured:
    data = victim.training_set()
    metrics, (tensors, record) = _model_metrics(report.model, victim, meter)
    if report.scores is not None or report.isolated is not None:
        metrics |= _detection(report.scores, report.isolated, data)
        tensors["scores"] = _decisions(report.scores, report.isolated)
    return Measured(metrics, tensors, record, notes=dict(report.notes))


def _screened(screening: Screening, victim: Victim, retraining: Context | None, meter: Meter) -> Measured:
    task, _, _ = victim.classification()
    data, kept = victim.training_set(), screening.kept
    tensors = {"scores": _decisions(screening.scores, screening.flags)}
    left = int((data.roles[kept] == BACKDOOR).sum())
    share = left / len(kept) if len(kept) else None
    counts = {"n_kept": len(kept), "residual_poison": left, "residual_rate": share}
    metrics = _detection(screening.scores, screening.flags, data) | counts
    if retraining is None or not len(kept):
        reason = "the defense flagged every sample: nothing to train on"
        if retraining is None:
            reason = "not retrained on request"
        reasons = dict.fromkeys(("acc", "asr", "ra", "der", "rir", "residual_rate"), reason)
        return Measured(metrics | Metrics(_before(victim.before), reasons), tensors)
    with meter.part("retrain"):
        model, fitted = task.fit(data.as_seen()[kept], retraining, label="training on what was kept")
    after, (weights, record) = _model_metrics(model, victim, meter)
    return Measured(after | metrics, tensors | weights, record, fitted.rows(), fitted.notes())


def _detected(detector: InputDetector, victim: Victim, meter: Meter) -> Measured:
    """Scored on equal numbers of clean and triggered *test* samples; the detector is calibrated on training samples."""
    task, model, backdoor = victim.classification()
    test, generator = task.test, victim.measuring.generator("input pool")
    true, desired, triggered = test.labels[:0], test.labels[:0], take(test.inputs, test.labels[:0])
    if backdoor is not None:
        triggered, desired, true = backdoor.triggered_test(task)
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
    detection = detection_metrics(scores, flags, positives)
    with meter.part("measure"):
        right = predict(model, take(test.inputs, rows)).argmax(1) == test.labels[rows]
        after, before = {"acc": rate(right & ~flags[:size])}, {"acc": rate(right)}
        if len(hits):
            predicted, passed = predict(model, take(triggered, hits)).argmax(1), ~flags[size:]
            for name, labels in (("asr", desired[hits]), ("ra", true[hits])):
                after[name], before[name] = rate((predicted == labels) & passed), rate(predicted == labels)
    counts = {"threshold": float(detector.threshold), "n_clean": size, "n_triggered": len(hits)}
    metrics = Metrics(detection, detection_reasons(detection)) | _compared(Metrics(after), victim, before) | counts
    tensors = {"scores": {"scores": scores, "flags": flags, "triggered": positives, "clean_rows": rows}}
    return Measured(metrics, tensors)


def _scanned(report: ScanReport, victim: Victim) -> Measured:
    reasons = dict.fromkeys(
        ("acc", "asr", "ra", "der", "rir"), "a scan leaves the model as it is; see the undefended row"
    )
    reasons |= {"score": "the method's score is not a finite number", "per_class": "not a finite number for this class"}
    reasons |= dict.fromkeys(_before({}), "not defined for this model")
    target_hit, reasons["target_hit"] = None, "the model is benign: it has no target"
    if victim.attacked:
        reasons["target_hit"] = "the attack has no single target class"
        target_map = victim.backdoor.target_map if isinstance(victim.backdoor, Backdoor) else None
        if target_map is not None and target_map.mode == "all-to-one":
            target_hit = target_map.target in report.targets
    metrics = {
        "score": float(report.score),
        "verdict": "backdoored" if report.backdoored else "clean",
        "targets": [int(t) for t in report.targets],
        "per_class": [float(v) for v in report.per_class],
        "target_hit": target_hit,
        **_before(victim.before),
    }
    return Measured(Metrics(metrics, reasons), {"recovered": dict(report.recovered)} if report.recovered else {})


def _detection(scores: Tensor | None, flags: Tensor | None, data: PoisonedSplit) -> Metrics:
    metrics = detection_metrics(scores, flags, data.roles == BACKDOOR, data.roles == COVER)
    return Metrics(metrics, detection_reasons(metrics))


def _decisions(scores: Tensor | None, flags: Tensor | None) -> dict[str, Tensor]:
    tensors = {"scores": scores, "flags": flags}
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}
