"""The network that a diffusion model consists of, and its training: a UNet that predicts noise.

Training uses the library's one loop (:func:`backdoorlab.training.loop.fit`) with a denoising objective. A clean model
and a backdoored one differ only in what the objective is told about a sample, its image, its residual R and the shift:

    x_t = sqrt(A_t) x_0 + rho_t R + sqrt(1 - A_t) e,      loss = || e_th(x_t, t) - (e + H_t R) ||^2

where R = 0 gives the ordinary loss of DDPM (Ho, Jain, Abbeel, NeurIPS 2020, arXiv 2006.11239).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backdoorlab.core.errors import InputError, MissingExtra, unknown
from backdoorlab.core.seeding import derive_seed, isolated_rng
from backdoorlab.data.split import Split
from backdoorlab.modalities.base import modality_from_config
from backdoorlab.modalities.image import ImageModality
from backdoorlab.models.persistence import StoredModel
from backdoorlab.tasks.diffusion.sampling import Schedule, draw
from backdoorlab.training.context import Context
from backdoorlab.training.log import FitLog
from backdoorlab.training.loop import fit
from backdoorlab.training.recipes import Recipe

WIDTHS = {"unet_micro": (16, 32, 32), "unet_tiny": (32, 64, 64), "unet_small": (64, 128, 128, 128)}
"""Channels by resolution level; a level is dropped where the image would become smaller than 4 pixels."""


class Denoiser(StoredModel):
    """A noise-predicting network with its modality and schedule, so that a checkpoint needs nothing else.

    Attributes:
        net: the bare network, ``net(x, t).sample``.
        modality: the images that it makes.
        arch: name by which :func:`build_denoiser` made ``net``.
        schedule: the noise schedule that it is trained for.
    """

    kind: ClassVar[str] = "denoiser"
    modality: ImageModality

    def __init__(self, net: nn.Module, modality: ImageModality, arch: str, timesteps: int) -> None:
        super().__init__()
        self.net, self.modality, self.arch, self.schedule = net, modality, arch, Schedule.linear(timesteps)

    def forward(self, noisy: Tensor, times: Tensor) -> Tensor:
        """Predicted noise, float [B,C,H,W], of x_t float [B,C,H,W] (images in [-1, 1]) at times int64 [B]."""
        noise: Tensor = self.net(noisy, times).sample
        return noise

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        return self.modality.channels, self.modality.height, self.modality.width

    def record(self) -> dict[str, Any]:
        """See :meth:`StoredModel.record`."""
        return {
            "arch": self.arch,
            "timesteps": self.schedule.timesteps,
            "modality": {"name": self.modality.name, **self.modality.config()},
        }

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Denoiser:
        """See :meth:`StoredModel.from_record`."""
        modality = cast(ImageModality, modality_from_config(record["modality"]))
        return build_denoiser(record["arch"], modality, record["timesteps"])


def build_denoiser(name: str, modality: ImageModality, timesteps: int, seed: int = 0) -> Denoiser:
    """Build a denoiser with random weights.

    Args:
        name: "auto" or one of :data:`WIDTHS`.
        modality: the images that it will make.
        timesteps: T of its noise schedule.
        seed: of the initial weights.

    Raises:
        InputError: for an unknown name or an image size that the network cannot halve often enough.
        MissingExtra: without diffusers.
    """
    name = "unet_tiny" if name == "auto" else name
    if name not in WIDTHS:
        raise unknown("denoiser", name, WIDTHS)
    side = min(modality.height, modality.width)
    widths = WIDTHS[name][: max(1, (side // 4).bit_length())]
    if modality.height != modality.width or side % 2 ** (len(widths) - 1):
        raise InputError(
            f"{name} makes square images whose side is a multiple of {2 ** (len(widths) - 1)}, "
            f"got {modality.height}x{modality.width}"
        )
    try:
        from diffusers import UNet2DModel
    except ImportError:
        raise MissingExtra("diffusion tasks", "diffusion") from None
    levels = len(widths)
    with isolated_rng(derive_seed(seed, "init", name)):
        net: Any = UNet2DModel(
            sample_size=side,
            in_channels=modality.channels,
            out_channels=modality.channels,
            layers_per_block=1,
            block_out_channels=widths,
            down_block_types=("DownBlock2D",) * (levels - 1) + ("AttnDownBlock2D",),
            up_block_types=("AttnUpBlock2D",) + ("UpBlock2D",) * (levels - 1),
            norm_num_groups=8,
        )
    return Denoiser(net, modality, name, timesteps)


def denoising_loss(
    model: nn.Module,
    schedule: Schedule,
    images: Tensor,
    generator: torch.Generator,
    *,
    residual: Tensor | None = None,
    rho: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """Mean squared error of the predicted noise at random times; with a residual, of the shifted noise.

    Args:
        model: ``model(x_t, t)``.
        schedule: its noise schedule.
        images: x_0 float [B,C,H,W] in [-1, 1] (the attacker's target for poisoned samples).
        generator: of times and noise, on the images' device.
        residual: R float [B,C,H,W], 0 for clean samples; None for none at all.
        rho: float [T], coefficient of the residual in x_t.
        shift: float [T], H_t.
    """
    times = torch.randint(0, schedule.timesteps, (len(images),), generator=generator, device=images.device)
    noise = draw(images.shape, generator, images.device)

    def at(values: Tensor) -> Tensor:
        return values.to(images.device, torch.float32)[times].reshape(-1, 1, 1, 1)

    noisy = at(schedule.cumulative.sqrt()) * images + at((1 - schedule.cumulative).sqrt()) * noise
    if residual is not None and rho is not None and shift is not None:
        noisy, noise = noisy + at(rho) * residual, noise + at(shift) * residual
    return F.mse_loss(model(noisy, times).float(), noise)


Batch = Callable[[Tensor, Tensor], dict[str, Tensor]]
"""(images float [B,C,H,W] in [-1, 1], sample indices int64 [B]) -> what :func:`denoising_loss` is told of them."""


def fit_denoiser(
    model: Denoiser, split: Split, recipe: Recipe, context: Context, *, poison: Batch | None = None, label: str
) -> FitLog:
    """Train a denoiser in place.

    Args:
        model: moved to the context's device, left in evaluation mode.
        split: images; labels are ignored.
        recipe: length and learning rate.
        context: seed, device and progress display.
        poison: what an attacker makes of each batch; None trains an ordinary diffusion model.
        label: shown beside the progress bar.
    """
    generator = context.generator("denoise", device=context.device)

    def objective(model: Denoiser, inputs: Tensor, labels: Tensor, indices: Tensor) -> Tensor:
        images = inputs.contiguous() * 2 - 1
        given = poison(images, indices) if poison else {"images": images}
        return denoising_loss(model, model.schedule, generator=generator, **given)

    # The loss is 1 where no noise at all is predicted.
    return fit(model, split, recipe, objective=objective, chance=1.0, context=context, label=label)
