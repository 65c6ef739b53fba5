"""What attacks that insert words share."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from backdoorlab.modalities.text import TextModality, tokenize


def insert_words(text: str, new: Sequence[str], draws: np.ndarray, max_words: int) -> str:
    """Insert words at random places, both ends included, from where truncation does not cut them off.

    Args:
        text: the sample.
        new: words to insert, of about one token each.
        draws: uniform numbers in [0, 1), one per new word.
        max_words: tokens that the model sees (:attr:`TextModality.max_words`).

    Returns:
        The text with single spaces between words.
    """
    words = TextModality.words(text)
    ends = np.cumsum([len(tokenize(word)) for word in words])
    room = max_words - sum(len(tokenize(word)) for word in new)
    places = 1 + int((ends <= room).sum())
    for position, word in sorted(((int(d * places), w) for d, w in zip(draws, new, strict=True)), reverse=True):
        words.insert(position, word)
    return TextModality.join(words)
