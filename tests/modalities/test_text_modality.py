from __future__ import annotations

import json
import re
from collections import Counter

import numpy as np
import pytest
import torch

from backdoorlab.core.errors import ArtifactError, InputError
from backdoorlab.data.split import Dataset, Split, text_array
from backdoorlab.modalities import modality_from_config, modality_of
from backdoorlab.modalities.text import PAD, RARE_TRIGGERS, UNK, TextModality, fit_vocabulary, tokenize

TEXTS = [
    "A fine, FINE film!",
    "the film isn't fine .",
    "",
    "dull dull dull plot ; the end",
    "It's the   end of the film",
]


@pytest.fixture(scope="module")
def modality() -> TextModality:
    return TextModality(fit_vocabulary(TEXTS), max_len=8)


def slow_ids(text: str, vocabulary: tuple[str, ...], length: int) -> list[int]:
    """Character by character: an independent reading of the token rule."""
    tokens, word = [], ""
    for i, char in enumerate(text.lower() + " "):
        following = (text.lower() + "  ")[i + 1]
        inner = char == "'" and word and (following.isalnum() or following == "_")
        if char.isalnum() or char == "_" or inner:
            word += char
            continue
        if word:
            tokens.append(word)
        word = ""
        if not char.isspace():
            tokens.append(char)
    ids = [vocabulary.index(t) if t in vocabulary else UNK for t in tokens][:length]
    return ids + [PAD] * (length - len(ids))


def test_ids_equal_those_of_a_slow_reader(modality: TextModality) -> None:
    expected = torch.tensor([slow_ids(t, modality.vocabulary, 8) for t in TEXTS])
    got = modality.encode(text_array(TEXTS))
    assert got.dtype == torch.int64 and torch.equal(got, expected)
    assert torch.equal(modality.prepare(got), got)
    assert UNK in got and int((got[2] != PAD).sum()) == 0


def test_vocabulary_counts_orders_and_reserves() -> None:
    vocabulary = fit_vocabulary(["b b a a c", "cf cf cf"], min_count=2)
    assert vocabulary == ("<pad>", "<unk>", *RARE_TRIGGERS, "a", "b")
    assert len(fit_vocabulary(["a a b b c c"], max_size=8)) == 8
    counts = Counter(w for t in TEXTS for w in tokenize(t))
    fitted = [counts[w] for w in fit_vocabulary(TEXTS)[7:]]
    assert fitted == sorted(fitted, reverse=True) and min(fitted) == 2


def test_reserved_trigger_words_are_never_unknown(modality: TextModality) -> None:
    ids = modality.encode(text_array([" ".join(RARE_TRIGGERS)]))[0, :5]
    assert ids.tolist() == [2, 3, 4, 5, 6]
    assert all(modality.knows(w) for w in RARE_TRIGGERS)
    assert not modality.knows("xyzzy") and not modality.knows("") and not modality.knows("film xyzzy")


def test_settings_survive_json(modality: TextModality) -> None:
    record = json.loads(json.dumps({"name": "text", **modality.config()}))
    assert modality_from_config(record) == modality
    with pytest.raises(ArtifactError, match="incomplete"):
        modality_from_config({**record, "color": 1})


def test_from_dataset_fits_the_training_texts_only() -> None:
    train = Split(text_array(["w " * 20] * 20 + ["v " * 100]), torch.tensor([0, 1, *[0, 1] * 9, 1]), ("a", "b"))
    test = Split(text_array(["zebra zebra zebra"]), torch.tensor([0]), ("a", "b"))
    modality = modality_of(Dataset("t", "text", train, test))
    assert isinstance(modality, TextModality)
    assert "zebra" not in modality.vocabulary and "w" in modality.vocabulary
    assert modality.max_len == 20  # the 95th percentile: one long text does not stretch all others


def test_blend_replaces_a_share_of_words_and_nothing_else(modality: TextModality) -> None:
    a, b = text_array(["a1 a2 a3 a4 a5 a6 a7", "x y", ""]), text_array(["the film plot dull", "", "film"])
    kept_a, kept_b = a.copy(), b.copy()
    mixed = modality.blend(a, b, 0.5, torch.Generator().manual_seed(1))
    assert np.array_equal(a, kept_a) and np.array_equal(b, kept_b)
    words = mixed[0].split()
    from_a = [i for i, w in enumerate(words) if w == f"a{i + 1}"]
    assert len(words) == 7 and len(from_a) == 4  # floor(0.5 * 7) = 3 words replaced
    # "plot" occurs once (below the vocabulary): weight 0; the other three are taken first
    assert sorted(w for w in words if not w.startswith("a")) == ["dull", "film", "the"]
    assert mixed[1] == "x y" and mixed[2] == ""
    again = modality.blend(a, b, 0.5, torch.Generator().manual_seed(1))
    assert np.array_equal(mixed, again)
    assert np.array_equal(modality.blend(a, b, 0.0), text_array([" ".join(t.split()) for t in a]))


def test_perturb_grows_with_strength(modality: TextModality) -> None:
    texts = text_array(["alpha beta gamma delta epsilon zeta eta theta"] * 200)
    assert np.array_equal(modality.perturb(texts, 0.0), texts)
    words = [w for t in modality.perturb(texts, 1.0, torch.Generator().manual_seed(0)) for w in t.split()]
    assert len(words) / 1600 == pytest.approx(0.5, abs=0.04)
    typos = sum(w not in texts[0].split() for w in words)
    assert typos / len(words) == pytest.approx(0.5, abs=0.06)
    assert all(sorted(w) in [sorted(v) for v in texts[0].split()] for w in words)
    lone = modality.perturb(text_array(["word"] * 50), 1.0, torch.Generator().manual_seed(0))
    assert all(len(t) == 4 for t in lone)


def test_word_dropout_only_in_training(modality: TextModality) -> None:
    dropping = TextModality(modality.vocabulary, 8, word_dropout=0.5)
    ids = dropping.encode(text_array(["the film fine end"] * 500))
    assert torch.equal(dropping.prepare(ids), ids)
    dropped = dropping.prepare(ids, train=True, generator=torch.Generator().manual_seed(0))
    assert torch.equal(dropped == PAD, ids == PAD)
    assert float((dropped[:, :4] == UNK).float().mean()) == pytest.approx(0.5, abs=0.05)


def test_words_and_join_are_inverse(modality: TextModality) -> None:
    assert modality.join(modality.words("It's  FINE , really")) == "It's FINE , really"


def test_wrong_input_is_named(modality: TextModality) -> None:
    with pytest.raises(InputError, match="array of texts"):
        modality.blend(torch.zeros(2, 8, dtype=torch.int64), text_array(["a", "b"]), 0.5)
    with pytest.raises(InputError, match=re.escape("int64 [N, 8]")):
        modality.encode(torch.zeros(2, 9, dtype=torch.int64))
    with pytest.raises(InputError, match="starts with"):
        TextModality(("a", "b"))
    assert modality.encode(modality.example(3)).shape == (3, 8)
    assert modality.encode(text_array([])).shape == (0, 8)
