"""Unconditional diffusion models of images: network, samplers, metrics and the task."""

from backdoorlab.tasks.diffusion.denoiser import Denoiser
from backdoorlab.tasks.diffusion.sampling import Schedule, sample
from backdoorlab.tasks.diffusion.task import DiffusionRecipe, DiffusionTask

__all__ = ["Denoiser", "DiffusionRecipe", "DiffusionTask", "Schedule", "sample"]
