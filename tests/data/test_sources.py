"""Looking up, subsetting and splitting data sets."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from backdoorlab.core.errors import InputError
from backdoorlab.data import DatasetSpec, Split, datasets, load_dataset
from backdoorlab.data.sources import balanced_subset, holdout, ranks_within_class

ON_DISK = ["cifar10", "cifar100", "gtsrb", "tiny_imagenet", "sst2", "olid", "hsol", "ag_news", "fsdd"]


def _split(counts: list[int]) -> Split:
    labels = torch.cat([torch.full((n,), k) for k, n in enumerate(counts)])
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(3))]
    inputs = torch.arange(len(labels), dtype=torch.int16)[:, None]
    return Split(inputs, labels, tuple(map(str, range(len(counts)))))


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Roots without any data: an empty folder, no environment variable, an empty cache."""
    monkeypatch.delenv("BACKDOORLAB_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "root").mkdir()
    return tmp_path / "root"


@pytest.mark.parametrize("name", ON_DISK)
def test_missing_files_say_where_it_looked_and_how_to_get_them(name: str, nowhere: Path):
    with pytest.raises(InputError) as caught:
        load_dataset(name, root=nowhere)
    message = str(caught.value)
    assert str(nowhere) in message and str(nowhere.parent / "cache") in message
    assert "--download" in message or "github.com" in message


def test_every_source_has_a_summary_and_a_known_modality():
    found = list(datasets)
    assert {s.name for s in found} >= {*ON_DISK, "digits", "folder:", "csv:", "hf:", "shapes", "moving_digits"}
    for source in found:
        assert source.summary and set(source.modalities) <= {"image", "text", "audio", "video"}


def test_an_unknown_name_gets_the_nearest_one():
    with pytest.raises(InputError, match="Did you mean 'cifar10'"):
        load_dataset("cifar_10")


def test_a_name_that_lacks_its_argument_is_an_error():
    with pytest.raises(InputError, match="lacks what follows the colon"):
        load_dataset("folder:")


@pytest.mark.parametrize("name", ["templated_text", "tone_words", "sst2", "csv:x.csv"])
def test_sources_without_pixels_refuse_a_size(name: str):
    with pytest.raises(InputError, match=r"cannot be rescaled.*16"):
        load_dataset(name, size=16)


def test_a_subset_is_exactly_balanced_and_keeps_the_order():
    split = _split([50, 40, 30])
    subset = balanced_subset(split, 60, 0, "toy training set")
    assert torch.bincount(subset.labels).tolist() == [20, 20, 20]
    rows = subset.inputs.flatten().long()
    assert (rows.diff() > 0).all()
    assert torch.equal(split.labels[rows], subset.labels)


def test_a_subset_that_cannot_be_balanced_is_as_balanced_as_can_be():
    subset = balanced_subset(_split([50, 4, 30]), 34, 0, "toy test set")
    assert torch.bincount(subset.labels).tolist() == [15, 4, 15]
    odd = torch.bincount(balanced_subset(_split([9, 9, 9]), 10, 0, "toy test set").labels)
    assert sorted(odd.tolist()) == [3, 3, 4]


def test_subsets_depend_on_the_seed_and_on_nothing_else():
    split = _split([50, 40, 30])
    a, b, c = (balanced_subset(split, 30, seed, "toy training set").inputs for seed in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_a_subset_larger_than_the_set_is_an_error():
    with pytest.raises(InputError, match="digits test set has 360 samples, 361 were asked for"):
        load_dataset("digits", test_size=361)


def test_load_dataset_takes_subsets_of_both_parts():
    data = load_dataset(DatasetSpec(name="digits", train_size=100, test_size=50))
    assert torch.bincount(data.train.labels).tolist() == [10] * 10
    assert torch.bincount(data.test.labels).tolist() == [5] * 10


def test_ranks_match_a_slow_count():
    labels = _split([7, 0, 5, 11]).labels
    slow = [labels[:i].eq(labels[i]).sum().item() for i in range(len(labels))]
    assert ranks_within_class(labels, 4).tolist() == slow


def test_holdout_takes_a_fifth_of_each_class_and_every_row_once():
    labels = _split([50, 2, 23]).labels
    train, test = holdout(labels, ("a", "b", "c"), 0, "toy")
    assert torch.bincount(labels[test]).tolist() == [10, 1, 5]
    assert torch.cat([train, test]).sort().values.tolist() == list(range(75))
    again, other = holdout(labels, ("a", "b", "c"), 0, "toy")[1], holdout(labels, ("a", "b", "c"), 1, "toy")[1]
    assert torch.equal(test, again) and not torch.equal(test, other)


def test_holdout_names_a_class_that_is_too_small():
    with pytest.raises(InputError, match="class 'b' has 1 sample"):
        holdout(torch.tensor([0, 0, 1]), ("a", "b"), 0, "toy")
