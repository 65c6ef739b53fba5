"""What an attack on a diffusion model returns: the model, the trigger in the initial noise, the target image."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from backdoorlab.attacks.trigger import Trigger, load_trigger
from backdoorlab.core.errors import ArtifactError, InputError
from backdoorlab.data.split import Inputs
from backdoorlab.diffusion.denoiser import Denoiser, restore_denoiser
from backdoorlab.diffusion.metrics import HIT_MSE, frechet_distance, judged, squared_error, structural_similarity
from backdoorlab.diffusion.patterns import grey_box, target_image
from backdoorlab.diffusion.sampling import SAMPLERS, draw, sample
from backdoorlab.diffusion.task import DiffusionTask, to_images
from backdoorlab.training.context import Context
from backdoorlab.training.evaluate import predict, predict_features
from backdoorlab.training.loop import FitLog


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
class DiffusionBackdoor:
    """The result of an attack on a diffusion model.

    Attributes:
        model: the victim, in evaluation mode.
        trigger: what is done to the initial noise.
        target: what triggered sampling should produce, float32 [C,H,W] in [-1, 1].
        sampler: for which the trigger was planted, "ancestral" or "ddim".
        poisoned: int64 [M], rows of the training set that served as backdoor samples.
        log: of the victim's training.
        notes: facts worth keeping on the card, JSON-able.
    """

    model: Denoiser
    trigger: NoiseTrigger
    target: Tensor
    sampler: str = "ancestral"
    poisoned: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    log: FitLog = field(default_factory=FitLog)
    notes: dict[str, Any] = field(default_factory=dict)

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
        """Draw images uint8 [N,C,H,W] from the victim (or another model).

        Clean and triggered images start from the same noise e, the latter from e + g.

        Args:
            task: whose recipe says how many DDIM steps to take.
            context: its seed fixes the noise.
            count: N.
            triggered: whether the trigger is in the initial noise.
            model: instead of the victim, such as a repaired one.
            sampler: instead of the one that the attack is matched to.
        """
        model = model or self.model
        start = draw((count, *model.shape), context.generator("start"))
        chain = context.generator("chain", device=model.device)
        return to_images(sample(
            model, model.schedule, self.trigger(start) if triggered else start, chain, sampler=sampler or self.sampler,
            steps=task.recipe.ddim_steps, precision=task.recipe.precision,
        ))  # fmt: skip

    def measure(
        self, task: DiffusionTask, context: Context, model: Denoiser | None = None, *, sampler: str | None = None
    ) -> dict[str, Any]:
        """How well the trigger works and how good clean samples are, of the victim or of another model.

        Args:
            task: data, judge and the clean model to compare with.
            context: seed of all samples.
            model: instead of the victim, such as a repaired one.
            sampler: instead of the one that the attack is matched to.

        Returns:
            asr: share of triggered samples within ``hit_mse`` of the target. acc, ra: None, see ``acc_note``.
            mse_target, ssim_target: of triggered samples; mse_target_clean: of clean samples, to the same target.
            frechet_local: of clean samples to the training images; frechet_local_benign: of the clean model's samples.
            judge_confidence, classes_covered, class_shares: of clean samples; judge_confidence_benign.
        """
        victim = model or self.model
        sampler = sampler or self.sampler
        clean = self.generate(task, context, task.recipe.samples, triggered=False, model=victim, sampler=sampler)
        triggered = self.generate(
            task, context, task.recipe.triggered_samples, triggered=True, model=victim, sampler=sampler
        )
        benign, judge, target = task.clean_samples(context), task.judge(context), to_images(self.target)
        errors = squared_error(triggered, target)
        real = predict_features(judge, task.train.inputs)
        return {
            "acc": None,
            "acc_note": "a generative model has no accuracy; see judge_confidence and frechet_local",
            "asr": float((errors <= HIT_MSE).double().mean()),
            "ra": None,
            "hit_mse": HIT_MSE,
            "mse_target": float(errors.mean()),
            "mse_target_clean": float(squared_error(clean, target).mean()),
            "ssim_target": structural_similarity(triggered, target),
            "frechet_local": frechet_distance(predict_features(judge, clean), real),
            "frechet_local_benign": frechet_distance(predict_features(judge, benign), real),
            **judged(predict(judge, clean)),
            "judge_confidence_benign": judged(predict(judge, benign))["judge_confidence"],
            "sampler": sampler,
            "n_clean": len(clean),
            "n_triggered": len(triggered),
        }

    def state(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        """Tensors by file name (model, trigger, target) and a JSON-able record, for the store."""
        trigger, config = self.trigger.state()
        record = {
            "backdoor": "diffusion",
            **self.model.record(),
            "trigger": {"kind": self.trigger.kind, **config},
            "sampler": self.sampler,
            "notes": self.notes,
        }
        tensors = {
            "model": dict(self.model.state_dict()),
            "trigger": trigger,
            "target": {"image": self.target, "poisoned": self.poisoned},
        }
        return tensors, record

    @classmethod
    def from_state(cls, tensors: dict[str, dict[str, Tensor]], record: dict[str, Any]) -> DiffusionBackdoor:
        """Inverse of :meth:`state` (without the training log).

        Raises:
            ArtifactError: if the record is of another kind, or it and the tensors do not belong together.
        """
        if record.get("backdoor") != "diffusion":
            raise ArtifactError(f"not a record of a backdoored diffusion model: {record.get('backdoor')!r}")
        try:
            config = {k: v for k, v in record["trigger"].items() if k != "kind"}
            trigger = load_trigger(record["trigger"]["kind"], tensors["trigger"], config)
            target, poisoned, sampler = tensors["target"]["image"], tensors["target"]["poisoned"], record["sampler"]
            model = restore_denoiser(record, tensors["model"])
        except KeyError as error:
            raise ArtifactError(f"the record of a backdoored diffusion model lacks {error}") from None
        if not isinstance(trigger, NoiseTrigger) or sampler not in SAMPLERS or tuple(target.shape) != model.shape:
            raise ArtifactError("the record of a backdoored diffusion model does not fit its tensors")
        return cls(model, trigger, target, sampler, poisoned, notes=record.get("notes", {}))


def benign_backdoor(
    task: DiffusionTask, context: Context, trigger: NoiseTrigger | None = None, target: Tensor | None = None
) -> DiffusionBackdoor:
    """The clean model in the same dress, so that it is measured by the same metrics: what a trigger does to it.

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
