"""LC: target-class images made hard to recognise, so that the network has to rely on the patch.

Turner, Tsipras, Madry, "Label-Consistent Backdoor Attacks", 2019 (arXiv 1912.02771).

Chosen images of the target class are perturbed adversarially on a surrogate g, without random start,

    x <- clip(x + a sign(grad CE(g(x), y))),   |x - x0| <= eps,

then a 3x3 pattern of +-A grey levels is added in all four corners; their label stays true. At test time the pattern
alone is added to an unperturbed image:

    T(x) = clip(x + P)

The pattern's rows are (+--), (-+-), (+-+) in the left corners and mirrored in the right ones, so that flipping an image
leaves it as it is.

Choices: g is trained adversarially on the task's data, architecture and recipe, with one signed step from a random
start (fast, and robust enough that perturbations look like other classes); ``surrogate="clean"`` takes an ordinary one.
It is made once per task and shared by all runs. BackdoorBench's experiments use perturbations of 16 grey levels (8 with
steps of 1.5 are the defaults of its generator alone), and so does this file, with steps of 3. Only chosen images are
perturbed. The pattern is drawn at the image's resolution, 3 px at 32 px and 6 at 64, not less than 3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from backdoorlab.attacks.base import attacks
from backdoorlab.attacks.common.assets import SELECTION, asset
from backdoorlab.attacks.common.surrogate import clean_surrogate, weights_of
from backdoorlab.attacks.poisoning import PoisoningAttack
from backdoorlab.attacks.selection import class_rate
from backdoorlab.attacks.triggers.base import Trigger
from backdoorlab.attacks.triggers.pixels import AdditiveTrigger
from backdoorlab.core.errors import InputError
from backdoorlab.core.method import param
from backdoorlab.core.seeding import spawn
from backdoorlab.data.split import Inputs
from backdoorlab.modalities.filters import expect_images
from backdoorlab.modalities.image import to_uint8
from backdoorlab.models.anatomy import frozen
from backdoorlab.models.classifier import Classifier
from backdoorlab.tasks import Task
from backdoorlab.training.context import Context, Tensors

CORNER = ((1, -1, -1), (-1, 1, -1), (1, -1, 1))
"""The pattern in the left corners."""


def draw_corners(channels: int, height: int, width: int, amplitude: float) -> Tensor:
    """The pattern in grey levels: float32 [channels, height, width].

    Raises:
        InputError: if the corners overlap.
    """
    times = max(1, round(min(height, width) / 32))
    cells = amplitude * torch.tensor(CORNER, dtype=torch.float32)
    cells = cells.repeat_interleave(times, 0).repeat_interleave(times, 1)
    side = len(cells)
    if 2 * side > min(height, width):
        raise InputError(f"lc: corners of {side} px overlap in an image of {height}x{width}")
    canvas = torch.zeros(height, width)
    for rows in (slice(0, side), slice(height - side, height)):
        canvas[rows, :side], canvas[rows, width - side :] = cells, cells.flip(1)
    return canvas.repeat(channels, 1, 1)


def ascend(model: Classifier, inputs: Tensor, start: Tensor, labels: Tensor, eps: float, step: float) -> Tensor:
    """One signed step up the loss, back into the box around ``inputs`` and into [0, 1]."""
    start = start.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(model(start), labels), start)
    moved = start.detach() + step * gradient.sign()
    return torch.minimum(torch.maximum(moved, inputs - eps), inputs + eps).clamp(0, 1)


def perturb(
    model: Classifier, images: Tensor, labels: Tensor, eps: float, step: float, steps: int, ctx: Context
) -> Tensor:
    """Untargeted projected gradient ascent without random start.

    Args:
        model: the surrogate; evaluated, unchanged.
        images: uint8 [N,C,H,W].
        labels: int64 [N].
        eps: largest change, in grey levels.
        step: of each iteration, in grey levels.
        steps: iterations.
        ctx: device, progress.

    Returns:
        uint8 [N,C,H,W] on the CPU.
    """
    parts = []
    with frozen(model):
        for rows in ctx.track(torch.arange(len(images)).split(512), "lc: perturbing images"):
            inputs = model.modality.prepare(images[rows].to(ctx.device))
            wanted, found = labels[rows].to(ctx.device), inputs
            for _ in range(steps):
                found = ascend(model, inputs, found, wanted, eps / 255, step / 255)
            parts.append(to_uint8(255 * found).cpu())
    return torch.cat(parts)


@attacks.register
@dataclass(frozen=True, kw_only=True)
class Lc(PoisoningAttack):
    """Corner patterns on adversarially perturbed images of the target class."""

    name: ClassVar[str] = "lc"
    paper: ClassVar[str] = "Turner et al., Label-Consistent Backdoor Attacks, 2019, arXiv 1912.02771"
    year: ClassVar[int] = 2019
    modalities: ClassVar[tuple[str, ...]] = ("image",)
    trigger_visibility: ClassVar[str] = "visible"
    stronger: ClassVar[str] = "raise amplitude"
    label_mode: ClassVar[str] = "clean"
    needs_surrogate: ClassVar[bool] = True
    asset_kinds: ClassVar[tuple[str, ...]] = ("robust-surrogate", "clean-surrogate")
    aliases: ClassVar[tuple[str, ...]] = ("cl",)

    poison_rate: float | None = class_rate()
    amplitude: float = param(255.0, "of the corner pattern, in grey levels", above=0, high=255, source="BackdoorBench")
    eps: float = param(
        16.0, "largest adversarial change, in grey levels", low=0, high=255, source="BackdoorBench's experiments"
    )
    step: float = param(
        3.0,
        "adversarial step, in grey levels, the share of eps that BackdoorBench's generator takes",
        above=0,
        source="ours",
    )
    steps: int = param(100, "adversarial steps", low=0, source="BackdoorBench")
    surrogate: str = param(
        "robust", "trained adversarially or ordinarily", choices=("robust", "clean"), source="BackdoorBench"
    )
    surrogate_eps: float = param(8.0, "strength of adversarial training, in grey levels", above=0, source="ours")

    def assets_in_use(self) -> tuple[str, ...]:
        """The surrogate that was chosen, if images are perturbed at all."""
        return (f"{self.surrogate}-surrogate",) if self.steps and self.eps else ()

    def make_trigger(self, task: Task, ctx: Context) -> AdditiveTrigger:
        """The corners."""
        channels, height, width = expect_images(task.train.inputs).shape[1:]
        return AdditiveTrigger(draw_corners(channels, height, width, self.amplitude))

    def poison_inputs(self, trigger: Trigger, inputs: Inputs, indices: Tensor, task: Task, ctx: Context) -> Inputs:
        """Perturb, then add the corners."""
        if self.steps and self.eps:
            robust = self.surrogate == "robust"
            model = self.robust_surrogate(task, ctx) if robust else clean_surrogate(task, ctx)
            labels = task.train.labels[indices]
            inputs = perturb(model, expect_images(inputs), labels, self.eps, self.step, self.steps, ctx)
        return trigger(inputs)

    def robust_surrogate(self, task: Task, ctx: Context) -> Classifier:
        """A model trained on single-step adversarial samples (random start, step 1.25 eps), shared by all runs."""
        weights = self.robust_weights(ctx, surrogate=task, eps=self.surrogate_eps)
        return weights.network(lambda: task.build_model(ctx))

    @asset("robust-surrogate", unread=(*SELECTION, "target", "amplitude", "step", "steps", "surrogate_eps"))
    def robust_weights(self, ctx: Context, surrogate: Task, eps: float) -> Tensors:
        """Weights of such a model; ``eps`` is the largest change of its samples, in grey levels."""
        seed = spawn(ctx.generator("random start"))
        generator = torch.Generator(device=ctx.device).manual_seed(seed)

        def objective(model: Classifier, inputs: Tensor, labels: Tensor, indices: Tensor) -> Tensor:
            noise = torch.rand(inputs.shape, generator=generator, device=inputs.device) * 2 - 1
            start = (inputs + eps / 255 * noise).clamp(0, 1)
            with frozen(model):
                hard = ascend(model, inputs, start, labels, eps / 255, 1.25 * eps / 255)
            return F.cross_entropy(model(hard), labels)

        model, _ = surrogate.fit(
            surrogate.train,
            ctx,
            model=surrogate.build_model(ctx),
            objective=objective,
            label="training a robust surrogate",
        )
        return weights_of(model)
