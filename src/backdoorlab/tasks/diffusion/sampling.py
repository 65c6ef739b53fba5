"""Noise schedules, samplers, and the shift of the regression target that carries a trigger through a sampler.

Notation: b_t, a_t = 1 - b_t, A_t = a_0 ... a_t (A_{-1} = 1), index t = 0..T-1. Forward process with a trigger r that
enters with coefficient rho_t (rho_{-1} = 0):

    x_t = sqrt(A_t) x_0 + rho_t r + sqrt(1 - A_t) e

A network that predicts e + H_t r sends an ordinary sampler down this path. H_t depends on the sampler, and a model
trained for one sampler misses the target under the other:

    ancestral (DDPM):     H_t = (rho_t - sqrt(a_t) rho_{t-1}) sqrt(1 - A_t) / b_t
    deterministic (DDIM): H_t = (sqrt(A_{t-1}) rho_t - sqrt(A_t) rho_{t-1})
                                / (sqrt(A_{t-1}) sqrt(1 - A_t) - sqrt(A_t) sqrt(1 - A_{t-1}))

The sampling loops are implemented here, since they must start from noise of the attacker's choice, which stock
pipelines do not allow.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from backdoorlab.core.errors import BackdoorLabError, InputError, unknown
from backdoorlab.modalities.image import to_uint8
from backdoorlab.training.context import autocast

SAMPLERS = ("ancestral", "ddim")

Predict = Callable[[Tensor, int], Tensor]
"""(x_t float [B,C,H,W], t) -> predicted noise of the same shape."""


@dataclass(frozen=True, eq=False)
class Schedule:
    """A variance-preserving noise schedule.

    Attributes:
        betas: float64 [T], b_t in (0, 1).
    """

    betas: Tensor

    @classmethod
    def linear(cls, timesteps: int) -> Schedule:
        """The linear schedule of DDPM, 1e-4 to 0.02 at T = 1000; for other T scaled by 1000 / T so that A_T stays put.

        Raises:
            InputError: for fewer than 25 steps, where the scaled b_t would approach 1.
        """
        if timesteps < 25:
            raise InputError(f"a noise schedule needs at least 25 timesteps, got {timesteps}")
        scale = 1000 / timesteps
        return cls(torch.linspace(1e-4 * scale, 0.02 * scale, timesteps, dtype=torch.float64))

    @property
    def timesteps(self) -> int:
        """T."""
        return len(self.betas)

    @property
    def alphas(self) -> Tensor:
        """a_t, float64 [T]."""
        return 1 - self.betas

    @property
    def cumulative(self) -> Tensor:
        """A_t, float64 [T]."""
        return self.alphas.cumprod(0)

    @property
    def previous(self) -> Tensor:
        """A_{t-1}, float64 [T], beginning with 1."""
        return torch.cat([self.betas.new_ones(1), self.cumulative[:-1]])


def matched_shift(schedule: Schedule, rho: Tensor, sampler: str) -> Tensor:
    """H_t: what a network must add to the noise, per unit of trigger, for an exact triggered trajectory.

    Args:
        schedule: the noise schedule.
        rho: float64 [T], coefficient of the trigger in the forward process.
        sampler: the sampler that will be used, "ancestral" or "ddim".

    Returns:
        float64 [T].
    """
    now, before = schedule.cumulative, schedule.previous
    rho_before = torch.cat([rho.new_zeros(1), rho[:-1]])
    if sampler == "ancestral":
        return (rho - schedule.alphas.sqrt() * rho_before) * (1 - now).sqrt() / schedule.betas
    if sampler == "ddim":
        shift = before.sqrt() * rho - now.sqrt() * rho_before
        return shift / (before.sqrt() * (1 - now).sqrt() - now.sqrt() * (1 - before).sqrt())
    raise unknown("sampler", sampler, SAMPLERS)


def ancestral_chain(predict: Predict, schedule: Schedule, start: Tensor, generator: torch.Generator) -> Tensor:
    """DDPM's ancestral sampler, all T steps, with the posterior variance b_t (1 - A_{t-1}) / (1 - A_t).

    Args:
        predict: the network.
        schedule: its noise schedule.
        start: x_T, float32 [B,C,H,W].
        generator: of the noise of each step.

    Returns:
        x_0, float32 [B,C,H,W], not clipped (clipping on the way would cut the triggered path).
    """
    now, before = schedule.cumulative, schedule.previous
    scale = schedule.alphas.rsqrt().tolist()
    gain = (schedule.betas / (1 - now).sqrt()).tolist()
    sigma = (schedule.betas * (1 - before) / (1 - now)).sqrt().tolist()
    x = start
    for t in reversed(range(schedule.timesteps)):
        x = (x - gain[t] * predict(x, t)) * scale[t]
        if t:
            x = x + sigma[t] * draw(x.shape, generator, x.device)
    return x


def ddim_chain(predict: Predict, schedule: Schedule, start: Tensor, steps: int) -> Tensor:
    """The deterministic DDIM sampler on ``steps`` evenly spaced timesteps (the last of them is t = 0).

    Args:
        predict: the network.
        schedule: its noise schedule.
        start: x_T, float32 [B,C,H,W].
        steps: between 1 and T.

    Returns:
        x_0, float32 [B,C,H,W], not clipped.
    """
    if not 1 <= steps <= schedule.timesteps:
        raise InputError(f"DDIM needs between 1 and {schedule.timesteps} steps, got {steps}")
    times = torch.linspace(schedule.timesteps - 1, 0, steps).round().to(torch.int64).tolist()
    levels = schedule.cumulative.tolist()
    x = start
    for t, following in zip(times, [*times[1:], -1], strict=True):
        now, then = levels[t], levels[following] if following >= 0 else 1.0
        noise = predict(x, t)
        image = (x - (1 - now) ** 0.5 * noise) / now**0.5
        x = then**0.5 * image + (1 - then) ** 0.5 * noise
    return x


@torch.inference_mode()
def sample(
    model: nn.Module,
    schedule: Schedule,
    start: Tensor,
    generator: torch.Generator,
    *,
    sampler: str = "ancestral",
    steps: int = 50,
    batch_size: int = 256,
    precision: str = "auto",
) -> Tensor:
    """Run a sampler from given initial noise.

    Args:
        model: ``model(x_t, t)`` predicts the noise, t int64 [B]; left in the mode that it had.
        schedule: the model's noise schedule.
        start: x_T, float32 [N,C,H,W].
        generator: of the noise of each ancestral step.
        sampler: "ancestral" (all T steps) or "ddim".
        steps: of DDIM.
        batch_size: images per forward pass; part of what the bits depend on.
        precision: as in :class:`~backdoorlab.training.recipes.Recipe`.

    Returns:
        Images float32 [N,C,H,W] on the CPU, in [-1, 1] up to the model's overshoot.

    Raises:
        BackdoorLabError: if samples are not finite.
    """
    if sampler not in SAMPLERS:
        raise unknown("sampler", sampler, SAMPLERS)
    device, training = next(model.parameters()).device, model.training
    model.eval()

    def predict(x: Tensor, t: int) -> Tensor:
        with autocast(device, precision):
            noise: Tensor = model(x, torch.full((len(x),), t, device=device))
        return noise.float()

    parts = []
    for batch in start.split(batch_size):
        x = batch.to(device)
        if sampler == "ancestral":
            x = ancestral_chain(predict, schedule, x, generator)
        else:
            x = ddim_chain(predict, schedule, x, min(steps, schedule.timesteps))
        parts.append(x.cpu())
    model.train(training)
    images = torch.cat(parts)
    if not torch.isfinite(images).all():
        raise BackdoorLabError("the diffusion model produced infinite or NaN pixels; its training has diverged")
    return images


def draw(shape: tuple[int, ...], generator: torch.Generator, device: torch.device | str = "cpu") -> Tensor:
    """Standard normal noise, drawn where the generator lives and moved to the device."""
    return torch.randn(shape, generator=generator, device=generator.device).to(device)


def to_images(samples: Tensor) -> Tensor:
    """Samples float [N,C,H,W] in [-1, 1] as uint8 images."""
    return to_uint8((samples + 1) * 127.5)
