"""Backdoors in image diffusion models: tasks, samplers, metrics; attacks and defenses, one file each, below."""

from backdoorlab.diffusion.base import DiffusionBackdoor, NoiseTrigger, benign_backdoor
from backdoorlab.diffusion.denoiser import Denoiser
from backdoorlab.diffusion.sampling import Schedule, sample
from backdoorlab.diffusion.task import DiffusionRecipe, DiffusionTask, load_diffusion_task

__all__ = [
    "Denoiser",
    "DiffusionBackdoor",
    "DiffusionRecipe",
    "DiffusionTask",
    "NoiseTrigger",
    "Schedule",
    "benign_backdoor",
    "load_diffusion_task",
    "sample",
]
