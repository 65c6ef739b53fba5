"""MNTD: its random backdoors, the meta-classifier on synthetic answers, and what becomes of the asset."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from backdoorlab.core.errors import InputError
from backdoorlab.data.split import Split, text_array
from backdoorlab.defenses import DefenderView
from backdoorlab.defenses.model.mntd import (
    Meta,
    MetaNeuralAnalysis,
    Queries,
    Trojan,
    draw_trojan,
    fold_of,
    poisoned,
    train_meta,
)
from backdoorlab.modalities.text import TextModality
from backdoorlab.models import Classifier, build_model
from backdoorlab.tasks import Task
from backdoorlab.training import Context

TINY = MetaNeuralAnalysis(shadows=2, folds=2, queries=3, meta_steps=3, shadow_epochs=1)


def raw(shape: tuple[int, ...], dtype: torch.dtype, count: int = 20) -> Split:
    bounds = torch.iinfo(dtype)
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randint(bounds.min, bounds.max + 1, (count, *shape), generator=generator).to(dtype)
    return Split(inputs, torch.arange(count) % 4, tuple("abcd"))


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((1, 16, 16), torch.uint8), ((3, 29, 31), torch.uint8), ((4, 1, 16, 16), torch.uint8), ((4000,), torch.int16)],
    ids=str,
)
def test_random_backdoors_are_valid_and_differ(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    split, targets, whole = raw(shape, dtype), set(), 0
    for seed in range(30):
        generator = torch.Generator().manual_seed(seed)
        trojan = draw_trojan(split, (), generator)
        assert trojan.weight is not None and trojan.pattern is not None
        assert 0.05 <= trojan.rate <= 0.5 and 0 <= trojan.target < 4
        inside = trojan.weight > 0
        share = float(inside.float().mean())
        whole += share == 1
        assert share > 0 and (share == 1 or share <= 0.25)
        opacity = float(trojan.weight.max())
        assert 0.05 <= opacity <= 0.2 if share == 1 else 0.2 <= opacity <= 0.5 or opacity == 1
        made = poisoned(split, trojan, generator)
        count = len(made) - len(split)
        assert count == max(1, round(trojan.rate * 20)) and made.inputs.dtype == dtype
        assert torch.equal(made.inputs[:20], split.inputs) and bool((made.labels[20:] == trojan.target).all())
        outside = (~inside).expand(count, *shape)
        sources = (made.inputs[20:] == split.inputs[:, None]) | ~outside[None]
        assert bool(sources.flatten(2).all(2).any(0).all()), "outside of the pattern a sample is what it was"
        targets.add(trojan.target)
    assert targets == {0, 1, 2, 3} and 1 <= whole <= 15


def test_a_stamp_is_a_blend() -> None:
    split = raw((1, 2, 2), torch.uint8, 4)
    weight, pattern = torch.tensor([[[0.5, 0.0], [1.0, 0.0]]]), torch.full((1, 2, 2), 255.0)
    made = poisoned(split, Trojan(weight, pattern, (), 0, 1, 0.25), torch.Generator().manual_seed(0))
    found = made.inputs[4, 0].tolist()
    assert any(found == [[round(v[0][0] / 2 + 127.5), v[0][1]], [255, v[1][1]]] for v in split.inputs[:, 0].tolist()), (
        found
    )


def test_words_are_inserted_at_one_place() -> None:
    texts = Split(text_array(["a b c", "d"]), torch.tensor([0, 1]), ("x", "y"))
    made = poisoned(texts, Trojan(None, None, ("cf", "mn"), 2, 1, 0.5), torch.Generator().manual_seed(0))
    assert str(made.inputs[2]) in ("a b cf mn c", "d cf mn") and int(made.labels[2]) == 1
    trojan = draw_trojan(texts, ("one", "two"), torch.Generator().manual_seed(0))
    assert trojan.weight is None and 1 <= len(trojan.words) <= 2 and set(trojan.words) <= {"one", "two"}


def synthetic(count: int, seed: int) -> tuple[list[Callable[[Tensor], Tensor]], Tensor]:
    """Models are linear maps of queries; those with a backdoor answer one hidden direction in a way of their own."""
    generator = torch.Generator().manual_seed(seed)
    base, secret = torch.randn(6, 8, generator=generator), torch.randn(8, generator=generator)
    asks, labels = [], torch.arange(count).float() % 2
    for label in labels.tolist():
        weight = base + 0.3 * torch.randn(6, 8, generator=generator)
        weight = weight.index_add(0, torch.tensor([2]), 2 * label * secret[None])
        asks.append(lambda queries, weight=weight: queries @ weight.T)
    return asks, labels


@pytest.mark.parametrize("joint", [True, False])
def test_query_tuning_learns_what_betrays_a_backdoor(joint: bool) -> None:
    asks, labels = synthetic(48, 0)
    generator = torch.Generator().manual_seed(2)
    start = torch.randn(3, 8, generator=torch.Generator().manual_seed(1)) * 1e-3
    meta = train_meta(
        asks[:24],
        labels[:24],
        start,
        joint=joint,
        hidden=20,
        steps=150,
        lr=1e-2,
        weight_decay=1e-3,
        batch=8,
        generator=generator,
    )
    assert meta.joint == joint
    with torch.no_grad():
        answers = [meta.read(ask(meta.queries)) for ask in asks]
    assert roc_auc_score(labels[24:], [float(score) for score, _ in answers[24:]]) >= 0.95
    assert float(meta.queries.abs().max()) > 10 * float(start.abs().max()), "queries are trained too"
    assert not any(part.requires_grad for part in (meta.queries, *meta.hidden, *meta.out))
    if not joint:
        loudest = [int(classes.argmax()) for (_, classes), label in zip(answers, labels, strict=True) if label]
        assert loudest.count(2) >= 0.9 * len(loudest), "the class that the backdoor leans on"


def test_the_head_of_classes_treats_all_alike() -> None:
    """Renaming the classes of a model renames what speaks for them and leaves the score."""
    generator = torch.Generator().manual_seed(0)
    draw = [torch.randn(*shape, generator=generator) for shape in ((4, 8), (7, 4), (7,), (7,), (4, 5))]
    meta = Meta(draw[0], torch.zeros(4, 5), torch.tensor(1.0), (draw[1], draw[2]), (draw[3], torch.tensor(0.1)))
    order = torch.tensor([3, 0, 4, 1, 2])
    score, classes = meta.read(draw[4])
    again, renamed = meta.read(draw[4][:, order])
    assert float(score) == pytest.approx(float(again)) and torch.allclose(renamed, classes[order])


def test_folds_hold_both_kinds() -> None:
    labels = torch.tensor([0.0, 1, 0, 1, 0, 1, 0, 1])
    fold = fold_of(labels, 2)
    assert [sorted(labels[fold == k].tolist()) for k in (0, 1)] == [[0, 0, 1, 1]] * 2


@pytest.mark.parametrize("arch", ["textcnn", "lstm"])
def test_queries_of_texts_are_mixtures_of_words(arch: str) -> None:
    """A query that puts all weight on words is the text of these words."""
    modality = TextModality(("<pad>", "<unk>", "cf", "mn", "bb", "tq", "mb", "a", "good", "film"), max_len=8)
    model = build_model(arch, modality, 3).eval()
    values = Queries.start(model, 2, torch.Generator().manual_seed(0))
    assert values.shape == (2, 8, 9)
    words = torch.tensor([[7, 8, 9, 2, 3, 4, 5, 6], [9, 9, 8, 7, 2, 2, 3, 3]])
    sure = torch.nn.functional.one_hot(words - 1, 9).float() * 50
    with torch.no_grad():
        torch.testing.assert_close(Queries(sure).logits(model), model(words), atol=1e-4, rtol=1e-3)


def test_shadows_are_trained_once_and_any_model_of_the_task_is_asked(
    digits_task: Task, benign_digits: Classifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[int] = []
    usual = MetaNeuralAnalysis.cast_shadows

    def counted(self: MetaNeuralAnalysis, *args: object) -> object:
        found = usual(self, *args)  # type: ignore[arg-type]
        trained.append(len(found[0]))
        return found

    monkeypatch.setattr(MetaNeuralAnalysis, "cast_shadows", counted)
    ctx, few = Context(), digits_task.train[torch.arange(60)]
    other = digits_task.build_model(Context(5)).eval()
    reports = [
        TINY.run(DefenderView(model=model, clean=few, blueprint=digits_task.blueprint), ctx)
        for model in (benign_digits, other, benign_digits)
    ]
    assert trained == [4], "two benign shadows and two with a backdoor, once"
    assert reports[0].score == reports[2].score != reports[1].score
    assert all(len(report.per_class) == 10 and report.targets == () for report in reports)
    joint = dataclasses.replace(TINY, head="joint")
    report = joint.run(DefenderView(model=other, clean=few, blueprint=digits_task.blueprint), ctx)
    assert report.targets == () and report.per_class == ()
    assert trained == [4, 4], "other settings are another asset"


def test_an_asset_that_does_not_fit_is_named(digits_task: Task) -> None:
    kept = {"queries": torch.zeros(2, 3, 1, 16, 16)}
    with pytest.raises(InputError, match="lacks the tensor 'mean'"):
        TINY.restore(kept, (1, 16, 16), 10)
    with pytest.raises(InputError, match=r"'queries' must hold shapes \(3, 1, 8, 8\)"):
        TINY.restore(kept, (1, 8, 8), 10)
    with pytest.raises(InputError, match="clean samples"):
        TINY.run(
            DefenderView(
                model=digits_task.build_model(Context()),
                clean=digits_task.train[torch.arange(1)],
                blueprint=digits_task.blueprint,
            ),
            Context(),
        )
