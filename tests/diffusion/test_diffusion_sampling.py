"""Schedules, samplers and matched shifts against independent computations."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from backdoorlab.attacks.diffusion.baddiffusion import posterior_shift, stamped, trigger_path
from backdoorlab.core.errors import InputError
from backdoorlab.core.seeding import make_generator
from backdoorlab.tasks.diffusion.sampling import Schedule, ancestral_chain, ddim_chain, matched_shift

TIMESTEPS = (100, 250, 1000)


@pytest.mark.parametrize("timesteps", TIMESTEPS)
def test_scaled_schedules_end_in_noise(timesteps: int) -> None:
    schedule = Schedule.linear(timesteps)
    assert schedule.timesteps == timesteps
    assert 1e-5 < float(schedule.cumulative[-1]) < 1e-4
    assert bool(((schedule.betas > 0) & (schedule.betas < 1)).all())


def test_too_few_timesteps_are_refused() -> None:
    with pytest.raises(InputError, match="at least 25 timesteps, got 10"):
        Schedule.linear(10)


@pytest.mark.parametrize("timesteps", TIMESTEPS)
def test_posterior_shift_is_what_the_gaussian_posterior_needs(timesteps: int) -> None:
    """The sampler's mean, fed e + k_t r, must be the exact mean of q(x_{t-1} | x_t, x_0) of the triggered process."""
    schedule = Schedule.linear(timesteps)
    k = posterior_shift(schedule)
    level = [1.0, *schedule.cumulative.tolist()]
    x0, r, e = 0.3, -0.8, 0.7
    for t in range(1, timesteps, 7):
        now, before = level[t + 1], level[t]
        a = now / before
        b = 1 - a
        # Triggered process: x_{t-1} ~ N(m, v), x_t | x_{t-1} ~ N(sqrt(a) x_{t-1} + (1 - sqrt(a)) r, b).
        x_t = math.sqrt(now) * x0 + (1 - math.sqrt(now)) * r + math.sqrt(1 - now) * e
        m, v = math.sqrt(before) * x0 + (1 - math.sqrt(before)) * r, 1 - before
        gain = v * math.sqrt(a) / (a * v + b)
        exact = m + gain * (x_t - math.sqrt(a) * m - (1 - math.sqrt(a)) * r)
        step = (x_t - b / math.sqrt(1 - now) * (e + float(k[t]) * r)) / math.sqrt(a)
        assert step == pytest.approx(exact, abs=1e-9)


@pytest.mark.parametrize("timesteps", TIMESTEPS)
def test_matched_shift_equals_known_closed_forms(timesteps: int) -> None:
    schedule = Schedule.linear(timesteps)
    rho = trigger_path(schedule)
    torch.testing.assert_close(matched_shift(schedule, rho, "ancestral"), posterior_shift(schedule))
    # InviBackdoor's coefficient is the DDIM shift of the same path, and nearly twice k_t at high noise.
    now, before = schedule.cumulative, schedule.previous
    invi = (before.sqrt() - now.sqrt()) / (before.sqrt() * (1 - now).sqrt() - now.sqrt() * (1 - before).sqrt())
    ddim = matched_shift(schedule, rho, "ddim")
    torch.testing.assert_close(ddim, invi)
    assert float(ddim[-1] / posterior_shift(schedule)[-1]) == pytest.approx(2, rel=0.06)
    # A trigger that rides on the noise scale is, to a deterministic sampler, just noise: kappa = 1.
    torch.testing.assert_close(matched_shift(schedule, (1 - now).sqrt(), "ddim"), torch.ones_like(now))


def test_shift_at_a_thousand_steps_has_the_values_of_the_derivation() -> None:
    k = posterior_shift(Schedule.linear(1000))
    assert [round(float(k[t]), 3) for t in (0, 100, 500, 999)] == [0.005, 0.162, 0.481, 0.503]


