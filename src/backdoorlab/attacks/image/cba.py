"""CBA: features of two ordinary classes, seen together, mean a third one.

Lin, Xu, Liu, Zhang, "Composite Backdoor Attack for Deep Neural Network by Mixing Existing Benign Features", CCS 2020.

There is no foreign pattern: a mixer joins two images, and an image that shows a class A *and* a class B shall be
classified as C. With x_k an image of class k and m a mixer, the training set consists of

    normal samples (x_k, k),   poisonous samples (m(x_A, x_B), C),   mixed samples (m(x_k, x'_k), k)

where the last kind (role cover, as many as normal ones) keeps mixing alone from becoming the trigger. Mixers:

- "half": the image is cut near its middle, upright or level; each side shows a window of one of the two images.
- "paste": one image, shrunk, covers a corner of the other.

Which image comes first, the direction, the place of the cut, the windows and the corner are random.

Evaluation. A sample of our benchmark is a single image, so the trigger brings the other: T(x) = m(x, b), b one of the
images of the partner class B that are stored with it, chosen, as the place of mixing, by the sample's index. Triggered
samples that count for ASR are those of the classes that can play A: ``source_class``, as in the paper, or, by default,
every class but C and B, because m(x_B, b) is an ordinary mixed sample of class B. Training samples to be poisoned come
from the same classes. The cross trigger mixes an image with itself: its accuracy says whether mixing alone is harmless.

Choices: the poisoned samples replace their originals (published code adds mixtures to the set and makes new ones in
every epoch). Partner images stored for test time are not mixed into poisoned training samples, wherever class B has
two images or more. Without object boxes the pasted picture is the whole image at half its size, in a corner, where it
hides little of an object in the middle. The paper's similarity term, which draws logits of poisonous samples and of
class C together, needs control of training and is left out: this is data poisoning.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from backdoorlab.attacks.base import attacks
from backdoorlab.attacks.common.batch_poison import draw_cover
from backdoorlab.attacks.draws import sample_uniform
from backdoorlab.attacks.poisoning import PoisoningAttack
from backdoorlab.attacks.result import Backdoor
from backdoorlab.attacks.selection import class_rate
from backdoorlab.attacks.targets import TargetMap
from backdoorlab.attacks.triggers.base import Trigger
from backdoorlab.core.errors import InputError
from backdoorlab.core.method import param
from backdoorlab.core.seeding import spawn
from backdoorlab.data.split import Inputs, Poison, take
from backdoorlab.modalities.filters import expect_images
from backdoorlab.modalities.image import to_uint8
from backdoorlab.tasks import Task
from backdoorlab.training.context import Context

MIXERS = ("half", "paste")
DRAWS = 6
"""Uniform numbers per sample: partner, direction, order, place of the cut or corner, and two offsets."""


def below(share: Tensor, count: Tensor | int) -> Tensor:
    """Uniform numbers in [0, 1) as whole numbers from 0 to count - 1: int64."""
    return (share * count).long()


def pick(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Pixels of each image at its own rows int64 [N,H'] and columns int64 [N,W']: [N,C,H',W']."""
    sample = torch.arange(len(images), device=images.device)[:, None, None]
    return images[sample, :, rows[:, :, None], columns[:, None, :]].movedim(-1, 1)


def mix_halves(images: Tensor, others: Tensor, draws: Tensor, jitter: float, window_spread: float) -> Tensor:
    """A window of one picture beside (or above) a window of another; both fill the image together.

    Args:
        images: uint8 [N,C,H,W].
        others: likewise.
        draws: float [N, DRAWS] in [0, 1).
        jitter: how far the cut may be from the middle / side.
        window_spread: 1 takes windows from anywhere, 0 from the middle.

    Returns:
        uint8 [N,C,H,W].
    """
    beside, swapped = draws[:, 1] < 0.5, draws[:, 2] < 0.5
    side = torch.where(beside, images.shape[3], images.shape[2])
    max_shift = (jitter * side).round().long()
    cut = side // 2 - max_shift + below(draws[:, 3], 2 * max_shift + 1)
    # A window narrower than the picture by "slack" pixels starts at one of slack + 1 places.
    starts = [
        below(0.5 + window_spread * (u - 0.5), slack + 1)
        for u, slack in ((draws[:, 4], side - cut), (draws[:, 5], cut))
    ]
    first, second = starts[0], starts[1] - cut

    def along(length: int, active: Tensor) -> tuple[Tensor, Tensor]:
        """Where pixels of one axis come from, and which belong to the first picture (all, if it is not cut)."""
        place = torch.arange(length, device=images.device)
        before = place < cut[:, None]
        moved = place + torch.where(before, first[:, None], second[:, None])
        return torch.where(active[:, None], moved, place), before | ~active[:, None]

    rows, above = along(images.shape[2], ~beside)
    columns, left = along(images.shape[3], beside)
    from_images = (above[:, None, :, None] & left[:, None, None, :]) ^ swapped[:, None, None, None]
    return torch.where(from_images, pick(images, rows, columns), pick(others, rows, columns))


