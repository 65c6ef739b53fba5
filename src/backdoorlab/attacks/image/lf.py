"""LF: a smooth universal perturbation that a clean model already leans on.

Zeng, Park, Mao, Jia, "Rethinking the Backdoor Attacks' Triggers: A Frequency Perspective", ICCV 2021 (arXiv
2104.03413).

High-frequency artefacts give most triggers away; this one has none. A pattern v in [0, 0.2] of the grey range is smooth
by construction and optimised on a clean model h to push samples toward the target class:

    v = 0.2 norm01(S(z)),   min over z of CE(h(clip(x + v)), t),   V = round(255 v),   T(x) = clip(x + V)

with S a Gaussian blur and norm01 the rescaling of the whole pattern to [0, 1].

Choices: the published search accumulates targeted DeepFool steps and low-passes the sum; here z is optimised by Adam
directly. S has a standard deviation of a fifth of the shorter side. h is a
benign model of the task's own architecture and recipe, made once per task and shared by all runs, and so is the
pattern; both see inputs in the same range. ``variant="random"`` needs no model: a random field of the cosine
frequencies u + v <= 6, rescaled to the same range (report it as "LF-random").
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from backdoorlab.attacks.base import PoisoningAttack, attacks
from backdoorlab.attacks.pixels import AdditiveTrigger
from backdoorlab.attacks.surrogate import asset_tensor, clean_surrogate, surrogate_spec
from backdoorlab.core.method import param
from backdoorlab.core.seeding import make_generator
from backdoorlab.modalities.filters import blur_matrix, expect_images, inverse_dct
from backdoorlab.models.classifier import Classifier
from backdoorlab.training.context import Context, Tensors
from backdoorlab.training.task import Task


def rescale(field: Tensor) -> Tensor:
    """Shift and scale a whole field to [0, 1]."""
    low = field.amin()
    return (field - low) / (field.amax() - low).clamp_min(1e-12)


def low_frequency_field(channels: int, height: int, width: int, seed: int) -> Tensor:
    """Random cosine waves with u + v <= 6, rescaled to [0, 1]: float32 [channels, height, width]."""
    coefficients = torch.randn(channels, height, width, generator=make_generator(seed, "low frequencies"))
    keep = torch.arange(height)[:, None] + torch.arange(width) <= 6
    return rescale(inverse_dct(coefficients.double() * keep)).float()


def optimise_pattern(
    model: Classifier, images: Tensor, target: int, strength: float, sigma: float, steps: int, ctx: Context
) -> Tensor:
    """The smooth pattern that lowers a clean model's loss for the target class.

    Args:
        model: frozen, in evaluation mode.
        images: uint8 [N,C,H,W], samples of all classes.
        target: class to push toward.
        strength: range of the pattern, as a share of the grey range.
        sigma: of the blur, in pixels.
        steps: of Adam (rate 0.05), on 128 images each.
        ctx: seed, device, progress.

    Returns:
        float32 [C,H,W] in [0, strength], on the CPU.
    """
    generator, device = ctx.generator("pattern"), ctx.device
    one = torch.tensor([sigma], device=device)
    rows, columns = (blur_matrix(side, one)[0] for side in images.shape[2:])
    z = torch.randn(images.shape[1:], generator=generator).to(device).requires_grad_()
    adam = torch.optim.Adam([z], lr=0.05)
    for _ in ctx.track(range(steps), "lf: optimising the pattern", steps):
        chosen = torch.randint(0, len(images), (min(128, len(images)),), generator=generator)
        inputs = model.modality.prepare(images[chosen].to(device))
        pattern = strength * rescale(rows @ z @ columns.T)
        logits = model((inputs + pattern).clamp(0, 1))
        loss = F.cross_entropy(logits, torch.full((len(chosen),), target, device=device))
        (z.grad,) = torch.autograd.grad(loss, z)
        adam.step()
    return (strength * rescale(rows @ z.detach() @ columns.T)).cpu()


@attacks.register
@dataclass(frozen=True, kw_only=True)
class Lf(PoisoningAttack):
    """A smooth universal pattern, optimised on a clean model."""

    name: ClassVar[str] = "lf"
    paper: ClassVar[str] = "Zeng et al., A Frequency Perspective, ICCV 2021, arXiv 2104.03413"
    year: ClassVar[int] = 2021
    modalities: ClassVar[tuple[str, ...]] = ("image",)
    trigger_visibility: ClassVar[str] = "subtle"
    needs_surrogate: ClassVar[bool] = True
    asset_kinds: ClassVar[tuple[str, ...]] = ("lf-pattern", "clean-surrogate")

    variant: str = param(
        "optimised", "pattern optimised on a clean model, or random", choices=("optimised", "random"), source="ours"
    )
    strength: float = param(0.2, "range of the pattern / grey range", above=0, high=1, source="BackdoorBench")
    steps: int = param(300, "optimisation steps", low=1, source="ours")
    samples: int = param(1000, "training images used for the optimisation", low=1, source="ours")
    pattern_seed: int = param(0, "seed of the random variant, apart from the run's seed", low=0, source="ours")

    def make_trigger(self, task: Task, ctx: Context) -> AdditiveTrigger:
        """Optimise or draw the pattern; rounded to whole grey levels."""
        self.target_map_for(task)
        images = expect_images(task.train.inputs)
        channels, height, width = images.shape[1:]
        if self.variant == "random":
            field = self.strength * low_frequency_field(channels, height, width, self.pattern_seed)
            return AdditiveTrigger((255 * field).round())
        sigma = min(height, width) / 5
        spec: dict[str, Any] = {
            "surrogate": surrogate_spec(task),
            "target": self.target,
            "strength": self.strength,
            "sigma": sigma,
            "steps": self.steps,
            "samples": self.samples,
        }

        def build(own: Context) -> Tensors:
            # The surrogate's own cache is the run's: it is shared with every other attack that needs one.
            model = clean_surrogate(task, own)
            chosen = torch.randperm(len(images), generator=own.generator("samples"))[: self.samples]
            return {"v": optimise_pattern(model, images[chosen], self.target, self.strength, sigma, self.steps, own)}

        found = asset_tensor(ctx.asset("lf-pattern", spec, build), "v", (channels, height, width), "lf-pattern")
        return AdditiveTrigger((255 * found).round())