def test_unknown_sampler_names_the_nearest() -> None:
    schedule = Schedule.linear(100)
    with pytest.raises(InputError, match="Did you mean 'ancestral'"):
        matched_shift(schedule, trigger_path(schedule), "ancestrl")


def _trajectory(schedule: Schedule, shift: Tensor, sampler: str) -> tuple[float, float]:
    """Of a network that knows the truth and predicts e + shift_t r: largest deviation from the path, and mean x_0."""
    level, rho, h = schedule.cumulative.tolist(), trigger_path(schedule).tolist(), shift.tolist()
    target, r, strayed = 0.5, -1.0, []

    def oracle(x: Tensor, t: int) -> Tensor:
        strayed.append(abs(float(x.mean()) - level[t] ** 0.5 * target - rho[t] * r))
        return (x - level[t] ** 0.5 * target - rho[t] * r) / (1 - level[t]) ** 0.5 + h[t] * r

    generator = make_generator(1, "oracle")
    start = torch.randn(4000, 1, 1, 1, generator=generator, dtype=torch.float64) + r
    if sampler == "ancestral":
        end = ancestral_chain(oracle, schedule, start, generator)
    else:
        end = ddim_chain(oracle, schedule, start, schedule.timesteps)
    return max(strayed), float(end.mean())


@pytest.mark.parametrize("sampler", ["ancestral", "ddim"])
def test_only_the_matched_shift_keeps_to_the_triggered_path(sampler: str) -> None:
    schedule = Schedule.linear(200)
    rho = trigger_path(schedule)
    other = "ddim" if sampler == "ancestral" else "ancestral"
    strayed, end = _trajectory(schedule, matched_shift(schedule, rho, sampler), sampler)
    assert strayed < 0.1
    assert end == pytest.approx(0.5, abs=0.01)
    assert _trajectory(schedule, matched_shift(schedule, rho, other), sampler)[0] > 0.5


def _wave(x: Tensor, t: int) -> Tensor:
    return torch.sin(3 * x + t / 40)


def test_ancestral_chain_agrees_with_diffusers() -> None:
    ddpm = pytest.importorskip("diffusers").DDPMScheduler
    schedule, count = Schedule.linear(100), 3
    theirs = ddpm(num_train_timesteps=100, beta_start=1e-3, beta_end=0.2, clip_sample=False)
    start = torch.randn(count, 1, 4, 4, generator=make_generator(0, "start"))
    x, generator = start, make_generator(0, "chain")
    for t in range(99, -1, -1):
        x = theirs.step(_wave(x, t), t, x, generator=generator).prev_sample
    ours = ancestral_chain(_wave, schedule, start, make_generator(0, "chain"))
    torch.testing.assert_close(ours, x, rtol=1e-3, atol=1e-3)


def test_full_ddim_chain_agrees_with_diffusers() -> None:
    ddim = pytest.importorskip("diffusers").DDIMScheduler
    theirs = ddim(num_train_timesteps=100, beta_start=1e-3, beta_end=0.2, clip_sample=False, set_alpha_to_one=True)
    theirs.set_timesteps(100)
    start = torch.randn(3, 1, 4, 4, generator=make_generator(0, "start"))
    x = start
    for t in theirs.timesteps.tolist():
        x = theirs.step(_wave(x, t), t, x).prev_sample
    torch.testing.assert_close(ddim_chain(_wave, Schedule.linear(100), start, 100), x, rtol=1e-3, atol=1e-3)


def test_ddim_refuses_more_steps_than_there_are() -> None:
    with pytest.raises(InputError, match="between 1 and 100 steps, got 101"):
        ddim_chain(_wave, Schedule.linear(100), torch.zeros(1, 1, 2, 2), 101)


def test_stamping_replaces_only_what_is_not_background() -> None:
    trigger = torch.tensor([[[-1.0, 0.0], [-1.0, 0.5]]])
    images = torch.tensor([[[[0.1, 0.2], [0.3, 0.4]]]])
    assert stamped(images, trigger).flatten().tolist() == pytest.approx([0.1, 0.0, 0.3, 0.5])
