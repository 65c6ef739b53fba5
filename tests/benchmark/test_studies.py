"""Studies: what is measured, by hand; cells that are stored, reused, resumed and counted; figures."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from benchmark_cases import TINY
from PIL import Image
from torch import Tensor

from backdoorlab.analysis.panels import Curve, Panel, draw_panels
from backdoorlab.benchmark import Runner
from backdoorlab.benchmark.studies import (
    STUDIES,
    IsolationStudy,
    NormStudy,
    Outcome,
    StudyOptions,
    abl,
    activations,
    base,
    isolation,
    plan_study,
    run_study,
)
from backdoorlab.core.errors import InputError
from backdoorlab.data.split import BACKDOOR
from backdoorlab.defenses.common.maps import last_maps
from backdoorlab.defenses.training.abl import AntiBackdoorLearning
from backdoorlab.tasks import Task
from backdoorlab.training import Context, predict

POISON = torch.tensor([True, True, False, False, True, False, False, False, False, False])
LOSSES = torch.tensor([0.1, 0.2, 0.3, 0.9, 0.8, 0.7, 0.6, 1.0, 1.1, 1.2])


def test_precision_and_recall_by_hand() -> None:
    rates = (0.05, 0.1, 0.2, 0.3, 0.6, 1.0)
    assert isolation.precision_at(LOSSES, POISON, rates) == pytest.approx([None, 1, 1, 2 / 3, 3 / 6, 0.3])
    assert isolation.recall_at(LOSSES, POISON, rates) == pytest.approx([0, 1 / 3, 2 / 3, 2 / 3, 1, 1])
    assert isolation.recall_at(LOSSES, POISON & False, (0.5,)) == [None]


def test_the_ranking_is_the_mean_over_the_later_half() -> None:
    losses = torch.tensor([[1.0], [2.0], [4.0], [8.0], [16.0]])
    means = [float(isolation.ranking_losses(losses, turning)) for turning in range(1, 6)]
    assert means == [1, 2, 3, 6, pytest.approx(28 / 3)]  # of epochs 1; 2; 2-3; 3-4; 3-5


def test_the_share_of_the_most_frequent_label() -> None:
    labels = torch.tensor([3, 3, 1, 3, 0])
    assert isolation.top_class_share(labels, torch.tensor([0, 1, 2, 4])) == 0.5
    assert isolation.top_class_share(labels, torch.tensor([], dtype=torch.int64)) is None


def test_watching_changes_nothing_and_sees_what_abl_ranks_by(digits_task: Task) -> None:
    data, defense = digits_task.train[torch.arange(128)], AntiBackdoorLearning(turning=0.01)
    plan = replace(digits_task.blueprint, recipe=replace(digits_task.recipe, epochs=300, min_steps=0))
    seen = isolation.watch_losses(defense, data, plan, Context(seed=3))
    _, wanted = defense.isolate(data, plan, Context(seed=3))
    assert seen.shape == (3, 128)
    torch.testing.assert_close(isolation.ranking_losses(seen, 3), wanted, rtol=0, atol=0)


def test_norms_of_maps_by_hand(digits_task: Task) -> None:
    model, inputs = digits_task.build_model(Context()).eval(), digits_task.test.inputs[:7]
    seen: list[Tensor] = []
    handle = last_maps(model).module.register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        model(model.modality.prepare(inputs))
    handle.remove()
    maps = seen[0].relu().flatten(2)
    found = activations.map_norms(model, last_maps(model), inputs, batch_size=3)
    torch.testing.assert_close(found["l1"], maps.sum(2))
    torch.testing.assert_close(found["l2"], maps.square().sum(2).sqrt())
    torch.testing.assert_close(found["linf"], maps.amax(2))
    assert len({float(found[name].sum()) for name in found}) == 3


def test_separation_uses_the_channel_that_a_trigger_raises() -> None:
    clean = torch.rand(40, 5, generator=torch.Generator().manual_seed(0))
    clean[:, 0] += 10  # the largest channel, which the trigger leaves alone
    triggered = clean.clone()
    triggered[:, 3] += 5
    found = activations.separation(clean, triggered)
    assert found["weighted"] == 1.0
    assert found["max"] == pytest.approx(0.5)


def test_heat_on_changed_pixels_by_hand() -> None:
    heat = torch.tensor([[[1.0, 3.0], [0.0, 4.0]], [[0.0, 0.0], [0.0, 0.0]]])
    changed = torch.tensor([[[False, True], [False, False]]] * 2)
    share = activations.heat_share(heat, changed)
    assert float(share[0]) == 3 / 8
    assert bool(share[1].isnan())


def test_rates_of_pruned_networks(digits_task: Task) -> None:
    model, data = digits_task.build_model(Context()), digits_task.test[torch.arange(50)]
    maps, before = last_maps(model), {k: v.clone() for k, v in model.state_dict().items()}
    predicted = predict(model, data.inputs).argmax(1)
    ranking, counts = torch.arange(maps.count).flip(0), torch.tensor([0, 1, maps.count])
    rates = activations.pruned_rates(model, maps, ranking, counts, data.inputs, predicted)
    maps.silence(torch.ones(maps.count, dtype=torch.bool))
    dead = predict(model, data.inputs).argmax(1)
    assert len(dead.unique()) == 1
    assert rates.tolist() == pytest.approx([1, float(rates[1]), float((dead == predicted).double().mean())])
    model.load_state_dict(before)
    maps.silence(torch.arange(maps.count) == maps.count - 1)  # the first of the ranking
    assert float(rates[1]) == pytest.approx(float((predict(model, data.inputs).argmax(1) == predicted).double().mean()))


def test_a_figure_of_panels_is_a_png_with_gaps_where_nothing_was_measured() -> None:
    panel = Panel("a", "x", "y", [Curve("one", [1, 2, 3], [0.1, None, 0.3], "#000000", marker="o")])
    bars = Panel("b", "", "", [Curve("two", [0], [1.0], "#ff0000", kind="bar")], ticks=[(0, "none")])
    wide, tall = (_size(draw_panels("title", "line", rows)) for rows in ([[panel, bars]], [[panel], [bars]]))
    assert wide[1] < tall[1]


# The life of a study, on the smallest task.


def study(kind: type[Any] = IsolationStudy, **options: Any) -> Any:
    return kind(options=StudyOptions(**({"task": TINY, "attacks": ("badnets",), "parts": ("isolation",)} | options)))


@pytest.fixture(scope="module")
def runner(filled: Runner) -> Runner:
    """A runner over the store that has BadNets and the benign model already."""
    return Runner(filled.store)


@pytest.fixture
def two_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(abl, "LOSSES", {name: abl.LOSSES[name] for name in ("ordinary training", "LGA")})
    monkeypatch.setattr(abl, "WATCHED", 0.2)


@pytest.mark.usefixtures("two_ways")
def test_cells_are_stored_resumed_after_an_interruption_and_reused(
    runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = plan_study(study(), runner)
    assert [(p.cell.label, p.done) for p in planned] == [
        ("undefended", True),
        ("ordinary training", False),
        ("LGA", False),
    ]
    taken: list[str] = []

    def interrupted(outcome: Outcome) -> None:
        taken.append(outcome.cell.label)
        if outcome.cell.measurement is not None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_study(planned, runner, interrupted)
    assert taken == ["undefended", "ordinary training"]
    assert [p.done for p in plan_study(study(), runner)] == [True, True, False]

    calls: list[int] = []
    take = isolation.watch_losses
    monkeypatch.setattr(isolation, "watch_losses", lambda *args: calls.append(1) or take(*args))
    outcomes = run_study(plan_study(study(), runner), runner)
    assert (len(calls), [o.reused for o in outcomes]) == (1, [True, True, False])
    again = run_study(plan_study(study(), runner), runner)
    assert (len(calls), [o.reused for o in again]) == (1, [True] * 3)
    assert [o.card for o in again] == [o.card for o in outcomes]

    card, kept = outcomes[2].card, base.stored(outcomes[2], runner).tensors("isolation")
    assert card is not None and card.parents == [f"attack/{planned[0].key}"]
    assert kept["losses"].shape == (2, 400)
    assert int((kept["roles"] == BACKDOOR).sum()) == 40
    ranked = isolation.ranking_losses(kept["losses"], int(kept["turning"]))
    wanted = isolation.precision_at(ranked, kept["roles"] == BACKDOOR, (0.1,))[0]
    assert card.metrics["precision_0.1"] == wanted

    rows = study().rows(outcomes, runner)
    assert {tuple(row) for row in rows} == {tuple(rows[0])}
    assert [row["acc"] is None for row in rows] == [False, True, True]
    figures = study().figures(outcomes, runner)
    assert set(figures) == set(study().figure_names(planned)) == set(abl.FIGURES["isolation"])
    assert all(min(_size(content)) > 300 for content in figures.values())


@pytest.mark.usefixtures("two_ways")
def test_another_setting_is_another_cell_and_the_key_counts_the_code(
    runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    def keys(**options: Any) -> list[str]:
        return [p.key for p in plan_study(study(**options), runner)]

    usual = keys()
    assert keys(settings={"gamma": 0.7})[:2] == usual[:2]  # ordinary training has none
    assert keys(settings={"gamma": 0.7})[2] != usual[2]
    assert keys(settings={"gamma": "0.5", "ascent_steps": 7}) == usual  # the default as text; of another phase
    monkeypatch.setattr(base, "code_of", lambda path: b"other code")
    assert keys()[0] == usual[0]
    assert keys()[1] != usual[1]


@pytest.mark.usefixtures("two_ways")
def test_a_failed_cell_has_a_card_does_not_stop_the_others_and_is_tried_again(
    filled: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = Runner(filled.store)
    planned = plan_study(study(seed=0, settings={"gamma": 0.9}), work)[1:]

    def broken(site: Any, settings: Any) -> Any:
        raise RuntimeError("no luck")

    with monkeypatch.context() as patch:
        patch.setattr(abl, "measure_isolation", broken)
        patch.setattr(base, "_stored", lambda runner, stage, key: None)  # whatever other tests left
        failed = run_study(planned[-1:], work)[0]
    assert failed.status == "failed" and failed.card is not None
    assert "RuntimeError: no luck" in str(failed.reason)
    assert base.stored(failed, work).log()[0]["traceback"].startswith("Traceback")
    assert study().figures([failed], work) == {}
    assert [p.done for p in plan_study(study(settings={"gamma": 0.9}), work)][2] is False
    assert run_study(planned[-1:], work)[0].ok


def test_a_plan_counts_cells_and_names_equal_ones_by_one_key(runner: Runner) -> None:
    planned = plan_study(study(parts=()), runner)
    sweeps = len(isolation.RATES) + len(abl.TURNINGS)
    assert len(planned) == 2 + 1 + len(abl.LOSSES) + len(abl.UNLEARNING) + sweeps
    same = {p.key for p in planned if p.cell.label in ("joint", "isolation 1 %", "turning at 20 %")} - {planned[1].key}
    assert len(same) == 1
    done = {(p.stage, p.cell.label) for p in planned if p.done}
    assert {("benign", "undefended"), ("attack", "undefended")} <= done
    with_norms = plan_study(study(NormStudy, parts=()), runner)
    assert [p.cell.label for p in with_norms if p.cell.attack == "badnets"] == [
        "undefended",
        "norms",
        "sweep",
        "pruned by l-infinity",
        "pruned by l2",
        "pruned by l1",
        "pruned without trigger",
    ]


def test_the_lists_of_attacks_follow_the_data(runner: Runner) -> None:
    image = runner.task(TINY)
    assert isinstance(image, Task)
    assert study(attacks=("paper",)).planting(image) == IsolationStudy.paper
    assert len(IsolationStudy.paper) == 10 and len(NormStudy.paper) == 5
    assert study(attacks=()).planting(image) == ("badnets", "blended")
    assert study(attacks=("dynamic", "input_aware")).planting(image) == ("input_aware",)
    words = Task.load(replace(TINY, dataset=replace(TINY.dataset, name="templated_text"), recipe_changes=()))
    assert study(attacks=("paper",)).planting(words) == ("badnets",)
    with pytest.raises(InputError, match="blended"):
        study(attacks=("blended",)).planting(words)


@pytest.mark.parametrize(
    ("options", "hint"),
    [
        ({"parts": ("isolations",)}, "Did you mean 'isolation'"),
        ({"settings": {"gama": 1}}, "Did you mean 'gamma'"),
        ({"attacks": ("badnet",)}, "Did you mean 'badnets'"),
    ],
)
def test_what_cannot_be_studied_is_refused_before_any_work(runner: Runner, options: Any, hint: str) -> None:
    with pytest.raises(InputError, match=hint):
        plan_study(study(**options), runner)


@pytest.mark.effect
def test_norms_and_pruning_of_badnets(filled: Runner) -> None:
    """The sweep ends where the defense does, and the trigger shows in the backdoored model alone."""
    work = Runner(filled.store)
    options = {"parts": (), "settings": {"epochs": 2}}
    planned = plan_study(study(NormStudy, **options), work)
    wanted = ("undefended", "norms", "sweep", "pruned by l-infinity")
    outcomes = run_study([p for p in planned if p.cell.label in wanted], work)
    assert all(o.ok for o in outcomes), [o.reason for o in outcomes]
    found = {o.cell.label: o for o in outcomes if o.cell.attack == "badnets"}
    sweep, defended = found["sweep"], found["pruned by l-infinity"]
    assert sweep.metric("acc_linf") == pytest.approx(defended.metric("acc"))
    assert sweep.metric("asr_linf") == pytest.approx(defended.metric("asr"))
    norms = found["norms"]
    assert norms.metric("auroc_linf_weighted_backdoored") > norms.metric("auroc_linf_weighted_benign")
    curves = base.stored(sweep, work).tensors("sweep")
    assert float(curves["linf.recovered.asr"][0]) == pytest.approx(found["undefended"].metric("asr"))
    figures = study(NormStudy, **options).figures(outcomes, work)
    assert set(figures) == {"norms.png", "channels.png", "pruning.png", "grad-cam-badnets.png"}
    rows = study(NormStudy, **options).rows(outcomes, work)
    assert {tuple(row) for row in rows} == {tuple(rows[0])}
    assert [row["cell"] for row in rows if "sweep" in row["cell"]] == [
        "sweep by l-infinity",
        "sweep by l2",
        "sweep by l1",
    ]


@pytest.mark.effect
def test_the_precision_of_a_defense_is_that_of_its_measured_losses(filled: Runner) -> None:
    """Both draw the same numbers: the defense's isolation is the beginning of the watched one."""
    work = Runner(filled.store)
    options = {"parts": ("isolation", "unlearning"), "settings": {"ascent_steps": 2}}
    planned = [p for p in plan_study(study(**options), work) if p.cell.attack == "badnets"]
    outcomes = {o.cell.label: o for o in run_study(_labelled(planned, ("LGA", "joint")), work)}
    assert outcomes["joint"].metric("precision") == outcomes["LGA"].metric("precision_0.01")
    assert outcomes["joint"].metric("auroc") == pytest.approx(outcomes["LGA"].metric("auroc"))


def test_studies_are_found_by_name() -> None:
    assert {"abl": IsolationStudy, "linf": NormStudy} == STUDIES
    assert all(kind.short and set(kind.short) <= set(kind.paper) for kind in STUDIES.values())


def _labelled(planned: Sequence[base.Planned], labels: Sequence[str]) -> list[base.Planned]:
    return [p for p in planned if p.cell.label in labels]


def _size(png: bytes) -> tuple[int, int]:
    assert png.startswith(b"\x89PNG")
    return Image.open(io.BytesIO(png)).size
