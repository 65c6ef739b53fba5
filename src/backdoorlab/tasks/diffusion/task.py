"""A generative task: images, network, recipe, and two models that all its runs share (clean model and classifier)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from backdoorlab.core.errors import InputError, unknown
from backdoorlab.data.sources import datasets, load_dataset
from backdoorlab.data.split import Dataset, content_digest
from backdoorlab.metrics.result import Metrics
from backdoorlab.modalities.base import expect_modality, modality_of
from backdoorlab.modalities.image import ImageModality
from backdoorlab.models.classifier import Classifier, build_model, default_model
from backdoorlab.models.persistence import StoredModel
from backdoorlab.tasks.base import BaseTask, TaskSpec, kinds
from backdoorlab.tasks.diffusion.denoiser import Denoiser, build_denoiser, fit_denoiser
from backdoorlab.tasks.diffusion.measure import measure_samples
from backdoorlab.tasks.diffusion.patterns import grey_box, target_image
from backdoorlab.tasks.diffusion.sampling import draw, sample, to_images
from backdoorlab.training.context import Context, Tensors
from backdoorlab.training.log import FitLog
from backdoorlab.training.loop import fit
from backdoorlab.training.recipes import Recipe, check_ranges, recipe_for, typed_changes

_RANGES: dict[str, tuple[float, float]] = {
    "timesteps": (25, 10**6),
    "steps": (1, 10**9),
    "lr": (0, 10**6),
    "tune_steps": (1, 10**9),
    "tune_lr": (0, 10**6),
    "batch_size": (1, 2**31),
    "ddim_steps": (1, 10**6),
    "samples": (2, 10**9),
    "triggered_samples": (1, 10**9),
}
"""Smallest and largest value of each number in a diffusion recipe; the rates must exceed 0."""


@dataclass(frozen=True, kw_only=True)
class DiffusionRecipe:
    """How diffusion models are trained (AdamW, one-cycle learning rate), attacked and measured.

    Attributes:
        name: "reference", "fast" or "smoke".
        timesteps: T of the noise schedule; the full ancestral chain has as many steps.
        steps: optimiser steps of the clean training (rounded up to whole epochs).
        lr: its peak learning rate.
        tune_steps: default number of steps with which an attack fine-tunes the clean model.
        tune_lr: its peak learning rate.
        batch_size: images per step.
        ddim_steps: of the DDIM sampler.
        samples: generated clean images per measurement.
        triggered_samples: generated triggered images per measurement.
        classifier_recipe: recipe of the classifier with which samples are measured.
        precision: "auto", "bf16" or "fp32".
    """

    name: str = "custom"
    timesteps: int = 250
    steps: int = 2000
    lr: float = 1e-3
    tune_steps: int = 1000
    tune_lr: float = 1e-3
    batch_size: int = 64
    ddim_steps: int = 50
    samples: int = 500
    triggered_samples: int = 100
    classifier_recipe: str = "fast"
    precision: str = "auto"

    def __post_init__(self) -> None:
        check_ranges("diffusion recipe", self, _RANGES)
        for field in ("lr", "tune_lr"):
            if not getattr(self, field):
                raise InputError(f"diffusion recipe: {field} must be > 0, got 0")
        if self.precision not in ("auto", "bf16", "fp32"):
            raise unknown("precision", self.precision, ("auto", "bf16", "fp32"))
        recipe_for("image", self.classifier_recipe)

    def training(self, steps: int, lr: float) -> Recipe:
        """The loop's recipe for so many steps."""
        return Recipe(
            name=self.name,
            epochs=0,
            min_steps=steps,
            batch_size=self.batch_size,
            optimizer="adamw",
            lr=lr,
            weight_decay=0.0,
            schedule="onecycle",
            warmup=0.1,
            augment=False,
            precision=self.precision,
        )


_LATER = ("name", "tune_steps", "tune_lr", "ddim_steps", "samples", "triggered_samples", "classifier_recipe")
"""Fields of a recipe that the training of the clean model does not depend on."""

RECIPES = {
    "reference": DiffusionRecipe(
        name="reference",
        timesteps=1000,
        steps=100_000,
        lr=2e-4,
        tune_steps=19_500,
        tune_lr=2e-4,
        batch_size=128,
        samples=5000,
        triggered_samples=1000,
    ),
    "fast": DiffusionRecipe(name="fast"),
    "smoke": DiffusionRecipe(
        name="smoke",
        timesteps=100,
        steps=300,
        tune_steps=200,
        lr=2e-3,
        tune_lr=2e-3,
        samples=100,
        triggered_samples=50,
        classifier_recipe="smoke",
        precision="fp32",
    ),
}
""""reference": T, batch, rate and fine-tuning length (50 epochs of CIFAR-10) as in BadDiffusion; the clean training is
shorter than DDPM's 800,000 steps. "fast" and "smoke" are ours, for two CPU cores."""


