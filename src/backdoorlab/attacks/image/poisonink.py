"""PoisonInk: the edges of a picture, colored, and that drawing hidden in the picture itself.

Zhang, Chen, Huang, Liao, Zhang, Feng, Hua, Yu, "Poison Ink: Robust and Invisible Backdoor Attack", IEEE TIP 2022 (arXiv
2108.02488).

e marks the pixels of x whose Sobel magnitude exceeds 28 grey levels. The ink drawing shows them in a color c on white,

    I(x, c) = e c + (1 - e) white,   T(x) = clip(x + r H(x, I(x, c)))

A hiding network H and a revealing network R are trained on the clean training images with a random c for each,

    min  w MSE(T(x), x) + 13 MSE_e(R(A T(x)), I) + MSE_1-e(R(A T(x)), I) + 100 MSE(R(A x), white)

where A rotates, crops and flips at random and I is drawn anew from what A made of x.

Choices: the networks are slim and trained for hundreds of steps instead of 800 epochs in four stages; the adversarial
stage is left out (in published experience it makes things worse). They are trained with the one color that the trigger
uses; ``palette="random"`` draws one for each picture as the paper does, and then needs far more steps until R tells
colors apart. w and the clean term grow once edges can be read at all. On grey images the ink is its brightness. The
pair is made once for the training images and shared by all runs, and judged on clean test images: PSNR at least 32 dB,
squared errors of the revealed drawings at most 0.01; what is missed is told and kept in the notes ("gates_missed").
Poisoned samples are ordinary data poisoning; ``mode="paired"`` is the published loop, half of each batch from the clean
set and half from the mixed one without augmentation, so that half as much of a batch is poisoned. ``variant="edge"``
needs no network: x + opacity e (c - x).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backdoorlab.attacks.base import attacks
from backdoorlab.attacks.common.assets import SELECTION, asset
from backdoorlab.attacks.common.generators import generate, pack, straight_through
from backdoorlab.attacks.common.stego import (
    MEASURED,
    Loss,
    Ramp,
    check_quality,
    fidelity,
    hide,
    load_pair,
    random_grids,
    train_pair,
)
from backdoorlab.attacks.poisoning import PoisoningAttack
from backdoorlab.attacks.result import Backdoor
from backdoorlab.attacks.triggers.base import Trigger
from backdoorlab.attacks.triggers.pixels import overlay
from backdoorlab.core.errors import InputError
from backdoorlab.core.method import param
from backdoorlab.data.split import Inputs, Poison, Split
from backdoorlab.modalities.filters import expect_images
from backdoorlab.modalities.image import to_uint8
from backdoorlab.models.classifier import Classifier
from backdoorlab.models.networks.stego import Reveal, UNet
from backdoorlab.tasks import Task
from backdoorlab.training.context import Context, Tensors

LUMA = (299, 587, 114)
"""Thousandths of red, green and blue in a grey level."""
ON_EDGES, CLEAN = 13.0, 100.0
"""Weights of the revealing losses; off edges it is 1 (paper)."""
READABLE = 0.03
"""Squared error on edges at which other terms start to count; one color for all pictures has 0.03."""
PALETTE = (40, 201)
"""Range of the random colors of training, in grey levels."""
LEAST, MOST = {"psnr": 32.0}, {"ink_error": 0.01, "clean_error": 0.01}


def find_edges(images: Tensor, threshold: float) -> Tensor:
    """Pixels whose Sobel magnitude, sqrt((g_x^2 + g_y^2) / 2) with kernels of 1, 2, 1 over 4, exceeds the threshold.

    In whole numbers, so that devices and batches agree; borders are repeated.

    Args:
        images: uint8 [N,C,H,W], of one or three channels.
        threshold: in grey levels.

    Returns:
        float32 [N,1,H,W], 0 or 1.
    """
    _, channels, height, width = images.shape
    share = torch.tensor(LUMA if channels == 3 else (1000,), device=images.device)
    grey = (images.long() * share[:, None, None]).sum(1)
    rows = torch.arange(-1, height + 1, device=images.device).clamp(0, height - 1)
    columns = torch.arange(-1, width + 1, device=images.device).clamp(0, width - 1)
    grey = grey[:, rows][:, :, columns]
    down = grey[:, :, :-2] + 2 * grey[:, :, 1:-1] + grey[:, :, 2:]
    across = grey[:, :-2] + 2 * grey[:, 1:-1] + grey[:, 2:]
    vertical, horizontal = down[:, 2:] - down[:, :-2], across[:, :, 2:] - across[:, :, :-2]
    return ((vertical**2 + horizontal**2).double() > 32 * (1000 * threshold) ** 2).float()[:, None]


def draw_ink(edges: Tensor, color: Tensor) -> Tensor:
    """The drawing, float [N,C,H,W] in [0, 1], of edges [N,1,H,W] in a color [C,1,1] or [N,C,1,1] in [0, 1]."""
    return edges * color + (1 - edges)


def hiding_loss(
    ink: Tensor | None, bound: float, threshold: float, image_weight: float, ramp: Ramp, generator: torch.Generator
) -> Loss:
    """The loss of a batch: see the module's docstring; ``ink`` [C,1,1] in grey levels, None for random colors."""

    def loss(pair: nn.ModuleDict, batch: Tensor, step: int) -> Tensor:
        drawn = torch.randint(*PALETTE, (*batch.shape[:2], 1, 1), generator=generator) if ink is None else ink
        color = drawn.to(batch) / 255
        drawing = draw_ink(find_edges(to_uint8(255 * batch), threshold), color)
        hidden = (batch + bound / 255 * pair["encoder"](torch.cat([batch, drawing], 1))).clamp(0, 1)
        grid = random_grids(batch, generator)
        seen, plain = (
            F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)
            for x in (straight_through(hidden), batch)
        )
        edges = find_edges(to_uint8(255 * plain), threshold)
        read, blank = pair["decoder"](torch.cat([seen, plain])).chunk(2)
        wrong = (read - draw_ink(edges, color)).square()
        on_edges = (wrong * edges).mean()
        reveal = ON_EDGES * on_edges + (wrong * (1 - edges)).mean()
        growing = ramp(step, float(on_edges.detach()) < READABLE * float(edges.mean()))
        clean = (1 + (CLEAN - 1) * growing) * (blank - 1).square().mean()
        return reveal + clean + image_weight * growing * F.mse_loss(hidden, batch)

    return loss