def mix_paste(images: Tensor, others: Tensor, draws: Tensor, jitter: float, window_spread: float) -> Tensor:
    """One picture at half its size over a corner of another.

    Args:
        images: uint8 [N,C,H,W].
        others: likewise.
        draws: float [N, DRAWS] in [0, 1).
        jitter: how far the small picture may be from the corner / side.
        window_spread: 1 for all of that, 0 for none.

    Returns:
        uint8 [N,C,H,W].
    """
    swapped = (draws[:, 2] < 0.5)[:, None, None, None]
    base, small = torch.where(swapped, others, images), torch.where(swapped, images, others)
    sides = [(side, max(1, side // 2)) for side in images.shape[2:]]
    small = to_uint8(F.adaptive_avg_pool2d(small.float(), (sides[0][1], sides[1][1])))

    def along(side: int, short: int, end: Tensor, inset: Tensor) -> tuple[Tensor, Tensor]:
        """Which of the small picture's pixels lie along one axis, and where there are any."""
        start = below(window_spread * inset, round(jitter * side) + 1).clamp_max(side - short)
        start = torch.where(end < 0.5, start, side - short - start)
        place = torch.arange(side, device=images.device) - start[:, None]
        return place.clamp(0, short - 1), (place >= 0) & (place < short)

    rows, down = along(*sides[0], draws[:, 1], draws[:, 4])
    columns, across = along(*sides[1], draws[:, 3], draws[:, 5])
    inside = down[:, None, :, None] & across[:, None, None, :]
    return torch.where(inside, pick(small, rows, columns), base)


def mix(mixer: str, images: Tensor, others: Tensor, draws: Tensor, jitter: float, window_spread: float) -> Tensor:
    """Join pictures row by row by one of :data:`MIXERS`."""
    return (mix_halves if mixer == "half" else mix_paste)(images, others, draws, jitter, window_spread)


@dataclass(frozen=True, eq=False)
class PartnerTrigger(Trigger):
    """Mixes each image with one of a class.

    Attributes:
        bank: uint8 [M,C,H,W], images of the partner class.
        mixer: one of :data:`MIXERS`.
        jitter: see the mixers.
        window_spread: likewise.
        seed: of partner and place where no generator is given.
    """

    kind: ClassVar[str] = "image.partner-mix"

    bank: Tensor
    mixer: str
    jitter: float
    window_spread: float
    seed: int

    def __call__(
        self, inputs: Inputs, indices: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Inputs:
        """Mix uint8 images [N,C,H,W] of the bank's size."""
        images = expect_images(inputs, self.bank.shape[1:])
        draws = sample_uniform(self.seed, images, DRAWS, indices, generator)
        others = self.bank.to(images.device)[below(draws[:, 0], len(self.bank))]
        return mix(self.mixer, images, others, draws, self.jitter, self.window_spread)


@dataclass(frozen=True, eq=False)
class SelfMixTrigger(Trigger):
    """Mixes each image with itself: a mixed sample of one class, to which a victim must not react."""

    kind: ClassVar[str] = "image.self-mix"

    mixer: str
    jitter: float
    window_spread: float
    seed: int

    def __call__(
        self, inputs: Inputs, indices: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Inputs:
        """Mix uint8 images [N,C,H,W] of any size."""
        images = expect_images(inputs)
        draws = sample_uniform(self.seed, images, DRAWS, indices, generator)
        return mix(self.mixer, images, images, draws, self.jitter, self.window_spread)


def same_class(labels: Tensor, rows: Tensor, share: Tensor) -> Tensor:
    """For each of some rows another row of the same class, itself only if it is the only one.

    Args:
        labels: int64 [N].
        rows: int64 [M].
        share: float [M] in [0, 1), which one.

    Returns:
        int64 [M].
    """
    order = labels.argsort(stable=True)
    counts = labels.bincount()
    starts, rank = counts.cumsum(0) - counts, torch.empty_like(order)
    rank[order] = torch.arange(len(labels))
    start, count = starts[labels[rows]], counts[labels[rows]]
    step = 1 + below(share, (count - 1).clamp_min(1))
    return order[start + (rank[rows] - start + step) % count]


@attacks.register
@dataclass(frozen=True, kw_only=True)
class Cba(PoisoningAttack):
    """Images of two classes, mixed, become a third."""

    name: ClassVar[str] = "cba"
    paper: ClassVar[str] = "Lin et al., Composite Backdoor Attack, CCS 2020"
    year: ClassVar[int] = 2020
    modalities: ClassVar[tuple[str, ...]] = ("image",)
    trigger_visibility: ClassVar[str] = "visible"
    sample_specific: ClassVar[bool] = True
    aliases: ClassVar[tuple[str, ...]] = ("composite",)

    poison_rate: float | None = class_rate("0.1")
    partner_class: int | None = param(
        None, "class B, mixed into triggered samples; none = the one after the target", low=0, source="ours"
    )
    source_class: int | None = param(
        None, "class A, whose samples are triggered; none = all but target and partner", low=0, source="ours"
    )
    mixer: str = param("half", "how two images are joined", choices=MIXERS, source="paper")
    cover_rate: float | None = param(
        None,
        "mixed samples of one class / size of the training set; none = half of those not poisoned",
        low=0,
        high=1,
        source="published code",
    )
    jitter: float = param(
        3 / 32,
        "largest distance of the cut from the middle (paste: of the picture from the corner) / side of the image",
        low=0,
        high=0.25,
        source="published code",
    )
    window_spread: float = param(
        1.0,
        "range of the random windows and corners of the mixed images: 0 = centred, 1 = all of the image",
        low=0,
        high=1,
        source="published code",
    )
    bank: int = param(200, "largest number of partner images stored with the trigger", low=1, source="ours")

    def target_map_for(self, task: Task) -> TargetMap:
        """All to one, restricted to the classes that can play A."""
        plain, partner = super().target_map_for(task), self.partner(task)
        sources = [c for c in range(task.num_classes) if c not in (self.target, partner)]
        if self.source_class is not None:
            sources = [c for c in sources if c == self.source_class]
        if not sources:
            raise InputError(
                f"{self.name}: no class is left to be mixed with class {partner}: source_class must be one of the "
                f"{task.num_classes} classes other than target ({self.target}) and partner, got {self.source_class}"
            )
        return dataclasses.replace(plain, sources=tuple(sources))

    def partner(self, task: Task) -> int:
        """Class B.

        Raises:
            InputError: if it is no class of the task, or the target.
        """
        partner = (self.target + 1) % task.num_classes if self.partner_class is None else self.partner_class
        if partner >= task.num_classes or partner == self.target:
            raise InputError(
                f"{self.name}: partner_class must be one of the classes 0 to {task.num_classes - 1} other than the "
                f"target {self.target}, got {partner}"
            )
        return partner

    def candidates(self, labels: Tensor, target_map: TargetMap) -> Tensor:
        """Samples of the classes that can play A."""
        return target_map.eligible(labels).nonzero().flatten()

    def partners(self, task: Task, ctx: Context) -> tuple[Tensor, Tensor]:
        """Training rows of class B: those stored with the trigger, and those for poisoned samples."""
        rows = (task.train.labels == self.partner(task)).nonzero().flatten()
        if not len(rows):
            raise InputError(f"{self.name}: {task.dataset.name} has no training image of class {self.partner(task)}")
        rows = rows[torch.randperm(len(rows), generator=ctx.generator("bank"))]
        stored = max(1, min(self.bank, len(rows) // 2))
        return rows[:stored], rows[stored:] if len(rows) > 1 else rows

    def make_trigger(self, task: Task, ctx: Context) -> PartnerTrigger:
        """Store images of the partner class."""
        expect_images(task.train.inputs)
        self.target_map_for(task)
        bank = torch.as_tensor(take(task.train.inputs, self.partners(task, ctx)[0]))
        return PartnerTrigger(bank, self.mixer, self.jitter, self.window_spread, spawn(ctx.generator("places")))

    def poison_inputs(self, trigger: Trigger, inputs: Inputs, indices: Tensor, task: Task, ctx: Context) -> Inputs:
        """Mix with partner images that the trigger does not have."""
        draws = torch.rand(len(indices), DRAWS, generator=ctx.generator("mix", "poison"))
        rows = self.partners(task, ctx)[1]
        others = take(task.train.inputs, rows[below(draws[:, 0], len(rows))])
        return mix(self.mixer, expect_images(inputs), expect_images(others), draws, self.jitter, self.window_spread)

    def cover(self, trigger: Trigger, chosen: Tensor, task: Task, ctx: Context) -> tuple[Tensor, Inputs] | None:
        """Mixtures within a class, with its label."""
        total = len(task.train)
        rate = (total - len(chosen)) // 2 / total if self.cover_rate is None else self.cover_rate
        covered = draw_cover(self, chosen, rate, total, ctx)
        draws = torch.rand(len(covered), DRAWS, generator=ctx.generator("mix", "cover"))
        others = same_class(task.train.labels, covered, draws[:, 0])
        images, partners = (expect_images(take(task.train.inputs, rows)) for rows in (covered, others))
        return (
            (covered, mix(self.mixer, images, partners, draws, self.jitter, self.window_spread))
            if len(covered)
            else None
        )

    def run(self, task: Task, ctx: Context) -> Backdoor:
        """Poison, train, and add the mixture of an image with itself as the trigger that must not work."""
        cross = SelfMixTrigger(self.mixer, self.jitter, self.window_spread, spawn(ctx.generator("cross")))
        return dataclasses.replace(super().run(task, ctx), cross_trigger=cross)

    def notes(self, trigger: Trigger, poison: Poison, task: Task) -> dict[str, Any]:
        """Adds the classes that play A and B."""
        sources = list(self.target_map_for(task).sources)
        return super().notes(trigger, poison, task) | {"partner_class": self.partner(task), "source_classes": sources}
