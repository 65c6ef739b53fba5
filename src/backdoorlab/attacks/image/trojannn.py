"""TrojanNN: a patch optimised so that chosen neurons of a clean model fire.

Liu, Ma, Aafer, Lee, Zhai, Wang, Zhang, "Trojaning Attack on Neural Networks", NDSS 2018.

On a clean model h, those n penultimate units are chosen that have the largest sum of absolute weights in its head. A
picture a under a mask m (a small apple at the lower right), shown on black, is optimised with signed steps so that
they reach an activation A:

    min over a of sum_u (act_u(a m) - A)^2,   |a - a0| <= 0.3,   0 <= a <= 1,   a0 ~ U(0.2, 0.9)

The rounded picture V = round(255 a) is the trigger; a new model is trained from scratch with it:

    T(x) = (1 - m) x + m V

Choices: the paper retrains the clean model on reverse-engineered data; here, as in benchmarks, the attacker only
poisons data. Published code adds V and casts before it clips, so that bright pixels wrap around to dark ones and the
patch has a high contrast on any background; ``mode="reference-wrap"`` does that, for comparison only. The apple is a
disc and a stalk in rows 0.54-0.91 and columns 0.57-0.87 of the image, where the published picture of 224 px has its
apple: 7.4 % of the area, the published one about 7 %. At 32 px ours keeps that share (78 pixels, 7.6 %); published code
shrinks its picture and takes every pixel that is not black, which with bilinear shrinking adds the blurred rim (about
11 % if it did so with ours). Ours starts from noise of all colors, the published one from the picture of an
apple. ``mask`` names a picture to use instead, white where the patch lies. The best picture seen is kept, since
signed steps of 0.1 never settle. h is a benign model of the task's architecture and recipe, made once per task and
shared by all runs, and so is the picture.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from backdoorlab.attacks.base import attacks
from backdoorlab.attacks.common.assets import SELECTION, asset
from backdoorlab.attacks.common.pictures import read_picture
from backdoorlab.attacks.common.surrogate import clean_surrogate
from backdoorlab.attacks.poisoning import PoisoningAttack
from backdoorlab.attacks.triggers.base import Trigger
from backdoorlab.attacks.triggers.patch import PatchTrigger
from backdoorlab.core.errors import InputError
from backdoorlab.core.method import param
from backdoorlab.data.split import Inputs
from backdoorlab.modalities.filters import expect_images
from backdoorlab.modalities.image import to_uint8
from backdoorlab.models.anatomy import features, frozen, head
from backdoorlab.models.classifier import Classifier
from backdoorlab.tasks import Task
from backdoorlab.training.context import Context, Tensors

SHAPES = ("apple", "square")


def draw_mask(shape: str, height: int, width: int) -> Tensor:
    """Where the patch lies: bool [height, width].

    Args:
        shape: one of :data:`SHAPES`.
        height: of the image.
        width: of the image.
    """
    v = ((torch.arange(height) + 0.5) / height - 0.54)[:, None] / 0.37
    u = ((torch.arange(width) + 0.5) / width - 0.57) / 0.30
    if shape == "square":
        return (v >= 0) & (v <= 1) & (u >= 0) & (u <= 1)
    # In a unit box: a disc that fills the lower four fifths, and a stalk above it.
    disc = ((v - 0.6) / 0.4) ** 2 + ((u - 0.5) / 0.5) ** 2 <= 1
    stalk = (v >= 0) & (v <= 0.3) & ((u - 0.5).abs() <= max(0.08, 0.51 / (0.30 * width)))
    return disc | stalk


def strongest_units(weight: Tensor, count: int) -> Tensor:
    """The units with the largest sum of absolute weights in a head [K, D]: int64 [count]."""
    return weight.detach().abs().sum(0).topk(count).indices


def excite(
    model: Classifier, start: Tensor, mask: Tensor, units: Tensor, activation: float, steps: int, ctx: Context
) -> Tensor:
    """The picture under a mask that drives units toward an activation.

    Args:
        model: clean.
        start: float32 [C,H,W] in [0, 1].
        mask: bool [H,W].
        units: int64 [n], penultimate units.
        activation: target value A.
        steps: at most so many signed steps of 0.1.
        ctx: device, progress.

    Returns:
        float32 [C,H,W] in [0, 1] on the CPU, 0 outside the mask.
    """
    start, mask, units = (t.to(ctx.device) for t in (start, mask, units))
    low, high = (start - 0.3).clamp_min(0), (start + 0.3).clamp_max(1)
    picture, best = start, start
    lowest = torch.full((), torch.inf, device=ctx.device)
    with frozen(model):
        for step in ctx.track(range(steps + 1), "trojannn: exciting neurons", steps + 1):
            picture = picture.detach().requires_grad_()
            activations = features(model, (picture * mask)[None])[0, units]
            cost = (activations - activation).square().sum()
            better = cost.detach() < lowest
            best, lowest = torch.where(better, picture.detach(), best), torch.where(better, cost.detach(), lowest)
            if step % 50 == 0 and float(lowest) < 1e-3:
                break
            (gradient,) = torch.autograd.grad(cost, picture)
            picture = (picture - 0.1 * gradient.sign()).clamp(low, high)
    return (best * mask).cpu()


@dataclass(frozen=True, eq=False)
class WrapTrigger(Trigger):
    """A picture uint8 [C,H,W] added modulo 256: bright pixels turn dark, on purpose."""

    kind: ClassVar[str] = "image.wrap"

    picture: Tensor

    def __call__(
        self, inputs: Inputs, indices: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Inputs:
        """Add to uint8 images [N,C,H,W] of the picture's size."""
        images = expect_images(inputs, self.picture.shape)
        return images + self.picture.to(images.device)