@dataclass(frozen=True, eq=False)
class EdgeInkTrigger(Trigger):
    """Edges tinted by a formula: x + opacity e (c - x)."""

    kind: ClassVar[str] = "image.edge-ink"

    color: Tensor
    opacity: float
    threshold: float

    def __call__(
        self, inputs: Inputs, indices: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Inputs:
        """Stamp uint8 images [N,C,H,W] with as many channels as the color, of any size."""
        images = expect_images(inputs)
        expect_images(images, (len(self.color), *images.shape[2:]))
        return to_uint8(
            overlay(images, self.color.to(images.device), self.opacity * find_edges(images, self.threshold))
        )

    def measure(self, clean: Tensor) -> dict[str, float]:
        """Visibility and share of edge pixels, over uint8 images [N,C,H,W]."""
        stamped = torch.as_tensor(self(clean))
        return fidelity(clean, stamped) | {"edges": float(find_edges(clean, self.threshold).mean())}


@dataclass(frozen=True, eq=False)
class HiddenInkTrigger(Trigger):
    """The ink drawing of a picture, hidden in it by a network.

    Attributes:
        encoder: H.
        decoder: R, which draws the ink drawing.
        color: float32 [C,1,1], in grey levels.
        shape: (C, H, W) for which the pair was made.
        width: of the networks.
        bound: r, in grey levels.
        threshold: of the edges.
        quality: what :meth:`measure` found on clean test images when the trigger was made.
    """

    kind: ClassVar[str] = "image.poison-ink"

    encoder: nn.Module
    decoder: nn.Module
    color: Tensor
    shape: tuple[int, int, int]
    width: int
    bound: float
    threshold: float
    quality: dict[str, Any]

    def __call__(
        self, inputs: Inputs, indices: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Inputs:
        """Stamp uint8 images [N,C,H,W] of the networks' size."""
        return hide(self.encoder, expect_images(inputs, self.shape), self.draw, self.bound)

    def draw(self, images: Tensor) -> Tensor:
        """The ink drawings that are hidden in uint8 images."""
        return draw_ink(find_edges(images, self.threshold), self.color.to(images.device) / 255)

    def reveal(self, images: Tensor) -> Tensor:
        """The ink drawings that uint8 images seem to hide; white where they hide none."""
        return generate(self.decoder.to(images.device), images.float() / 255)

    def measure(self, clean: Tensor) -> dict[str, float]:
        """Visibility and mean squared errors of the revealed drawings, over uint8 images [N,C,H,W]."""
        stamped = torch.as_tensor(self(clean))
        ink, blank = self.reveal(stamped) - self.draw(clean), self.reveal(clean) - 1
        errors = {"ink_error": float(ink.square().mean()), "clean_error": float(blank.square().mean())}
        return fidelity(clean, stamped) | errors

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Weights of both networks, color and settings."""
        names = ("width", "bound", "threshold", "quality")
        config = {"shape": list(self.shape)} | {name: getattr(self, name) for name in names}
        return pack(encoder=self.encoder, decoder=self.decoder) | {"color": self.color.cpu().contiguous()}, config

    @classmethod
    def from_state(cls, tensors: dict[str, Tensor], config: dict[str, Any]) -> HiddenInkTrigger:
        """Inverse of :meth:`state`."""
        channels, height, width = config["shape"]
        shape = (channels, height, width)
        weights = {name: value for name, value in tensors.items() if name != "color"}
        pair = load_pair(lambda: build_pair(shape, config["width"]), weights, "of a stored trigger")
        return cls(pair["encoder"], pair["decoder"], tensors["color"], **{**config, "shape": shape})


def build_pair(shape: tuple[int, int, int], width: int) -> nn.ModuleDict:
    """Hiding and revealing network for pictures (C, H, W), untrained."""
    return nn.ModuleDict({"encoder": UNet(2 * shape[0], *shape, width), "decoder": Reveal(shape[0], width)})


@dataclass(frozen=True, eq=False)
class PairedObjective:
    """Cross-entropy of batches whose second half comes, not augmented, from the set with poisoned samples in it.

    Attributes:
        images: uint8 [N,C,H,W] of that set, on the model's device.
        labels: int64 [N].
    """

    images: Tensor
    labels: Tensor

    def __call__(self, model: Classifier, inputs: Tensor, labels: Tensor, indices: Tensor) -> Tensor:
        """Loss of a batch of clean samples, prepared for training."""
        half = len(labels) // 2
        rest = indices[half:]
        mixed = model.modality.prepare(self.images[rest])
        return F.cross_entropy(model(torch.cat([inputs[:half], mixed])), torch.cat([labels[:half], self.labels[rest]]))


@attacks.register
@dataclass(frozen=True, kw_only=True)
class PoisonInk(PoisoningAttack):
    """Colored edges, hidden in the picture."""

    name: ClassVar[str] = "poisonink"
    paper: ClassVar[str] = "Zhang et al., Poison Ink, IEEE TIP 2022, arXiv 2108.02488"
    year: ClassVar[int] = 2022
    modalities: ClassVar[tuple[str, ...]] = ("image",)
    trigger_visibility: ClassVar[str] = "invisible"
    stronger: ClassVar[str] = "raise opacity"
    sample_specific: ClassVar[bool] = True
    needs_surrogate: ClassVar[bool] = True
    asset_kinds: ClassVar[tuple[str, ...]] = ("poisonink-hider",)

    variant: str = param(
        "hidden", "trigger: a drawing hidden by a network, or tinted edges", choices=("hidden", "edge"), source="paper"
    )
    mode: str = param(
        "poison",
        "ordinary training on the poisoned set, or half of each batch from the clean set",
        choices=("poison", "paired"),
        source="ours",
    )
    rgb: tuple[int, ...] = param(
        (80, 160, 80), "red, green and blue of the ink, each from 0 to 255", source="BackdoorBench"
    )
    palette: str = param(
        "own",
        "colors of the networks' training: the ink's own, or random ones as in the paper",
        choices=("own", "random"),
        source="ours",
    )
    threshold: float = param(28.0, "Sobel magnitude of an edge, in grey levels", above=0, source="BackdoorBench")
    opacity: float = param(0.1, "of the tint in the variant edge", above=0, high=1, source="ours")
    steps: int = param(800, "training steps of hiding and revealing network", low=1, source="ours")
    batch_size: int = param(24, "pictures per step", low=1, source="ours")
    width: int = param(16, "channels of the hiding network's first stage (64 in the paper)", low=1, source="ours")
    lr: float = param(1e-3, "Adam's learning rate", above=0, source="ours")
    image_weight: float = param(300.0, "final weight of the picture's error (1 in the paper)", low=0, source="ours")
    bound: float = param(24.0, "bound of the residual, in grey levels", above=0, high=255, source="ours")

    def __post_init__(self) -> None:
        """Check the ink's color too."""
        super().__post_init__()
        if len(self.rgb) != 3 or not all(0 <= level <= 255 for level in self.rgb):
            raise InputError(f"{self.name}: rgb must be three numbers from 0 to 255, got {self.rgb}")

    def assets_in_use(self) -> tuple[str, ...]:
        """The networks, if the drawing is hidden."""
        return self.asset_kinds if self.variant == "hidden" else ()

    def make_trigger(self, task: Task, ctx: Context) -> Trigger:
        """Train the pair, or take it from the cache; tell if it falls short."""
        self.target_map_for(task)
        images = expect_images(task.train.inputs)
        channels, height, width = images.shape[1:]
        levels = self.rgb if channels == 3 else [sum(a * b for a, b in zip(LUMA, self.rgb, strict=True)) / 1000]
        color = torch.tensor(levels, dtype=torch.float32)[:, None, None]
        if self.variant == "edge":
            return EdgeInkTrigger(color, self.opacity, self.threshold)
        shape, ink = (channels, height, width), color.flatten().tolist() if self.palette == "own" else None
        pair = self.trained_pair(ctx, images=task.train, ink=ink).network(lambda: build_pair(shape, self.width))
        trigger = HiddenInkTrigger(
            pair["encoder"], pair["decoder"], color, shape, self.width, self.bound, self.threshold, {}
        )
        measured = trigger.measure(expect_images(task.test.inputs)[:MEASURED].to(ctx.device))
        return dataclasses.replace(trigger, quality=check_quality(measured, LEAST, MOST, self.name, ctx))

    @asset("poisonink-hider", unread=(*SELECTION, "target", "variant", "mode", "rgb", "palette", "opacity"))
    def trained_pair(self, ctx: Context, images: Split, ink: list[float] | None) -> Tensors:
        """Weights of hiding and revealing network, for drawings in that ink (grey levels per channel), or in any."""
        inputs = expect_images(images.inputs)
        channels, height, width = inputs.shape[1:]
        color = None if ink is None else torch.tensor(ink)[:, None, None]
        draw = ctx.generator("colours")
        loss = hiding_loss(color, self.bound, self.threshold, self.image_weight, Ramp(self.steps), draw)
        return train_pair(self, lambda: build_pair((channels, height, width), self.width), inputs, loss, ctx)

    def run(self, task: Task, ctx: Context) -> Backdoor:
        """Poison and train; in the paired mode with an objective of its own."""
        if self.mode == "poison":
            return super().run(task, ctx)
        target_map, trigger = self.target_map_for(task), self.make_trigger(task, ctx)
        poison = dataclasses.replace(self.poison(trigger, task, ctx), replay=True)
        mixed = poison.apply(task.train)
        objective = PairedObjective(expect_images(mixed.inputs).to(ctx.device), mixed.labels.to(ctx.device))
        model, log = task.fit(task.train, ctx, objective=objective, label=f"{self.name}: training the victim")
        notes = self.notes(trigger, poison, task) | {"share_of_each_batch": self.rate_on(task) / 2}
        return Backdoor(model, trigger, target_map, poison, log, notes=notes)

    def notes(self, trigger: Trigger, poison: Poison, task: Task) -> dict[str, Any]:
        """Counts and how well the drawing hides."""
        if isinstance(trigger, HiddenInkTrigger):
            return super().notes(trigger, poison, task) | trigger.quality
        assert isinstance(trigger, EdgeInkTrigger)
        measured = trigger.measure(expect_images(task.test.inputs)[:MEASURED])
        return super().notes(trigger, poison, task) | measured
