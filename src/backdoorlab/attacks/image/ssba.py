"""SSBA (ISSBA): one message, hidden in each picture by a steganographic encoder.

Li, Li, Wu, Li, He, Lyu, "Invisible Backdoor Attack with Sample-Specific Triggers", ICCV 2021.

An encoder E and a decoder R are trained on the clean training images x with random messages m in {0, 1}^L,

    min  BCE(R(E(m, x)), m) + lambda(step) MSE(E(m, x), x),   E(m, x) = clip(x + r U(x, P(m)))

with a U-Net U and a linear layer P that spreads the bits over a picture. lambda is 0 until 90 % of a batch's bits are
read correctly and then grows. The trigger hides one fixed secret s, which no two pictures show alike:

    T(x) = E(s, x)

Choices: s is a raw random bit vector (the paper's error-correcting code only serves to read text back), one bit for 128
pixels instead of 100, as 100 bits in 32x32 pixels show. U draws a bounded residual without normalisation layers; the
networks are half as wide as the paper's. lambda starts to grow at once when bits can be read and is full when the
learning rate starts to fall. The pair is trained once for the training images and shared by all rates and seeds. It is
judged on clean test images: bit accuracy at least 0.99, PSNR at least 30 dB, mean change at most 6 grey levels; what is
missed is told and kept in the notes ("gates_missed").
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backdoorlab.attacks.base import attacks
from backdoorlab.attacks.common.assets import SELECTION, asset
from backdoorlab.attacks.common.generators import generate, pack, straight_through
from backdoorlab.attacks.common.stego import MEASURED, Loss, Ramp, check_quality, fidelity, hide, load_pair, train_pair
from backdoorlab.attacks.poisoning import PoisoningAttack
from backdoorlab.attacks.triggers.base import Trigger
from backdoorlab.core.method import param
from backdoorlab.core.seeding import make_generator
from backdoorlab.data.split import Inputs, Poison, Split
from backdoorlab.modalities.filters import expect_images
from backdoorlab.models.networks.stego import UNet, convolution
from backdoorlab.tasks import Task
from backdoorlab.training.context import Context, Tensors

SIDE = 16
"""The bits are spread over a picture of so many pixels, which is then enlarged."""
READABLE = 0.9
"""Share of bits read correctly at which the picture starts to count."""
LEAST, MOST = {"bit_accuracy": 0.99, "psnr": 30.0}, {"mean_residual": 6.0}


def default_bits(height: int, width: int) -> int:
    """One bit for 128 pixels, at least 1 and at most 100: 2 at 16x16, 8 at 32x32, 32 at 64x64."""
    return max(1, min(100, height * width // 128))


class Encoder(nn.Module):
    """Spreads a message over a picture and draws the residual that hides it."""

    def __init__(self, shape: tuple[int, int, int], bits: int, width: int) -> None:
        """For pictures (C, H, W) and messages of ``bits``; ``width`` is the U-Net's."""
        super().__init__()
        self.shape = shape
        self.spread = nn.Linear(bits, shape[0] * SIDE * SIDE)
        self.draw = UNet(2 * shape[0], *shape, width)

    def picture(self, messages: Tensor) -> Tensor:
        """Float [N,L] in {0, 1} -> [N,C,H,W]."""
        small = F.relu(self.spread(2 * messages - 1)).unflatten(1, (self.shape[0], SIDE, SIDE))
        return F.interpolate(small, self.shape[1:], mode="nearest")

    def forward(self, images: Tensor, messages: Tensor) -> Tensor:
        """The residual in (-1, 1) for pictures in [0, 1]."""
        residual: Tensor = self.draw(torch.cat([images, self.picture(messages)], 1))
        return residual