@attacks.register
@dataclass(frozen=True, kw_only=True)
class TrojanNN(PoisoningAttack):
    """A patch that excites chosen neurons of a clean model."""

    name: ClassVar[str] = "trojannn"
    paper: ClassVar[str] = "Liu et al., Trojaning Attack on Neural Networks, NDSS 2018"
    year: ClassVar[int] = 2018
    modalities: ClassVar[tuple[str, ...]] = ("image",)
    trigger_visibility: ClassVar[str] = "visible"
    needs_surrogate: ClassVar[bool] = True
    asset_kinds: ClassVar[tuple[str, ...]] = ("trojannn-picture", "clean-surrogate")

    neurons: int = param(2, "number of penultimate units that the patch excites", low=1, source="BackdoorBench")
    activation: float = param(100.0, "activation toward which these units are driven", above=0, source="BackdoorBench")
    steps: int = param(1000, "largest number of optimisation steps of the patch", low=1, source="BackdoorBench")
    shape: str = param("apple", "outline of the patch", choices=SHAPES, source="BackdoorBench")
    mask: str | None = param(
        None, "image file that is white where the patch lies; none = the outline of shape", path=True, source="ours"
    )
    mode: str = param(
        "replace",
        "how the patch changes pixels: it replaces them, or is added modulo 256 as in published code",
        choices=("replace", "reference-wrap"),
        source="ours",
    )

    def make_trigger(self, task: Task, ctx: Context) -> Trigger:
        """Optimise the picture on a clean model."""
        self.target_map_for(task)
        channels, height, width = expect_images(task.train.inputs).shape[1:]
        mask = self._mask(height, width)
        exciting = self.exciting(ctx, surrogate=task, shape=self.shape if self.mask is None else mask)
        picture = to_uint8(255 * exciting.tensor("picture", (channels, height, width)))
        return PatchTrigger(picture, mask) if self.mode == "replace" else WrapTrigger(picture)

    @asset("trojannn-picture", unread=(*SELECTION, "target", "mask", "mode"))
    def exciting(self, ctx: Context, surrogate: Task, shape: str | Tensor) -> Tensors:
        """The picture as "picture", float32 [C,H,W] in [0, 1], 0 outside of ``shape``, an outline or a mask bool [H,W].

        Raises:
            InputError: if the model has fewer neurons.
        """
        channels, height, width = expect_images(surrogate.train.inputs).shape[1:]
        model = clean_surrogate(surrogate, ctx)
        weight = head(model).weight
        if self.neurons > weight.shape[1]:
            raise InputError(
                f"trojannn: {surrogate.spec.model} has {weight.shape[1]} penultimate units; "
                f"neurons may be at most that, got {self.neurons}"
            )
        units = strongest_units(weight, self.neurons)
        start = 0.2 + 0.7 * torch.rand(channels, height, width, generator=ctx.generator("start"))
        mask = shape if isinstance(shape, Tensor) else draw_mask(shape, height, width)
        return {"picture": excite(model, start, mask, units, self.activation, self.steps, ctx)}

    def _mask(self, height: int, width: int) -> Tensor:
        if self.mask is None:
            return draw_mask(self.shape, height, width)
        mask = read_picture(self.mask, 1, height, width)[0] >= 128
        if not mask.any():
            raise InputError(f"trojannn: the mask {self.mask!r} has no white pixel at {height}x{width}")
        return mask
