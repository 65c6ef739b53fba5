"""BadNets from all to all: its effect."""

from __future__ import annotations

from effect_tools import LOST, OBEYS, Numbers, case, effects, least, planted


@case("attack/image/badnets_a2a", asr=least(0.75), acc_lost=LOST, benign_asr=OBEYS)
def effect_of_badnets_a2a(seed: int) -> Numbers:
    return planted(seed, "badnets_a2a", size=4, poison_rate=0.3)[1]


test_effect = effects(__name__)
