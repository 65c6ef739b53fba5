"""Blended: a whole picture laid faintly over the image.

Chen, Liu, Li, Lu, Song, "Targeted Backdoor Attacks on Deep Learning Systems Using Data Poisoning", 2017
(arXiv 1712.05526).

With a key image G of the image's size and a blend ratio a,

    T(x) = round(clip((1 - a) x + a G))

Choices: the published key is a copyrighted cartoon, so the key is drawn from a seed (noise in three octaves under ten
outlined shapes), or read from a file; its SHA-256 is part of the result. The drawn key is no copy of the cartoon: it is
busier all over, its mean is near 128 and its standard deviation 72 to 78 grey levels, so that at a ratio of 0.2 what is
added varies by about 15 grey levels over the image; take ``key`` where the usual picture's strength matters. For images
of another size the key is resized, but for the noise key, whose grain would not survive that. The ratio may differ
between training and test (low in the data, high at inference is the stealthy variant). A ratio of 0.2 is a *strong*
blend: compare defenses with that in mind.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from backdoorlab.attacks.base import attacks
from backdoorlab.attacks.common.pictures import key_image, noise_image, read_picture
from backdoorlab.attacks.poisoning import PoisoningAttack
from backdoorlab.attacks.triggers.base import Trigger
from backdoorlab.attacks.triggers.pixels import BlendTrigger, constant_blend, key_of, picture_hash
from backdoorlab.core.method import param
from backdoorlab.data.split import Inputs, Poison
from backdoorlab.modalities.filters import expect_images
from backdoorlab.tasks import Task
from backdoorlab.training.context import Context


@attacks.register
@dataclass(frozen=True, kw_only=True)
class Blended(PoisoningAttack):
    """A key image blended over the whole image."""

    name: ClassVar[str] = "blended"
    paper: ClassVar[str] = "Chen et al., Targeted Backdoor Attacks Using Data Poisoning, 2017, arXiv 1712.05526"
    year: ClassVar[int] = 2017
    modalities: ClassVar[tuple[str, ...]] = ("image",)
    trigger_visibility: ClassVar[str] = "visible"
    stronger: ClassVar[str] = "raise alpha_train and alpha_test"

    target_map: str = param(
        "all-to-one",
        "label of triggered samples: the target class, or their class + 1 mod K",
        choices=("all-to-one", "all-to-all"),
        source="BackdoorBench",
    )
    alpha_train: float = param(
        0.2, "blend ratio of the key image in poisoned training samples", above=0, high=1, source="BackdoorBench"
    )
    alpha_test: float = param(0.2, "blend ratio of the key image at test time", above=0, high=1, source="BackdoorBench")
    pattern: str = param("shapes", "content of the drawn key image", choices=("shapes", "noise"), source="ours")
    key: str | None = param(None, "image file used as the key image; none = a drawn one", path=True, source="ours")
    key_seed: int = param(0, "seed from which the key image is drawn, apart from the run's seed", low=0, source="ours")

    def make_key(self, task: Task) -> Tensor:
        """The key image, uint8 [C,H,W] of the task's size."""
        channels, height, width = expect_images(task.train.inputs).shape[1:]
        if self.key is not None:
            return read_picture(self.key, channels, height, width)
        draw = key_image if self.pattern == "shapes" else noise_image
        return draw(channels, height, width, self.key_seed)

    def make_trigger(self, task: Task, ctx: Context) -> BlendTrigger:
        """The key at the test ratio."""
        return constant_blend(self.make_key(task), self.alpha_test, self.key is not None or self.pattern == "shapes")

    def poison_inputs(self, trigger: Trigger, inputs: Inputs, indices: Tensor, task: Task, ctx: Context) -> Inputs:
        """The same key at the training ratio."""
        return constant_blend(key_of(trigger), self.alpha_train)(inputs)

    def notes(self, trigger: Trigger, poison: Poison, task: Task) -> dict[str, Any]:
        """Adds the hash of the key image."""
        return super().notes(trigger, poison, task) | {"key_sha256": picture_hash(key_of(trigger))}
