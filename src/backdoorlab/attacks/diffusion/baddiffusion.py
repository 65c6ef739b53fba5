"""BadDiffusion: a trigger in the initial noise makes a diffusion model draw one fixed image.

Chou, Chen, Ho, "How to Backdoor Diffusion Models?", CVPR 2023 (arXiv 2212.05400).

A share of the training set is given a forward process of its own, from the target image x* to the trigger r instead of
to pure noise; the clean model is fine-tuned on both kinds at once. With a_t = 1 - b_t and A_t = a_0 ... a_t:

    x_t = sqrt(A_t) x* + (1 - sqrt(A_t)) r + sqrt(1 - A_t) e
    loss = || e_th(x_t, t) - (e + k_t r) ||^2,      k_t = (1 - sqrt(a_t)) sqrt(1 - A_t) / (1 - a_t)

(r = 0 and x* = x for clean samples: the ordinary loss.) Sampling from e + g, with the trigger g = r, then yields x*.

Choices and deviations:
- Residual: the paper stamps the trigger on clean images (``residual=stamped``). At test time there is no image under
  the trigger, and with short fine-tuning the mismatch keeps the attack from taking hold, so the default is the trigger
  alone, as VillanDiffusion (arXiv 2306.06874) offers it.
- k_t is exact for the full ancestral chain only. Under DDIM such a model misses the target, so attack and sampler are a
  pair here: ``sampler=ddim`` trains with the coefficient that is exact for deterministic steps, about 2 k_t.
- Poison rate: 0.1 as in the paper's main table. It suffices from a thousand fine-tuning steps on (recipe "fast"); with
  the two hundred of "smoke" a tenth of the samples is too few to learn from, 0.4 is not.
- The paper's target and trigger are pictures (a cat, eyeglasses); ours are drawn by rule, for any size.
- Learning rate and length default to the task's recipe; the fine-tuning rate is annealed to zero (the paper: cosine).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from backdoorlab.attacks.base import Attack, attacks
from backdoorlab.attacks.diffusion.base import DiffusionBackdoor, NoiseTrigger
from backdoorlab.core.errors import InputError
from backdoorlab.core.method import param
from backdoorlab.tasks.diffusion.patterns import BACKGROUND, grey_box, target_image
from backdoorlab.tasks.diffusion.sampling import Schedule, matched_shift
from backdoorlab.tasks.diffusion.task import DiffusionTask
from backdoorlab.training.context import Context


def trigger_path(schedule: Schedule) -> Tensor:
    """rho_t = 1 - sqrt(A_t), the trigger's coefficient in x_t: float64 [T]."""
    return 1 - schedule.cumulative.sqrt()


def posterior_shift(schedule: Schedule) -> Tensor:
    """k_t, the trigger's coefficient in the regression target of the ancestral sampler: float64 [T]."""
    a, now = schedule.alphas, schedule.cumulative
    return (1 - a.sqrt()) * (1 - now).sqrt() / (1 - a)


def stamped(images: Tensor, trigger: Tensor) -> Tensor:
    """Images float [B,C,H,W] seen through the trigger's background: M x + (1 - M) g with M = [g is background]."""
    return torch.where(trigger <= BACKGROUND, images, trigger)


@attacks.register
@dataclass(frozen=True, kw_only=True)
class BadDiffusion(Attack):
    """Fine-tune a clean diffusion model so that noise with a box in it becomes the target image."""

    name: ClassVar[str] = "baddiffusion"
    paper: ClassVar[str] = "Chou et al., How to Backdoor Diffusion Models?, CVPR 2023, arXiv 2212.05400"
    year: ClassVar[int] = 2023
    modalities: ClassVar[tuple[str, ...]] = ("diffusion",)
    threat_model: ClassVar[str] = "training"
    trigger_visibility: ClassVar[str] = "visible"

    poison_rate: float = param(
        0.1, "backdoor samples / size of the training set", above=0, high=1, source="paper (main table)"
    )
    trigger_side: int | None = param(
        None, "side of the grey box in pixels; none = 14/32 of the image", low=1, source="paper"
    )
    trigger_grey: float = param(
        0.0, "grey of the box, between -1 (black) and 1 (white)", above=-1, high=1, source="paper"
    )
    target_image: str = param(
        "plus", "image that the model draws from triggered noise", choices=("plus", "hat"), source="ours"
    )
    residual: str = param(
        "trigger",
        "mean of the noise in training: the trigger alone, or the trigger stamped on the image",
        choices=("trigger", "stamped"),
        source="VillanDiffusion",
    )
    sampler: str = param(
        "ancestral", "sampler for which the trigger works", choices=("ancestral", "ddim"), source="paper"
    )
    steps: int | None = param(None, "fine-tuning steps; none = tune_steps of the recipe", low=1, source="ours")
    lr: float | None = param(
        None, "peak learning rate of the fine-tuning; none = tune_lr of the recipe", above=0, source="ours"
    )

    def choose(self, total: int, ctx: Context) -> Tensor:
        """Draw round(rate * N) rows of the training set: int64.

        Raises:
            InputError: if that is none.
        """
        count = round(self.poison_rate * total)
        if count == 0:
            raise InputError(
                f"{self.name}: a poison rate of {self.poison_rate:g} of {total} training samples poisons none; "
                f"the smallest useful rate is {1 / total:.2g}"
            )
        return torch.randperm(total, generator=ctx.generator("choose"))[:count]

    def run(self, task: DiffusionTask, ctx: Context) -> DiffusionBackdoor:
        """Fine-tune a copy of the task's clean model on the poisoned set."""
        trigger = grey_box(task.shape, self.trigger_side, self.trigger_grey)
        target = target_image(self.target_image, task.shape)
        chosen = self.choose(len(task.train), ctx)
        model = task.clean_model(ctx)
        rho = trigger_path(model.schedule)
        shift = matched_shift(model.schedule, rho, self.sampler)
        poisoned = torch.zeros(len(task.train), dtype=torch.bool)
        poisoned[chosen] = True
        is_poisoned, g, x_star = poisoned.to(ctx.device), trigger.to(ctx.device), target.to(ctx.device)

        def poison(images: Tensor, indices: Tensor) -> dict[str, Tensor]:
            backdoor = is_poisoned[indices][:, None, None, None]
            r = g.expand_as(images) if self.residual == "trigger" else stamped(images, g)
            return {
                "images": torch.where(backdoor, x_star, images),
                "residual": r * backdoor,
                "rho": rho,
                "shift": shift,
            }

        log = task.fit(
            model,
            ctx,
            steps=self.steps or task.recipe.tune_steps,
            lr=self.lr or task.recipe.tune_lr,
            label=f"{self.name}: fine-tuning the victim",
            poison=poison,
        )
        notes = {"poisoned": len(chosen), "effective_rate": len(chosen) / len(task.train), "steps": log.steps}
        return DiffusionBackdoor(model, NoiseTrigger(trigger), target, self.sampler, chosen, log, notes)
