"""The life of a run, written once: resolve, lock, look up, seed, time, measure, record success or failure, store.

A run whose card is "ok" or "not_applicable" is never repeated; a failed one is. What happens to an error:

    InputError            the user must act: it propagates, nothing is stored
    NotApplicable         a card with status "not_applicable" and the reason
    any other exception   a card with status "failed", the reason, and the traceback in log.jsonl
    KeyboardInterrupt     propagates; the store holds whole artifacts only
"""

from __future__ import annotations

import dataclasses
import functools
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from backdoorlab.attacks.base import Attack, attacks, restore_backdoor
from backdoorlab.attacks.result import Backdoor, Planted
from backdoorlab.benchmark.card import Card, complete
from backdoorlab.benchmark.commands import command_of
from backdoorlab.benchmark.measure import Measured, Victim, finish, run_defense
from backdoorlab.benchmark.meter import Meter, environment
from backdoorlab.benchmark.spec import Experiment, MethodSpec, Resolved, data_digest, resolve
from backdoorlab.benchmark.store import Store, StoredRun, UserAssets
from backdoorlab.core.errors import ArtifactError, BackdoorLabError, InputError, NotApplicable
from backdoorlab.core.seeding import derive_seed
from backdoorlab.data.split import clean_indices
from backdoorlab.defenses.base import Defense, defenses
from backdoorlab.metrics.result import Metrics
from backdoorlab.models.persistence import State, StoredModel, restore_model
from backdoorlab.tasks import BaseTask, Task, TaskSpec, load_task
from backdoorlab.training.context import Context, Reporter, Silent

DONE = ("ok", "not_applicable")
_KEPT_TASKS = 2


@dataclass(frozen=True)
class RunResult:
    """What running an experiment gave.

    Attributes:
        card: of the experiment's own stage.
        reused: whether that card was in the store already.
        base: the attack (or benign) stage that a defense builds on, as it was run or found for it; None for such a
            stage itself, and where the defense was in the store, so that its base was not looked at.
    """

    card: Card
    reused: bool
    base: RunResult | None = None


@dataclass
class _Work:
    """What the work of a stage is done with.

    Attributes:
        meter: takes the time of each part.
        warnings: what the methods warned of, for the card.
    """

    meter: Meter
    warnings: list[str] = dataclasses.field(default_factory=list)


