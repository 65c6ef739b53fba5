"""Two data sets that differ have two digests, whatever characters their texts hold."""

from __future__ import annotations

import torch

from backdoorlab.benchmark.spec import data_digest
from backdoorlab.data.split import Dataset, Split, text_array
from backdoorlab.modalities.text import TextModality, fit_vocabulary
from backdoorlab.tasks import Task, TaskSpec
from backdoorlab.training.recipes import recipe_for


def _digest(*texts: str) -> str:
    split = Split(text_array(list(texts)), torch.tensor([0, 1]), ("a", "b"))
    dataset = Dataset("texts", "text", split, split)
    return data_digest(Task(TaskSpec(), dataset, TextModality(fit_vocabulary(texts)), recipe_for("text", "smoke")))


def test_where_one_text_ends_is_part_of_the_digest():
    tables = [("x\0y", "z"), ("x", "y\0z"), ("x", "y z"), ("xy", "z"), ("x", "yz"), ("x\x01y", "z")]
    assert len({_digest(*texts) for texts in tables}) == len(tables)
    assert _digest("x", "y") == _digest("x", "y")