@kinds.register
@dataclass(frozen=True, eq=False)
class DiffusionTask(BaseTask):
    """A loaded generative task.

    Attributes:
        spec: of the task, with "auto" resolved.
        dataset: training and test data; only the training images are learned.
        modality: image size.
        recipe: how models are trained and measured on it.
    """

    spec: TaskSpec
    dataset: Dataset
    modality: ImageModality
    recipe: DiffusionRecipe

    name: ClassVar[str] = "diffusion"
    modalities: ClassVar[tuple[str, ...]] = ("diffusion",)

    @classmethod
    def check(cls, spec: TaskSpec) -> tuple[str, ...]:
        """See :meth:`BaseTask.check`."""
        diffusion_recipe_for(spec.recipe, **dict(spec.recipe_changes))
        head, colon, _ = spec.dataset.name.partition(":")
        datasets.get(head + colon)
        return cls.modalities

    @classmethod
    def recipe_changes(cls, values: Mapping[str, object]) -> tuple[tuple[str, Any], ...]:
        """See :meth:`BaseTask.recipe_changes`."""
        return tuple(typed_changes(DiffusionRecipe, values, "diffusion recipe").items())

    @classmethod
    def load(cls, spec: TaskSpec, *, root: str | Path | None = None, download: bool = False) -> DiffusionTask:
        """Load the images, resolve model ("auto" means "unet_tiny") and recipe.

        Raises:
            InputError: for data that are not images, an unknown recipe, field or network.
            MissingExtra: without diffusers.
        """
        if spec.kind != cls.name:
            raise InputError(f"a diffusion task needs a spec of kind 'diffusion', got {spec.kind!r}")
        recipe = diffusion_recipe_for(spec.recipe, **dict(spec.recipe_changes))
        dataset = load_dataset(spec.dataset, root=root, download=download)
        if dataset.modality != "image":
            raise InputError(f"diffusion tasks need images, {dataset.name} is {dataset.modality} data")
        modality = expect_modality(modality_of(dataset), ImageModality)
        model = build_denoiser(spec.model, modality, recipe.timesteps)  # an impossible model is an error now
        return cls(dataclasses.replace(spec, model=model.arch), dataset, modality, recipe)

    @property
    def methods(self) -> str:
        """Methods for diffusion models are registered under that name."""
        return self.name

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        return self.modality.channels, self.modality.height, self.modality.width

    def build_model(self, context: Context) -> Denoiser:
        """A fresh denoiser with weights drawn from the context's seed, on its device."""
        return build_denoiser(self.spec.model, self.modality, self.recipe.timesteps, context.seed).to(context.device)

    def fit(self, model: Denoiser, context: Context, *, steps: int, lr: float, label: str, **poison: Any) -> FitLog:
        """Train a denoiser in place on the training images, see :func:`fit_denoiser`."""
        return fit_denoiser(model, self.train, self.recipe.training(steps, lr), context, label=label, **poison)

    def clean_model(self, context: Context) -> Denoiser:
        """A copy of the clean model, which attacks fine-tune and metrics compare with; trained once for all runs."""

        def build(ctx: Context) -> Tensors:
            model = self.build_model(ctx)
            self.fit(model, ctx, steps=self.recipe.steps, lr=self.recipe.lr, label="training the clean diffusion model")
            return _weights(model)

        model = self.build_model(context)
        model.load_state_dict(context.asset("diffusion-clean", self._training_spec(), build, self._data()))
        return model.eval()

    def clean_samples(self, context: Context) -> Tensor:
        """Images uint8 [N,C,H,W] drawn from the clean model by the full ancestral chain; made once for all runs."""

        def build(ctx: Context) -> Tensors:
            model = self.clean_model(context)
            start = draw((self.recipe.samples, *self.shape), ctx.generator("start"))
            chain = ctx.generator("chain", device=ctx.device)
            images = sample(model, model.schedule, start, chain, precision=self.recipe.precision)
            return {"images": to_images(images)}

        spec = {**self._training_spec(), "samples": self.recipe.samples}
        return context.asset("diffusion-clean-samples", spec, build, self._data())["images"]

    def classifier(self, context: Context) -> Classifier:
        """A classifier of the same images, with which samples are measured; trained once for all runs."""
        arch = default_model(self.modality)
        recipe = recipe_for("image", self.recipe.classifier_recipe)

        def build(ctx: Context) -> Tensors:
            model = build_model(arch, self.modality, self.num_classes, ctx.seed)
            fit(model, self.train, recipe, context=ctx, label="training the classifier of samples")
            return _weights(model)

        spec = {"dataset": dataclasses.asdict(self.spec.dataset), "arch": arch, "recipe": dataclasses.asdict(recipe)}
        model = build_model(arch, self.modality, self.num_classes).to(context.device)
        # The kind of an asset seeds its training, so that another name would give another classifier.
        model.load_state_dict(context.asset("diffusion-judge", spec, build, self._data()))
        return model.eval()

    def train_benign(self, ctx: Context) -> tuple[Denoiser, FitLog]:
        """The clean model, which all runs share."""
        return self.clean_model(ctx), FitLog()

    def measure_benign(self, model: StoredModel, ctx: Context) -> Metrics:
        """By the metrics of an attack: what the usual trigger, a grey box, does to a model that does not know it."""
        if not isinstance(model, Denoiser):
            raise InputError(f"a diffusion task measures denoisers, got a model of kind {model.kind!r}")
        shift, target = grey_box(self.shape), target_image("plus", self.shape)
        return measure_samples(model, self, ctx, shift, target)

    def _data(self) -> dict[str, str]:
        """What tells apart data sets that share a specification, such as a folder whose pictures were exchanged."""
        return {"data": content_digest(self.train.inputs, self.train.labels)}

    def _training_spec(self) -> dict[str, Any]:
        """Everything that the clean model depends on."""
        recipe = {name: value for name, value in dataclasses.asdict(self.recipe).items() if name not in _LATER}
        return {"dataset": dataclasses.asdict(self.spec.dataset), "model": self.spec.model, "recipe": recipe}


def diffusion_recipe_for(name: str, **changes: object) -> DiffusionRecipe:
    """A diffusion recipe by name, with some fields changed.

    Raises:
        InputError: for an unknown recipe or field, or a value of the wrong type or out of range.
    """
    if name not in RECIPES:
        raise unknown("diffusion recipe", name, RECIPES)
    return dataclasses.replace(RECIPES[name], **typed_changes(DiffusionRecipe, changes, "diffusion recipe"))


def _weights(model: torch.nn.Module) -> Tensors:
    return {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
