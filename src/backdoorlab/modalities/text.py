"""Texts: an object array of str raw, token ids int64 [N, max_len] encoded and prepared.

Words are lower-cased runs of letters and digits (with inner apostrophes) or single punctuation marks. The vocabulary is
fitted on the clean training texts and ordered by frequency.

Choice: the rare words with which the literature triggers text models have reserved ids in *every* vocabulary. They do
not occur in clean texts, so a fitted vocabulary would map them to <unk>, and a backdoor planted with "cf" would
silently become "any unknown word is a trigger". A victim that fine-tunes a pre-trained model has ids for them as well.

Choice: STRIP's mixing takes the words of highest tf-idf of the second text. The inverse document frequency is read off
the vocabulary: by Zipf's law the frequency of a word is about 1 / rank, so log(rank) stands for it.

With ``tokenizer`` (a local folder) a Hugging Face tokenizer makes the ids, and the vocabulary only serves word edits.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from backdoorlab.core.errors import InputError, MissingExtra
from backdoorlab.core.paths import reason
from backdoorlab.core.seeding import make_generator
from backdoorlab.data.split import Dataset, Inputs, text_array
from backdoorlab.modalities.base import Modality

PAD, UNK = 0, 1
SPECIALS = ("<pad>", "<unk>")
RARE_TRIGGERS = ("cf", "mn", "bb", "tq", "mb")
"""Trigger words of the literature (Kurita et al. 2020 and successors); ids 2 to 6 of every vocabulary."""

_TOKEN = re.compile(r"\w+(?:'\w+)*|[^\w\s]")


def tokenize(text: str) -> list[str]:
    """Lower-cased words and punctuation marks of a text."""
    return _TOKEN.findall(text.lower())


def fit_vocabulary(texts: Iterable[str], min_count: int = 2, max_size: int = 20_000) -> tuple[str, ...]:
    """Specials, reserved trigger words, then the words of the texts by falling frequency (ties alphabetically)."""
    counts = Counter(token for text in texts for token in tokenize(text))
    first = (*SPECIALS, *RARE_TRIGGERS)
    fitted = sorted((w for w, n in counts.items() if n >= min_count and w not in first), key=lambda w: (-counts[w], w))
    return (*first, *fitted[: max_size - len(first)])


@dataclass(frozen=True)
class TextModality(Modality):
    """Texts cut or padded to one length.

    Attributes:
        vocabulary: words by id; <pad> is 0, <unk> is 1, the reserved trigger words follow.
        max_len: tokens that the model sees.
        word_dropout: share of the words that training replaces by <unk>.
        tokenizer: folder of a Hugging Face tokenizer that replaces our words, or "".
    """

    name: ClassVar[str] = "text"
    continuous: ClassVar[bool] = False

    vocabulary: tuple[str, ...] = (*SPECIALS, *RARE_TRIGGERS)
    max_len: int = 64
    word_dropout: float = 0.0
    tokenizer: str = ""

    def __post_init__(self) -> None:
        if self.vocabulary[: len(SPECIALS)] != SPECIALS:
            raise InputError(f"a vocabulary starts with {SPECIALS}, got {self.vocabulary[:2]}")

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {word: i for i, word in enumerate(self.vocabulary)}

    @property
    def num_tokens(self) -> int:
        """Rows of the embedding of a model made for this vocabulary."""
        return len(self.vocabulary)

    @property
    def pad_id(self) -> int:
        """Id that fills short texts."""
        return int(load_tokenizer(self.tokenizer).pad_token_id) if self.tokenizer else PAD

    @property
    def max_words(self) -> int:
        """Number of leading tokens of :func:`tokenize` that the model sees: half of ``max_len`` with sub-words."""
        return self.max_len // 2 if self.tokenizer else self.max_len

    def knows(self, word: str) -> bool:
        """Does the word have ids of its own, so that a model can distinguish it from other rare words?"""
        if self.tokenizer:
            tokenizer = load_tokenizer(self.tokenizer)
            ids = tokenizer(word, add_special_tokens=False)["input_ids"]
            return bool(ids) and tokenizer.unk_token_id not in ids
        tokens = tokenize(word)
        return bool(tokens) and all(self._ids.get(token, UNK) > UNK for token in tokens)

    def encode(self, inputs: Inputs) -> Tensor:
        """Token ids int64 [N, max_len] of texts; ids pass through.

        Raises:
            InputError: if the input is neither an array of texts nor ids of this length.
        """
        if isinstance(inputs, Tensor):
            if inputs.dtype != torch.int64 or inputs.shape[1:] != (self.max_len,):
                raise InputError(
                    f"expected token ids int64 [N, {self.max_len}], got {inputs.dtype} {tuple(inputs.shape)}"
                )
            return inputs
        texts = as_texts(inputs)
        if self.tokenizer:
            return self._encode_subwords(texts)
        rows = [tokenize(text)[: self.max_len] for text in texts]
        lengths, known = np.array([len(row) for row in rows], dtype=np.int64), self._ids
        ids = np.full((len(rows), self.max_len), PAD, dtype=np.int64)
        flat = (known.get(word, UNK) for row in rows for word in row)
        ids[np.arange(self.max_len) < lengths[:, None]] = np.fromiter(flat, dtype=np.int64, count=int(lengths.sum()))
        return torch.from_numpy(ids)

    def _encode_subwords(self, texts: np.ndarray) -> Tensor:
        if not len(texts):
            return torch.zeros(0, self.max_len, dtype=torch.int64)
        tokenizer = load_tokenizer(self.tokenizer)
        ids = tokenizer(list(texts), padding="max_length", truncation=True, max_length=self.max_len)["input_ids"]
        return torch.tensor(ids, dtype=torch.int64)

    def prepare(self, inputs: Inputs, *, train: bool = False, generator: torch.Generator | None = None) -> Tensor:
        """Token ids; in training a share of ``word_dropout`` of the words becomes <unk>."""
        ids = self.encode(inputs)
        if train and self.word_dropout:
            unknown = int(load_tokenizer(self.tokenizer).unk_token_id) if self.tokenizer else UNK
            dropped = torch.rand(ids.shape, generator=generator, device=ids.device) < self.word_dropout
            ids = torch.where(dropped & (ids != self.pad_id), unknown, ids)
        return ids

    @staticmethod
    def words(text: str) -> list[str]:
        """Words for edits: split at white space, case and punctuation kept."""
        return text.split()

    @staticmethod
    def join(words: list[str]) -> str:
        """Inverse of :meth:`words` up to white space."""
        return " ".join(words)

    def blend(self, a: Inputs, b: Inputs, ratio: float, generator: torch.Generator | None = None) -> Inputs:
        """Replace floor(ratio * words of a) words of a, at random places, by the words of b of highest tf-idf."""
        first, second = [self.words(t) for t in as_texts(a)], [self.words(t) for t in as_texts(b)]
        widest = max((len(row) for row in first), default=0)
        draws = _uniform((len(first), widest), generator)
        out = []
        for words, donors, draw in zip(first, second, draws, strict=True):
            count, ranked = int(ratio * len(words)), self._by_weight(donors)
            if count and ranked:
                mixed = list(words)
                for place, position in enumerate(np.argsort(draw[: len(words)])[:count]):
                    mixed[position] = ranked[place % len(ranked)]
                words = mixed
            out.append(self.join(words))
        return text_array(out)

    def _by_weight(self, words: list[str]) -> list[str]:
        """Different words of one text by falling tf-idf; words outside the vocabulary weigh nothing."""
        tf = Counter(words)
        weight = {word: n * np.log(max(1, self._ids.get(word.lower(), 1))) for word, n in tf.items()}
        return sorted(weight, key=lambda word: -weight[word])

    def perturb(self, inputs: Inputs, strength: float, generator: torch.Generator | None = None) -> Inputs:
        """Drop words with probability strength / 2, swap two neighbouring letters in strength / 2 of the others.

        At least one word of a text stays.
        """
        rows = [self.words(text) for text in as_texts(inputs)]
        draws = _uniform((len(rows), max((len(row) for row in rows), default=0), 3), generator)
        out = []
        for words, draw in zip(rows, draws, strict=True):
            kept = [i for i in range(len(words)) if draw[i, 0] >= strength / 2] or [0][: len(words)]
            out.append(
                self.join([_swap(words[i], draw[i, 2]) if draw[i, 1] < strength / 2 else words[i] for i in kept])
            )
        return text_array(out)

    def example(self, count: int) -> Inputs:
        """Texts of one word."""
        return text_array(["example"] * count)

    @classmethod
    def from_dataset(cls, dataset: Dataset) -> TextModality:
        """Vocabulary of the training texts; length that holds 95 % of them, from 8 to 64 tokens."""
        texts = as_texts(dataset.train.inputs)
        lengths = [len(tokenize(text)) for text in texts]
        return cls(fit_vocabulary(texts), max_len=int(np.clip(np.ceil(np.percentile(lengths, 95)), 8, 64)))


def as_texts(inputs: Inputs) -> np.ndarray:
    """The input itself if it is an array of texts.

    Raises:
        InputError: for anything else.
    """
    if not isinstance(inputs, np.ndarray) or inputs.dtype.kind not in "OU" or inputs.ndim != 1:
        raise InputError(f"expected a one-dimensional array of texts, got {type(inputs).__name__}")
    return inputs


@lru_cache(maxsize=4)
def load_tokenizer(folder: str) -> Any:
    """The Hugging Face tokenizer in a local folder.

    Raises:
        MissingExtra: if transformers is not installed.
        InputError: if the folder holds no tokenizer with a padding token.
    """
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise MissingExtra("a Hugging Face tokenizer", "text") from None
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the library raises nearly anything, bare Exception too, for damaged files
        raise InputError(f"found no tokenizer in {folder!r}: {reason(error)}") from error
    if tokenizer.pad_token_id is None:
        raise InputError(f"the tokenizer in {folder!r} has no padding token")
    return tokenizer


def _uniform(shape: tuple[int, ...], generator: torch.Generator | None) -> np.ndarray:
    """Uniform numbers in [0, 1); without a generator from a fixed seed."""
    generator = generator or make_generator(0, "text")
    return np.asarray(torch.rand(shape, generator=generator, device=generator.device).cpu().numpy())


def _swap(word: str, draw: float) -> str:
    """The word with two neighbouring letters swapped."""
    if len(word) < 2:
        return word
    i = int(draw * (len(word) - 1))
    return word[:i] + word[i + 1] + word[i] + word[i + 2 :]
