"""What an attack on a diffusion model returns: the model, the trigger in the initial noise, the target image."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from backdoorlab.attacks.result import Planted
from backdoorlab.attacks.triggers.base import Trigger, load_trigger
from backdoorlab.core.errors import ArtifactError, InputError
from backdoorlab.data.split import Inputs
from backdoorlab.metrics.result import Metrics
from backdoorlab.models.persistence import State, restore_model
from backdoorlab.tasks.diffusion.denoiser import Denoiser
from backdoorlab.tasks.diffusion.measure import generate, measure_samples
from backdoorlab.tasks.diffusion.patterns import grey_box, target_image
from backdoorlab.tasks.diffusion.sampling import SAMPLERS
from backdoorlab.tasks.diffusion.task import DiffusionTask
from backdoorlab.training.context import Context
from backdoorlab.training.log import FitLog


@dataclass(frozen=True, eq=False)
class NoiseTrigger(Trigger):
    """Initial noise e becomes e + g.

    Attributes:
        pattern: g, float32 [C,H,W].
    """

    kind: ClassVar[str] = "diffusion.noise"

    pattern: Tensor

    def __call__(
        self, inputs: Inputs, indices: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Add the pattern to noise float [N,C,H,W] of its size."""
        if not isinstance(inputs, Tensor) or not inputs.is_floating_point() or inputs.shape[1:] != self.pattern.shape:
            shape, got = ", ".join(map(str, self.pattern.shape)), f"{inputs.dtype} {tuple(inputs.shape)}"
            raise InputError(f"this trigger takes float noise of shape [N, {shape}], got {got}")
        return inputs + self.pattern.to(inputs)


@dataclass(frozen=True, eq=False)
class DiffusionBackdoor(Planted):
    """The result of an attack on a diffusion model.

    Attributes:
        model: the victim, in evaluation mode.
        trigger: what is done to the initial noise.
        target: what triggered sampling should produce, float32 [C,H,W] in [-1, 1].
        sampler: for which the trigger was planted, "ancestral" or "ddim".
        poisoned: int64 [M], rows of the training set that served as backdoor samples.
        log: of the victim's training.
        task: that it was planted in; None where the benchmark keeps the task itself.
        seed: of the run, from which the randomness of measurements derives too.
        title: what tables call it.
        notes: facts worth keeping on the card, JSON-able.
    """

    kind: ClassVar[str] = "diffusion"

    model: Denoiser
    trigger: NoiseTrigger
    target: Tensor
    sampler: str = "ancestral"
    poisoned: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    log: FitLog = field(default_factory=FitLog)
    notes: dict[str, Any] = field(default_factory=dict)
    task: DiffusionTask | None = field(default=None, repr=False)
    seed: int = 0
    title: str = "backdoor"

    def generate(
        self,
        task: DiffusionTask,
        context: Context,
        count: int,
        *,
        triggered: bool,
        model: Denoiser | None = None,
        sampler: str | None = None,
    ) -> Tensor:
        """Draw images uint8 [N,C,H,W] from the victim (or another model), see :func:`generate`.

        Args:
            task: whose recipe says how many DDIM steps to take.
            context: its seed fixes the noise.
            count: N.
            triggered: whether the trigger is in the initial noise.
            model: instead of the victim, such as a repaired one.
            sampler: instead of the one that the attack is matched to.
        """
        shift = self.trigger.pattern if triggered else None
        return generate(model or self.model, task, context, count, shift, sampler or self.sampler)

    def measure(
        self, task: DiffusionTask, context: Context, model: Denoiser | None = None, *, sampler: str | None = None
    ) -> Metrics:
        """How well the trigger works and how good clean samples are, see :func:`measure_samples`.

        Args:
            task: data, classifier and the clean model to compare with.
            context: seed of all samples.
            model: instead of the victim, such as a repaired one.
            sampler: instead of the one that the attack is matched to.
        """
        victim, shift = model or self.model, self.trigger.pattern
        return measure_samples(victim, task, context, shift, self.target, sampler or self.sampler)

    def state(self) -> State:
        """Tensors by file name (model, trigger, target) and a JSON-able record, for the store."""
        weights, model = self.model.state()
        trigger, config = self.trigger.state()
        record = {
            "backdoor": self.kind,
            "model": model,
            "trigger": {"kind": self.trigger.kind, **config},
            "sampler": self.sampler,
            "notes": self.notes,
        }
        return {**weights, "trigger": trigger, "target": {"image": self.target, "poisoned": self.poisoned}}, record

    @classmethod
    def from_state(cls, tensors: dict[str, dict[str, Tensor]], record: dict[str, Any]) -> DiffusionBackdoor:
        """Inverse of :meth:`state` (without the training log).

        Raises:
            ArtifactError: if the record is of another kind, or it and the tensors do not belong together.
        """
        if record.get("backdoor") != cls.kind:
            raise ArtifactError(f"not a record of a backdoored diffusion model: {record.get('backdoor')!r}")
        try:
            config = {k: v for k, v in record["trigger"].items() if k != "kind"}
            trigger = load_trigger(record["trigger"]["kind"], tensors["trigger"], config)
            target, poisoned, sampler = tensors["target"]["image"], tensors["target"]["poisoned"], record["sampler"]
            model = restore_model((tensors, record["model"]))
        except KeyError as error:
            raise ArtifactError(f"the record of a backdoored diffusion model lacks {error}") from None
        if (
            not isinstance(trigger, NoiseTrigger)
            or not isinstance(model, Denoiser)
            or sampler not in SAMPLERS
            or tuple(target.shape) != model.shape
        ):
            raise ArtifactError("the record of a backdoored diffusion model does not fit its tensors")
        return cls(model, trigger, target, sampler, poisoned, notes=record.get("notes", {}))


def benign_backdoor(
    task: DiffusionTask, context: Context, trigger: NoiseTrigger | None = None, target: Tensor | None = None
) -> DiffusionBackdoor:
    """The clean model as a backdoor, so that the same metrics measure what a trigger does to it.

    Args:
        task: the task.
        context: for the shared clean model.
        trigger: None takes the grey box.
        target: None takes the plus sign.
    """
    return DiffusionBackdoor(
        task.clean_model(context),
        trigger or NoiseTrigger(grey_box(task.shape)),
        target_image("plus", task.shape) if target is None else target,
        notes={"benign": True},
    )
