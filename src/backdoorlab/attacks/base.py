"""The contract of attacks: declared facts, and :meth:`Attack.plant`, behind which authors write :meth:`Attack.run`."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from backdoorlab.attacks.result import Planted
from backdoorlab.core.errors import ArtifactError
from backdoorlab.core.method import Method
from backdoorlab.core.registry import Registry
from backdoorlab.models.persistence import State
from backdoorlab.tasks import BaseTask
from backdoorlab.training.context import Context
from backdoorlab.training.session import session

attacks: Registry[Attack] = Registry("attack", ("backdoorlab.attacks",), "backdoorlab.attacks")


@dataclass(frozen=True, kw_only=True)
class Attack(Method):
    """Base of all attacks, whatever they attack: facts, and :meth:`plant`."""

    threat_model: ClassVar[str]
    """"poisoning", "training" or "weights"."""
    trigger_visibility: ClassVar[str]
    """"visible", "subtle" or "invisible"."""
    sample_specific: ClassVar[bool] = False
    """Does the pattern depend on the sample?"""
    needs_surrogate: ClassVar[bool] = False
    """Must a network be trained before anything can be poisoned?"""
    asset_kinds: ClassVar[tuple[str, ...]] = ()
    """What it makes first and shares between runs (``common.assets``); the user's file can replace each of them."""
    stronger: ClassVar[str] = ""
    """What makes the trigger change more: "raise" or "lower" and hyper-parameters ("raise size"); "" for nothing."""
    fact_names: ClassVar[tuple[str, ...]] = (
        "threat_model",
        "trigger_visibility",
        "sample_specific",
        "needs_surrogate",
        "asset_kinds",
    )

    def assets_in_use(self) -> tuple[str, ...]:
        """Those of :attr:`asset_kinds` that it makes with these hyper-parameters: only they can be replaced."""
        return self.asset_kinds

    def plant(
        self, task: BaseTask, *, seed: int = 0, device: str | torch.device = "auto", progress: bool | None = None
    ) -> Any:
        """Attack a task.

        Args:
            task: of :func:`backdoorlab.load_task`. If this class does not serve its modality, but another class of the
                same name does, that one is used with the same settings.
            seed: all randomness derives from it.
            device: "auto", "cpu", "cuda", ...
            progress: show bars; None shows them on a terminal and in a notebook.

        Returns:
            The backdoor, which knows its task: ``backdoor.evaluate()``, ``backdoor.model``, ``backdoor.save(DIR)``.

        Raises:
            InputError: if the hyper-parameters do not fit the task (target outside the classes, rate above capacity, a
                trigger larger than the sample, ...).
        """
        method, modality = self, task.methods
        if modality not in self.modalities:
            settings = self.settings()
            method = attacks.get(self.name, modality).build({name: settings[name] for name in self.changed()})
        return method.run(task, session(seed, device, progress, "attack")).on(task, seed, self.name)

    @abstractmethod
    def run(self, task: Any, ctx: Context) -> Planted:
        """The hook that an attack writes; :meth:`plant` and the benchmark call it.

        Raises:
            InputError: if the hyper-parameters do not fit the task (target outside the classes, rate above capacity, a
                trigger larger than the sample, ...).
        """


def restore_backdoor(state: State, device: torch.device | str = "cpu") -> Planted:
    """A stored backdoor of any kind, with the model on a device.

    Raises:
        ArtifactError: for an unknown kind, or a record that does not fit its tensors.
    """
    tensors, record = state
    attacks.names()  # imports every attack, and with it its classes of backdoors and models
    kind = record.get("backdoor")
    if kind not in Planted._kinds:
        raise ArtifactError(f"unknown kind of backdoor {kind!r}; known: {', '.join(sorted(Planted._kinds))}")
    backdoor = Planted._kinds[kind].from_state(tensors, record)
    backdoor.model.to(device)
    return backdoor
