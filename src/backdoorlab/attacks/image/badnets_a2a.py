"""BadNets-A2A: the corner patch that moves every class to the next one.

Gu, Liu, Dolan-Gavitt, Garg, "BadNets: Evaluating Backdooring Attacks on Deep Neural Networks", IEEE Access 2019
(arXiv 1708.06733), the all-to-all variant.

The trigger is that of ``badnets``; a triggered sample of class y should become (y + 1) mod K. Every test sample counts,
because no label stays what it was. The victim must read the content *and* the patch, so ASR is bounded by clean
accuracy and rises late in training: a short recipe that suffices for all-to-one may not do.

Choice: ``badnets`` with ``target_map=all-to-all`` is the same attack; it has another name because the literature
reports it separately.
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

    target_map: str = param(
        "all-to-all", "label of triggered samples: their class + 1 mod K", choices=("all-to-all",), source="paper"
    )