class Runner:
    """Runs experiments against a store, one at a time.

    Attributes:
        store: where results are looked up and kept.
        device: where models and batches live.
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
        self.root, self.download = root, download
        self._assets = store.assets(self.reporter)
        self._tasks: dict[TaskSpec, BaseTask] = {}

    def task(self, spec: TaskSpec) -> BaseTask:
        """Load a task; the latest ones are kept."""
        if spec not in self._tasks:
            while len(self._tasks) >= _KEPT_TASKS:
                del self._tasks[next(iter(self._tasks))]
            self._tasks[spec] = load_task(spec, root=self.root, download=self.download)
        return self._tasks[spec]

    def resolve(self, experiment: Experiment) -> Resolved:
        """Load the task, build the methods, fill in the defaults and compute the keys.

        Raises:
            InputError: if the experiment cannot be run as it is written.
        """
        return resolve(experiment, self.task(experiment.task))

    def run(self, experiment: Experiment | Resolved, *, fresh: bool = False) -> RunResult:
        """Plant the backdoor, train the benign model, or apply the defense; measure and store.

        A defense's attack (or benign) stage is run first if the store lacks it.

        Args:
            experiment: what to run, resolved or not.
            fresh: do the work of its own stage (not of what a defense builds on) again even if it was done before.

        Returns:
            The card, an existing one if the work was done before.

        Raises:
            InputError: if the experiment cannot be run as it is written; nothing is stored.
        """
        resolved = self.resolve(experiment) if isinstance(experiment, Experiment) else experiment
        if not fresh and (stored := self._stored(resolved)) is not None:
            return RunResult(stored, reused=True)
        if resolved.defense is not None and resolved.base is not None:
            base = self.run(resolved.base)
            defend = functools.partial(self._defend, resolved, resolved.defense, base.card)
            return dataclasses.replace(self._execute(resolved, defend, fresh, (base.card,)), base=base)
        if resolved.attack is None:
            return self._execute(resolved, functools.partial(self._train_benign, resolved), fresh)
        return self._execute(resolved, functools.partial(self._plant, resolved, resolved.attack), fresh)

    def keep_asset(self, kind: str, source: str | Path) -> str:
        """Copy a user's file into the store, so that runs made with it can be repeated without it.

        Args:
            kind: of the asset that it replaces, such as "clean-surrogate".
            source: a safetensors file with the tensors of such an asset, or the key of one that was kept before.

        Returns:
            Its key, for :attr:`MethodSpec.assets`.

        Raises:
            InputError: if there is no such file or key, or it is no safetensors file.
        """
        return self.store.keep_file(kind, source)

    def load_backdoor(self, run: Card | StoredRun | str) -> tuple[BaseTask, Planted]:
        """Task and backdoor of a stored attack, or of the attack behind a stored defense.

        Raises:
            ArtifactError: if the artifact, or the data that it was made from, changed since.
            InputError: for a benign run.
        """
        stored = self._base(run)
        card = self._ok(stored)
        if card.stage == "benign":
            raise InputError(f"{stored.id} is a benign model: it has no backdoor")
        task = self.task(card.experiment().task)
        if data_digest(task) != card.spec["resolved"]["data"]:
            raise ArtifactError(f"{stored.id} was made from other data than {task.dataset.name} holds now")
        with stored.rebuilding():
            backdoor = restore_backdoor((stored.all_tensors(), stored.record()), self.device)
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
        stored = self._find(run)
        card = self._ok(stored)
        if "model.safetensors" not in card.digests:
            raise InputError(f"{stored.id} left the model as it was; load {card.parents[0]} instead")
        record = stored.record()
        with stored.rebuilding():
            if "backdoor" in record:
                model: StoredModel = restore_backdoor((stored.all_tensors(), record), self.device).model
                return model
            return self._model((stored.all_tensors(), record))

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
        stored = self._find(run)
        if stored.stage != "defense":
            return stored
        stage, _, key = stored.card().parents[0].partition("/")
        return StoredRun(stage, key, stored.path.parent.parent / stage / key)

    def _ok(self, run: StoredRun) -> Card:
        card = run.card()
        if card.status != "ok":
            raise InputError(f"{run.id} has nothing to load; its status is {card.status}: {card.reason}")
        return card

    def _context(self, experiment: Experiment, name: str, warnings: list[str]) -> Context:
        keys = experiment.attack.assets if experiment.attack else {}
        assets = UserAssets(self._assets, {kind: self.store.file(kind, key) for kind, key in keys.items()})
        return Context(derive_seed(experiment.seed, name), self.device, self.reporter, assets, warnings)

    def _plant(self, resolved: Resolved, attack: Attack, work: _Work) -> Measured:
        task, ctx = resolved.task, self._context(resolved.experiment, "attack", work.warnings)
        with work.meter.part("attack"):
            planted = attack.run(task, ctx)
        tensors, record = state = planted.stored()
        with work.meter.part("measure"):  # as it comes back from the store, so that the artifact reproduces its numbers
            backdoor = restore_backdoor(state, self.device)
            metrics = backdoor.measure(task, ctx.child("measure"))
            visibility = backdoor.visibility(task)
        notes = dict(planted.notes) | planted.log.notes() | visibility
        if isinstance(planted, Backdoor) and planted.poison.replay:
            notes["replay"] = True
        metrics = finish(metrics, attacked=True, defended=False)
        return Measured(metrics, tensors, record, planted.log.rows(), notes)

    def _train_benign(self, resolved: Resolved, work: _Work) -> Measured:
        task, ctx = resolved.task, self._context(resolved.experiment, "attack", work.warnings)
        with work.meter.part("attack"):
            model, log = task.train_benign(ctx)
        tensors, record = state = model.state()
        with work.meter.part("measure"):
            metrics = task.measure_benign(restore_model(state, self.device), ctx.child("measure"))
        metrics = finish(metrics, attacked=False, defended=False)
        return Measured(metrics, tensors, record, log.rows(), log.notes())

    def _defend(self, resolved: Resolved, defense: Defense, base: Card, work: _Work) -> Measured:
        if base.status != "ok":
            error = NotApplicable if base.status == "not_applicable" else BackdoorLabError
            raise error(f"{base.id} has status {base.status}: {base.reason}")
        task, experiment = resolved.task, resolved.experiment
        with work.meter.part("load"):
            victim = self._victim(base, task)
        rows = clean_indices(task.train.labels, task.num_classes, resolved.clean_fraction, experiment.seed)
        ctx = self._context(experiment, "defense", work.warnings)
        retraining = self._context(experiment, "retrain", work.warnings) if resolved.retrain else None
        return run_defense(defense, victim, rows, ctx, retraining, work.meter)

    def _victim(self, base: Card, task: BaseTask) -> Victim:
        run = self.store.run(base.stage, base.key)
        tensors, record = run.all_tensors(), run.record()
        with run.rebuilding():
            backdoor = restore_backdoor((tensors, record), self.device) if "backdoor" in record else None
            model = backdoor.model if backdoor else self._model((tensors, record))
        measuring = Context(derive_seed(base.spec["seed"], "attack"), self.device, self.reporter, self._assets)
        return Victim(task, model, backdoor, base.stage == "attack", base.metrics, measuring.child("measure"))

    def _stored(self, resolved: Resolved) -> Card | None:
        """The card of a run that need not be repeated; no lock is taken, so that it may be anybody's to write."""
        run = self.store.run(resolved.stage, resolved.key)
        card = run.card() if self.store.has(resolved.stage, resolved.key) else None
        return card if card is not None and card.status in DONE else None

    def _execute(
        self, resolved: Resolved, do: Callable[[_Work], Measured], fresh: bool, parents: tuple[Card, ...] = ()
    ) -> RunResult:
        """Do the work of a key unless another process did it meanwhile, and store the result."""
        with self.store.lock(resolved.stage, resolved.key, self.reporter):
            if not fresh and (stored := self._stored(resolved)) is not None:
                return RunResult(stored, reused=True)
            work, reason, status = _Work(Meter(self.device)), None, "ok"
            try:
                measured = do(work)
            except InputError:
                raise
            except Exception as error:
                status, reason, measured = failure(error)
            if work.warnings:
                measured.notes["warnings"] = list(work.warnings)
            if measured.record:  # a checkpoint names its classes without the data set that they come from
                measured.record["classes"] = list(resolved.task.dataset.train.classes)
            card = Card.model_validate(
                {"stage": resolved.stage, "key": resolved.key, "status": status, "reason": reason}
                | {"spec": resolved.spec, "parents": [parent.id for parent in parents]}
                | {"metrics": dict(measured.metrics), "null_reasons": dict(measured.metrics.reasons)}
                | {
                    "notes": measured.notes | work.meter.notes(),
                    "modality": resolved.task.methods,
                    "changed": resolved.changed,
                }
                | {"command": command_of(resolved)}
                | work.meter.fields()
                | environment(self.device)
            )
            saved = self.store.save(card, measured.tensors, measured.record, measured.log)
            return RunResult(saved.card(), reused=False)


def failure(error: Exception) -> tuple[str, str, Measured]:
    """Status, reason and an outcome without numbers for work that did not succeed."""
    status = "not_applicable" if isinstance(error, NotApplicable) else "failed"
    reason = " ".join(str(error).split()) or type(error).__name__
    log: list[dict[str, Any]] = []
    if not isinstance(error, BackdoorLabError):
        last = traceback.extract_tb(error.__traceback__)[-1]
        reason = f"{type(error).__name__}: {reason[:500]} ({Path(last.filename).name}:{last.lineno})"
        log = [{"traceback": "".join(traceback.format_exception(error))}]
    metrics = complete(Metrics({}), f"{status}: {reason}")
    return status, reason, Measured(metrics, log=log)
