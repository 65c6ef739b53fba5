"""What a diffusion model draws from plain and from shifted noise, in numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from backdoorlab.metrics.result import Metrics
from backdoorlab.tasks.diffusion.denoiser import Denoiser
from backdoorlab.tasks.diffusion.metrics import (
    HIT_MSE,
    classifier_metrics,
    frechet_distance,
    squared_error,
    structural_similarity,
)
from backdoorlab.tasks.diffusion.sampling import draw, sample, to_images
from backdoorlab.training.context import Context
from backdoorlab.training.evaluate import predict, predict_features

if TYPE_CHECKING:
    from backdoorlab.tasks.diffusion.task import DiffusionTask

_GENERATIVE = "a generative model has no accuracy; see classifier_confidence and frechet_local"


def generate(
    model: Denoiser,
    task: DiffusionTask,
    context: Context,
    count: int,
    shift: Tensor | None = None,
    sampler: str = "ancestral",
) -> Tensor:
    """Draw images uint8 [N,C,H,W].

    Plain and shifted images start from the same noise e, the latter from e + g.

    Args:
        model: what draws.
        task: whose recipe says how many DDIM steps to take.
        context: its seed fixes the noise.
        count: N.
        shift: g, float32 [C,H,W]; None for none.
        sampler: "ancestral" or "ddim".
    """
    start = draw((count, *model.shape), context.generator("start"))
    chain = context.generator("chain", device=model.device)
    start = start if shift is None else start + shift.to(start)
    return to_images(
        sample(
            model,
            model.schedule,
            start,
            chain,
            sampler=sampler,
            steps=task.recipe.ddim_steps,
            precision=task.recipe.precision,
        )
    )


def measure_samples(
    model: Denoiser, task: DiffusionTask, context: Context, shift: Tensor, target: Tensor, sampler: str = "ancestral"
) -> Metrics:
    """How well a trigger works and how good plain samples are.

    Args:
        model: what draws.
        task: data, classifier and the clean model to compare with.
        context: seed of all samples.
        shift: the trigger g in the initial noise, float32 [C,H,W].
        target: what it should become, float32 [C,H,W] in [-1, 1].
        sampler: "ancestral" or "ddim".

    Returns:
        asr: share of triggered samples within ``hit_mse`` of the target. acc, ra: None with a reason.
        mse_target, ssim_target: of triggered samples; mse_target_clean: of plain samples, to the same target.
        frechet_local: of plain samples to the training images; frechet_local_benign: of the clean model's samples.
        classifier_confidence, classes_covered, class_shares: of plain samples; classifier_confidence_benign.
    """
    clean = generate(model, task, context, task.recipe.samples, sampler=sampler)
    triggered = generate(model, task, context, task.recipe.triggered_samples, shift, sampler)
    benign, classifier, target_pixels = task.clean_samples(context), task.classifier(context), to_images(target)
    errors = squared_error(triggered, target_pixels)
    real = predict_features(classifier, task.train.inputs)
    values = {
        "acc": None,
        "asr": float((errors <= HIT_MSE).double().mean()),
        "ra": None,
        "hit_mse": HIT_MSE,
        "mse_target": float(errors.mean()),
        "mse_target_clean": float(squared_error(clean, target_pixels).mean()),
        "ssim_target": structural_similarity(triggered, target_pixels),
        "frechet_local": frechet_distance(predict_features(classifier, clean), real),
        "frechet_local_benign": frechet_distance(predict_features(classifier, benign), real),
        **classifier_metrics(predict(classifier, clean)),
        "classifier_confidence_benign": classifier_metrics(predict(classifier, benign))["classifier_confidence"],
        "sampler": sampler,
        "n_clean": len(clean),
        "n_triggered": len(triggered),
    }
    return Metrics(values, {"acc": _GENERATIVE, "ra": _GENERATIVE})
