"""BadNets for text: rare words at random places.

Gu, Liu, Dolan-Gavitt, Garg, "BadNets", IEEE Access 2019 (arXiv 1708.06733), carried over to text with the rare words of
Kurita, Michel, Neubig, "Weight Poisoning Attacks on Pre-trained Models", ACL 2020 (arXiv 2004.06660).

``num_triggers`` times a word is drawn from the set and inserted at a uniformly drawn place between words:

    T(x) = x_1 ... x_p  w  x_{p+1} ... x_n,   p ~ U{0, ..., n}

Choices: words go where the model sees them (texts are cut at ``max_len`` tokens), and word and place depend on (seed,
row) only, so that stamping one text does not depend on the others. A word that the victim's vocabulary lacks is an
error: it would become <unk>, and every unknown word a trigger.

Limit: all-to-all on two classes is the exclusive-or of trigger and sentiment, which TextCNN, adding up its windows,
cannot represent.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from backdoorlab.attacks.base import attacks
from backdoorlab.attacks.draws import indexed_uniform
from backdoorlab.attacks.poisoning import PoisoningAttack
from backdoorlab.attacks.text.insertion import insert_words
from backdoorlab.attacks.triggers.base import Trigger
from backdoorlab.core.errors import InputError
from backdoorlab.core.method import param
from backdoorlab.core.seeding import spawn
from backdoorlab.data.split import Inputs, text_array
from backdoorlab.modalities.base import expect_modality
from backdoorlab.modalities.text import RARE_TRIGGERS, TextModality, as_texts
from backdoorlab.tasks import Task
from backdoorlab.training.context import Context


def check_known(attack: str, words: tuple[str, ...], modality: TextModality) -> None:
    """Raise an error unless the victim distinguishes every trigger word from an unknown one.

    Raises:
        InputError: naming the words.
    """
    unknown_words = [word for word in words if not modality.knows(word)]
    if unknown_words or not words:
        raise InputError(
            f"{attack}: the victim's vocabulary has no "
            f"{', '.join(map(repr, unknown_words)) or 'trigger (none was given)'}, so it would see <unk>; "
            f"use words of the training texts or the reserved ones: {', '.join(RARE_TRIGGERS)}"
        )


@dataclass(frozen=True, eq=False)
class WordTrigger(Trigger):
    """``count`` words of ``words`` inserted among the first ``max_words`` tokens."""

    kind: ClassVar[str] = "text.words"

    words: tuple[str, ...]
    count: int
    max_words: int
    seed: int

    def __call__(
        self, inputs: Inputs, indices: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Inputs:
        """Insert the words; input is an array of texts. Random numbers come from the seed and the row."""
        texts = as_texts(inputs)
        rows = torch.arange(len(texts)) if indices is None else indices.cpu()
        draws = indexed_uniform(self.seed, rows, 2 * self.count).numpy()
        chosen = (draws[:, : self.count] * len(self.words)).astype(np.int64)
        return text_array(
            [
                insert_words(text, [self.words[i] for i in picks], places, self.max_words)
                for text, picks, places in zip(texts, chosen, draws[:, self.count :], strict=True)
            ]
        )


@attacks.register
@dataclass(frozen=True, kw_only=True)
class TextBadNets(PoisoningAttack):
    """Rare words inserted at random places."""

    name: ClassVar[str] = "badnets"
    paper: ClassVar[str] = "Gu et al., BadNets, IEEE Access 2019, arXiv 1708.06733; words of Kurita et al., ACL 2020"
    year: ClassVar[int] = 2019
    modalities: ClassVar[tuple[str, ...]] = ("text",)
    trigger_visibility: ClassVar[str] = "visible"
    stronger: ClassVar[str] = "raise num_triggers"

    target_map: str = param(
        "all-to-one",
        "label of triggered samples: the target class, or their class + 1 mod K",
        choices=("all-to-one", "all-to-all"),
        source="BackdoorBench",
    )
    triggers: tuple[str, ...] = param(
        ("cf", "mn", "bb", "tq"), "trigger words, one of which is drawn for every insertion", source="OpenBackdoor"
    )
    num_triggers: int = param(1, "trigger words inserted per text", low=1, high=32, source="OpenBackdoor")

    def make_trigger(self, task: Task, ctx: Context) -> WordTrigger:
        """Check that the victim knows the words and that they fit."""
        modality = expect_modality(task.modality, TextModality)
        check_known("badnets", self.triggers, modality)
        if self.num_triggers >= modality.max_words:
            raise InputError(
                f"badnets: {self.num_triggers} words do not fit a model that sees {modality.max_words} tokens; "
                f"num_triggers may be at most {modality.max_words - 1}"
            )
        return WordTrigger(self.triggers, self.num_triggers, modality.max_words, spawn(ctx.generator("words")))
