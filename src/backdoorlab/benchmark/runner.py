"""The life of a run, written once: resolve, lock, look up, seed, time, measure, record success or failure, store.

A run whose card is "ok" or "not_applicable" is never repeated; a failed one is. What happens to an error:

    InputError            the user must act: it propagates, nothing is stored
    NotApplicable         a card with status "not_applicable" and the reason
    any other exception   a card with status "failed", the reason, and the traceback in log.jsonl
    KeyboardInterrupt     propagates; the store holds whole artifacts only
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch

from backdoorlab.attacks.base import attacks, restore_backdoor
from backdoorlab.attacks.result import Backdoor, Planted
from backdoorlab.benchmark.card import Card
from backdoorlab.benchmark.commands import attack_command, defense_command
from backdoorlab.benchmark.measure import Measured, Victim, finish, measure_outcome
from backdoorlab.benchmark.meter import Meter, environment
from backdoorlab.benchmark.spec import (
    Experiment,
    MethodSpec,
    build_attack,
    build_defense,
    changed_settings,
    resolve,
    stage_key,
)
from backdoorlab.benchmark.store import OwnAssets, Store, StoredRun
from backdoorlab.core.errors import ArtifactError, BackdoorLabError, InputError, NotApplicable
from backdoorlab.core.seeding import derive_seed
from backdoorlab.data.split import clean_indices
from backdoorlab.defenses.base import defenses
from backdoorlab.models.classifier import Classifier
from backdoorlab.models.persistence import State, StoredModel, restore_model
from backdoorlab.tasks import BaseTask, Task, TaskSpec, load_task
from backdoorlab.training.context import Context, Reporter, Silent

DONE = ("ok", "not_applicable")
_KEPT_TASKS = 2


class Runner:
    """Runs experiments against a store, one at a time.

    Attributes:
        store: where results are looked up and kept.
        device: where models and batches live.
        reused: whether the card returned last was in the store already.
    """

    def __init__(
        self,
        store: Store,
        *,
        device: str | torch.device = "cpu",
        reporter: Reporter | None = None,
        root: str | Path | None = None,
        download: bool = False,
    ) -> None:
        self.store, self.device, self.reporter = store, torch.device(device), reporter or Silent()
        self.root, self.download, self.reused = root, download, False
        self._assets = store.assets(self.reporter)
        self._tasks: dict[TaskSpec, BaseTask] = {}

    def task(self, spec: TaskSpec) -> BaseTask:
        """Load a task; the latest ones are kept."""
        if spec not in self._tasks:
            while len(self._tasks) >= _KEPT_TASKS:
                del self._tasks[next(iter(self._tasks))]
            self._tasks[spec] = load_task(spec, root=self.root, download=self.download)
        return self._tasks[spec]

    def keys(self, experiment: Experiment) -> tuple[str, str | None]:
        """Keys of the attack (or benign) stage and, if there is a defense, of the defense stage."""
        task = self.task(experiment.task)
        base = stage_key(resolve(experiment.undefended(), task))
        return base, stage_key(resolve(experiment, task)) if experiment.defense else None

    def run(self, experiment: Experiment, *, fresh: bool = False) -> Card:
        """:meth:`defense` if the experiment has one, else :meth:`attack`."""
        return (self.defense if experiment.defense else self.attack)(experiment, fresh=fresh)

    def attack(self, experiment: Experiment, *, fresh: bool = False) -> Card:
        """Plant the backdoor (attack None: train the benign model), measure it, store it.

        Args:
            experiment: its defense, if any, is ignored.
            fresh: do the work again even if it was done before.

        Returns:
            The card; an existing one if the work was done before.

        Raises:
            InputError: if the experiment cannot be run as it is written; nothing is stored.
        """
        experiment = experiment.undefended()
        task = self.task(experiment.task)
        spec = resolve(experiment, task)
        stage = "attack" if experiment.attack else "benign"
        if not fresh and (stored := self._stored(stage, stage_key(spec))):
            return stored
        attack, ctx = build_attack(experiment, task), self._context(experiment, "attack")

        def work(meter: Meter) -> Measured:
            return self._benign(task, ctx, meter) if attack is None else self._plant(attack.run, task, ctx, meter)

        return self._stage(stage, experiment, spec, task, work, [], attack_command(experiment, task), fresh)

    def defense(self, experiment: Experiment, *, fresh: bool = False) -> Card:
        """Run the stage that the defense stands on if it is missing, then the defense; measure and store.

        Args:
            experiment: with a defense.
            fresh: do the defense (not what it stands on) again even if it was done before.

        Raises:
            InputError: as :meth:`attack`.
        """
        task = self.task(experiment.task)
        if experiment.defense is None:
            raise InputError("this experiment has no defense; use Runner.attack")
        spec = resolve(experiment, task)
        if not fresh and (stored := self._stored("defense", stage_key(spec))):
            return stored
        defense = build_defense(experiment, task)
        assert defense is not None
        before = self.attack(experiment)
        filled = Experiment.from_json(spec)

        def work(meter: Meter) -> Measured:
            if before.status != "ok":
                error = NotApplicable if before.status == "not_applicable" else BackdoorLabError
                raise error(f"{before.id} has status {before.status}: {before.reason}")
            with meter.part("load"):
                victim = self._victim(before, task)
            rows = clean_indices(task.train.labels, task.num_classes, filled.clean_fraction or 0.0, experiment.seed)
            retraining = self._context(experiment, "retrain") if filled.retrain else None
            ctx = self._context(experiment, "defense")
            with meter.part("defense"):
                outcome = defense.apply(victim.view(task.train[rows], defense.reads), ctx)
            measured = measure_outcome(outcome, victim, retraining, meter)
            measured.tensors["clean"] = {"indices": rows}
            measured.metrics = {**measured.metrics, "n_defender": len(rows)}
            if getattr(getattr(victim.backdoor, "poison", None), "replay", False) and "suspicious" in defense.reads:
                measured.notes["replay"] = True
            if told := [*ctx.warnings, *(retraining.warnings if retraining else ())]:
                measured.notes["warnings"] = told
            measured.metrics, measured.reasons = finish(measured.metrics, measured.reasons, victim)
            return measured

        command = defense_command(experiment, task, before.key)
        return self._stage("defense", experiment, spec, task, work, [before.id], command, fresh)

    def keep_asset(self, kind: str, given: str | Path) -> str:
        """Copy a user's file into the store, so that runs made with it can be repeated without it.

        Args:
            kind: of the asset that it replaces, such as "clean-surrogate".
            given: a safetensors file with the tensors of such an asset, or the key of one that was kept before.

        Returns:
            Its key, for :attr:`MethodSpec.assets`.

        Raises:
            InputError: if there is no such file or key, or it is no safetensors file.
        """
        return self.store.keep_own(kind, given)

    def load_backdoor(self, run: Card | StoredRun | str) -> tuple[BaseTask, Planted]:
        """Task and backdoor of a stored attack, or of the attack behind a stored defense.

        Raises:
            ArtifactError: if the artifact, or the data that it was made from, changed since.
            InputError: for a benign run.
        """
        found = self._base(run)
        card = self._ok(found)
        if card.stage == "benign":
            raise InputError(f"{found.id} is a benign model: it has no backdoor")
        task = self.task(card.experiment().task)
        if resolve(card.experiment(), task)["resolved"]["data"] != card.spec["resolved"]["data"]:
            raise ArtifactError(f"{found.id} was made from other data than {task.dataset.name} holds now")
        with found.rebuilding():
            backdoor = restore_backdoor((found.all_tensors(), found.record()), self.device)
            backdoor.try_on(task)
            return task, backdoor

    def load_classification(self, run: Card | StoredRun | str) -> tuple[Task, Backdoor]:
        """:meth:`load_backdoor` for classification tasks.

        Raises:
            InputError: for an attack on another kind of task.
        """
        task, backdoor = self.load_backdoor(run)
        if not isinstance(task, Task) or not isinstance(backdoor, Backdoor):
            raise InputError(f"this needs an attack on a classifier, got a task of kind {task.name}")
        return task, backdoor

    def load_model(self, run: Card | StoredRun | str) -> StoredModel:
        """The model of a stored run: victim, benign, repaired, trained or retrained.

        Raises:
            InputError: for a defense that leaves the model as it is (input, model, dataset without retraining).
        """
        found = self._find(run)
        card = self._ok(found)
        if "model.safetensors" not in card.digests:
            raise InputError(f"{found.id} left the model as it was; load {card.parents[0]} instead")
        record = found.record()
        with found.rebuilding():
            if "backdoor" in record:
                return restore_backdoor((found.all_tensors(), record), self.device).model
            return self._model((found.all_tensors(), record))

    def _model(self, state: State) -> StoredModel:
        """A stored model; the classes of models that methods bring are known once the methods are."""
        attacks.names()
        defenses.names()
        return restore_model(state, self.device)

    def experiment_on(self, run: Card | StoredRun | str, defense: MethodSpec) -> Experiment:
        """The experiment that applies a defense to a stored attack or benign model (or to that behind a defense)."""
        base = self._base(run).card().experiment()
        return Experiment(task=base.task, attack=base.attack, defense=defense, seed=base.seed)

    def _find(self, run: Card | StoredRun | str) -> StoredRun:
        if isinstance(run, StoredRun):
            return run
        return self.store.run(run.stage, run.key) if isinstance(run, Card) else self.store.find(run)

    def _base(self, run: Card | StoredRun | str) -> StoredRun:
        """The attack or benign run behind a run."""
        found = self._find(run)
        if found.stage != "defense":
            return found
        stage, _, key = found.card().parents[0].partition("/")
        return StoredRun(stage, key, found.path.parent.parent / stage / key)

    def _ok(self, run: StoredRun) -> Card:
        card = run.card()
        if card.status != "ok":
            raise InputError(f"{run.id} has nothing to load; its status is {card.status}: {card.reason}")
        return card

    def _context(self, experiment: Experiment, name: str) -> Context:
        own = experiment.attack.assets if experiment.attack else {}
        assets = OwnAssets(self._assets, {kind: self.store.own(kind, key) for kind, key in own.items()})
        return Context(derive_seed(experiment.seed, name), self.device, self.reporter, assets)

    def _plant(self, plant: Callable[[Any, Context], Planted], task: BaseTask, ctx: Context, meter: Meter) -> Measured:
        with meter.part("attack"):
            planted = plant(task, ctx)
        tensors, record = state = planted.stored()
        with meter.part("measure"):  # as it comes back from the store, so that the artifact reproduces its numbers
            backdoor = restore_backdoor(state, self.device)
            measured = backdoor.measure(task, ctx.child("measure"))
            seen = backdoor.visibility(task)
        metrics, reasons = finish(measured, {}, None)
        reasons |= {
            k: measured.reasons.get(k, "no test samples to measure it on") for k in ("asr", "ra") if k in reasons
        }
        told = {"warnings": list(ctx.warnings)} if ctx.warnings else {}
        notes = dict(planted.notes) | planted.log.notes() | seen | told
        if getattr(getattr(planted, "poison", None), "replay", False):
            notes["replay"] = True
        return Measured(metrics, reasons, tensors, record, planted.log.rows(), notes)

    def _benign(self, task: BaseTask, ctx: Context, meter: Meter) -> Measured:
        with meter.part("attack"):
            model, log = task.train_benign(ctx)
        tensors, record = state = model.state()
        with meter.part("measure"):
            measured = task.measure_benign(restore_model(state, self.device), ctx.child("measure"))
        metrics, reasons = finish(measured, {}, None)
        told = {"warnings": list(ctx.warnings)} if ctx.warnings else {}
        return Measured(metrics, reasons, tensors, record, log.rows(), log.notes() | told)

    def _victim(self, before: Card, task: BaseTask) -> Victim:
        run = self.store.run(before.stage, before.key)
        tensors, record = run.all_tensors(), run.record()
        with run.rebuilding():
            backdoor = restore_backdoor((tensors, record), self.device) if "backdoor" in record else None
            model = backdoor.model if backdoor else self._model((tensors, record))
        measuring = Context(derive_seed(before.spec["seed"], "attack"), self.device, self.reporter, self._assets)
        # A defense asks for what it reads; the parts of a classification are missed by none that serves another kind.
        known = cast(Task, task), cast(Classifier, model), cast(Backdoor | None, backdoor)
        return Victim(*known, before.stage == "attack", before.metrics, measuring.child("measure"))

    def _stored(self, stage: str, key: str) -> Card | None:
        """The card of a run that need not be repeated; no lock is taken, so that it may be anybody's to write."""
        run = self.store.run(stage, key)
        card = run.card() if self.store.has(stage, key) else None
        self.reused = card is not None and card.status in DONE
        return card if self.reused else None

    def _stage(
        self,
        stage: str,
        experiment: Experiment,
        spec: dict[str, Any],
        task: BaseTask,
        work: Callable[[Meter], Measured],
        parents: list[str],
        command: str,
        fresh: bool,
    ) -> Card:
        """Do the work of a key unless another process did it meanwhile, and store what came of it."""
        key = stage_key(spec)
        with self.store.lock(stage, key, self.reporter):
            if not fresh and (stored := self._stored(stage, key)):
                return stored
            self.reused = False
            meter, reason, status = Meter(self.device), None, "ok"
            try:
                outcome = work(meter)
            except InputError:
                raise
            except Exception as error:
                status, reason, outcome = _failure(error)
            if outcome.record:  # a checkpoint names its classes without the data set that they come from
                outcome.record["classes"] = list(task.dataset.train.classes)
            card = Card.model_validate(
                {"stage": stage, "key": key, "status": status, "reason": reason, "spec": spec, "parents": parents}
                | {"metrics": outcome.metrics, "null_reasons": outcome.reasons, "notes": outcome.notes}
                | {"modality": task.methods, "changed": changed_settings(experiment, task)}
                | {"command": command}
                | meter.fields()
                | environment(self.device)
            )
            return self.store.save(card, outcome.tensors, outcome.record, outcome.log).card()


def _failure(error: Exception) -> tuple[str, str, Measured]:
    """Status, reason and an outcome without numbers for work that did not succeed."""
    status = "not_applicable" if isinstance(error, NotApplicable) else "failed"
    reason = " ".join(str(error).split()) or type(error).__name__
    log: list[dict[str, Any]] = []
    if not isinstance(error, BackdoorLabError):
        last = traceback.extract_tb(error.__traceback__)[-1]
        reason = f"{type(error).__name__}: {reason[:500]} ({Path(last.filename).name}:{last.lineno})"
        log = [{"traceback": "".join(traceback.format_exception(error))}]
    metrics, reasons = finish({}, {}, None)
    return status, reason, Measured(metrics, dict.fromkeys(reasons, f"{status}: {reason}"), log=log)
