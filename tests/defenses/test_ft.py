"""Fine-tuning: its effect."""

from __future__ import annotations

from backdoorlab.defenses.repair.ft import FineTuning
from effect_tools import Numbers, case, effects, least, most, repaired


@case("defense/repair/ft", asr_lost=least(0.2), acc_lost=most(0.1))
def effect_of_ft(seed: int) -> Numbers:
    return repaired(seed, FineTuning(epochs=60, lr=0.2, batch_size=32))


test_effect = effects(__name__)