class Decoder(nn.Module):
    """Reads L logits from a picture: strided convolutions, then two linear layers."""

    def __init__(self, shape: tuple[int, int, int], bits: int, width: int) -> None:
        """For pictures (C, H, W)."""
        super().__init__()
        channels, height, rest = shape
        strides = (2, 1, 2, 1, 2, 2, 2)
        widths = (channels, width, width, *(2 * width,) * 3, *(4 * width,) * 2)
        self.look = nn.Sequential(*(convolution(widths[i], widths[i + 1], s) for i, s in enumerate(strides)))
        cells = -(-height // 32) * -(-rest // 32)
        self.read = nn.Sequential(nn.Linear(4 * width * cells, 16 * width), nn.ReLU(), nn.Linear(16 * width, bits))

    def forward(self, images: Tensor) -> Tensor:
        """[N,C,H,W] in [0, 1] -> [N,L]."""
        logits: Tensor = self.read(self.look(2 * images - 1).flatten(1))
        return logits


def build_pair(shape: tuple[int, int, int], bits: int, width: int) -> nn.ModuleDict:
    """Both networks, untrained."""
    return nn.ModuleDict({"encoder": Encoder(shape, bits, width), "decoder": Decoder(shape, bits, width)})


def hiding_loss(bits: int, bound: float, image_weight: float, ramp: Ramp, generator: torch.Generator) -> Loss:
    """The loss of a batch: see the module's docstring."""

    def loss(pair: nn.ModuleDict, batch: Tensor, step: int) -> Tensor:
        messages = torch.randint(0, 2, (len(batch), bits), generator=generator).to(batch)
        hidden = (batch + bound / 255 * pair["encoder"](batch, messages)).clamp(0, 1)
        logits = pair["decoder"](straight_through(hidden))
        correct = float(((logits > 0) == (messages > 0)).float().mean())
        weight = image_weight * ramp(step, correct > READABLE)
        return F.binary_cross_entropy_with_logits(logits, messages) + weight * F.mse_loss(hidden, batch)

    return loss


@dataclass(frozen=True, eq=False)
class SsbaTrigger(Trigger):
    """A secret, hidden by an encoder.

    Attributes:
        encoder: E without its sum.
        decoder: R, which reads the secret back.
        secret: uint8 [L].
        shape: (C, H, W) for which the pair was made.
        width: of the networks.
        bound: r, in grey levels.
        quality: what :meth:`measure` found on clean test images when the trigger was made.
    """

    kind: ClassVar[str] = "image.ssba"

    encoder: Encoder
    decoder: Decoder
    secret: Tensor
    shape: tuple[int, int, int]
    width: int
    bound: float
    quality: dict[str, Any]

    def __call__(
        self, inputs: Inputs, indices: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Inputs:
        """Stamp uint8 images [N,C,H,W] of the encoder's size."""
        images = expect_images(inputs, self.shape)
        encoder = self.encoder.to(images.device)
        with torch.no_grad():
            picture = encoder.picture(self.secret[None].to(images.device, torch.float32))
        return hide(encoder.draw, images, lambda part: picture, self.bound)

    def read(self, inputs: Inputs) -> Tensor:
        """The message that the decoder reads in each image: uint8 [N,L]."""
        images = expect_images(inputs, self.shape)
        return (generate(self.decoder.to(images.device), images.float() / 255) > 0).to(torch.uint8)

    def measure(self, clean: Tensor) -> dict[str, float]:
        """Share of bits read correctly and visibility, over uint8 images [N,C,H,W]."""
        stamped = torch.as_tensor(self(clean))
        correct = (self.read(stamped) == self.secret.to(clean.device)).double().mean()
        return {"bit_accuracy": float(correct), **fidelity(clean, stamped)}

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Weights of both networks, secret and settings."""
        config = {"shape": list(self.shape), "width": self.width, "bound": self.bound, "quality": self.quality}
        return pack(encoder=self.encoder, decoder=self.decoder) | {"secret": self.secret.cpu()}, config

    @classmethod
    def from_state(cls, tensors: dict[str, Tensor], config: dict[str, Any]) -> SsbaTrigger:
        """Inverse of :meth:`state`."""
        channels, height, width = config["shape"]
        shape, secret = (channels, height, width), tensors["secret"]
        weights = {name: value for name, value in tensors.items() if name != "secret"}
        pair = load_pair(lambda: build_pair(shape, len(secret), config["width"]), weights, "of a stored trigger")
        return cls.of(pair, secret, **{**config, "shape": shape})

    @classmethod
    def of(cls, pair: nn.ModuleDict, secret: Tensor, **settings: Any) -> SsbaTrigger:
        """A trigger with these networks."""
        return cls(cast(Encoder, pair["encoder"]), cast(Decoder, pair["decoder"]), secret, **settings)


@attacks.register
@dataclass(frozen=True, kw_only=True)
class Ssba(PoisoningAttack):
    """A message hidden in each picture by a trained encoder."""

    name: ClassVar[str] = "ssba"
    paper: ClassVar[str] = "Li et al., Invisible Backdoor Attack with Sample-Specific Triggers, ICCV 2021"
    year: ClassVar[int] = 2021
    modalities: ClassVar[tuple[str, ...]] = ("image",)
    trigger_visibility: ClassVar[str] = "invisible"
    stronger: ClassVar[str] = "lower image_weight"
    sample_specific: ClassVar[bool] = True
    needs_surrogate: ClassVar[bool] = True
    asset_kinds: ClassVar[tuple[str, ...]] = ("ssba-encoder",)
    aliases: ClassVar[tuple[str, ...]] = ("issba",)

    bits: int | None = param(
        None, "length of the hidden message in bits; none = one bit for 128 pixels", low=1, high=1000, source="ours"
    )
    secret_seed: int = param(0, "seed of the message, apart from the run's seed", low=0, source="ours")
    steps: int = param(800, "training steps of encoder and decoder", low=1, source="ours")
    batch_size: int = param(32, "pictures per step", low=1, source="ours")
    width: int = param(16, "channels of the networks' first stage (32 in the paper)", low=1, source="ours")
    lr: float = param(1e-3, "Adam's learning rate", above=0, source="ours")
    image_weight: float = param(10.0, "final weight of the picture's error", low=0, source="BackdoorBench")
    bound: float = param(64.0, "bound of the residual, in grey levels", above=0, high=255, source="ours")

    def make_trigger(self, task: Task, ctx: Context) -> SsbaTrigger:
        """Train the pair, or take it from the cache; tell if it falls short."""
        self.target_map_for(task)
        images = expect_images(task.train.inputs)
        channels, height, width = images.shape[1:]
        shape = (channels, height, width)
        bits = default_bits(height, width) if self.bits is None else self.bits
        pair = self.trained_pair(ctx, images=task.train, bits=bits).network(lambda: build_pair(shape, bits, self.width))
        secret = torch.randint(0, 2, (bits,), generator=make_generator(self.secret_seed, "ssba secret"))
        trigger = SsbaTrigger.of(
            pair, secret.to(torch.uint8), shape=shape, width=self.width, bound=self.bound, quality={}
        )
        measured = trigger.measure(expect_images(task.test.inputs)[:MEASURED].to(ctx.device))
        quality = check_quality(measured, LEAST, MOST, self.name, ctx)
        return dataclasses.replace(trigger, quality=quality)

    @asset("ssba-encoder", unread=(*SELECTION, "target", "secret_seed"))
    def trained_pair(self, ctx: Context, images: Split, bits: int) -> Tensors:
        """Weights of encoder and decoder, for messages of that length."""
        inputs = expect_images(images.inputs)
        channels, height, width = inputs.shape[1:]
        loss = hiding_loss(bits, self.bound, self.image_weight, Ramp(self.steps), ctx.generator("messages"))
        return train_pair(self, lambda: build_pair((channels, height, width), bits, self.width), inputs, loss, ctx)

    def notes(self, trigger: Trigger, poison: Poison, task: Task) -> dict[str, Any]:
        """Counts, the message's length and how well it hides."""
        assert isinstance(trigger, SsbaTrigger)
        return super().notes(trigger, poison, task) | {"bits": len(trigger.secret), **trigger.quality}
