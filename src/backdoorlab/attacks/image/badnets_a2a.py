"""BadNets-A2A: the corner patch that moves every class to the next one.

Gu, Liu, Dolan-Gavitt, Garg, "BadNets: Evaluating Backdooring Attacks on Deep Neural Networks", IEEE Access 2019
(arXiv 1708.06733), the all-to-all variant.

The trigger is that of ``badnets``; a triggered sample of class y should become (y + 1) mod K. Every test sample counts,
because no label stays what it was. The victim must read the content *and* the patch, so ASR is bounded by clean
accuracy and rises late in training: a short recipe that suffices for all-to-one may not do.

Choice: ``badnets`` with ``target_map=all-to-all`` is the same attack; it has a name of its own because the literature
reports it as a row of its own.

Seen on embedded grey digits (16 px, recipe "smoke", one seed): ASR 0.55 at the defaults (a patch of 2 px there),
0.94 with a patch of 4 px at a rate of 30 %. On CIFAR-10 (50,000 images, preact_resnet8, "fast", one seed) ASR 0.03 at
the defaults after 10 epochs, but 0.72 after 30 (ACC 0.863), or after 10 at a rate of 30 % (0.71, ACC 0.795).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from backdoorlab.attacks.base import attacks
from backdoorlab.attacks.image.badnets import BadNets
from backdoorlab.core.method import param


@attacks.register
@dataclass(frozen=True, kw_only=True)
class BadNetsA2A(BadNets):
    """BadNets' patch with the target map y + 1 mod K."""

    name: ClassVar[str] = "badnets_a2a"
    paper: ClassVar[str] = "Gu et al., BadNets (all-to-all), IEEE Access 2019, arXiv 1708.06733"
    target_mode: ClassVar[str] = "all-to-all"

    target_map: str = param("all-to-all", "which class triggered samples get", choices=("all-to-all",))
