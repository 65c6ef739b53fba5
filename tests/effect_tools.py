"""Effects: what is measured of a method for a seed, and within which bounds it must lie.

How the author of a method adds a case, in the method's own test file::

    from effect_tools import PATCH, Numbers, case, effects, least, most, repaired

    @case("defense/repair/fp", asr_lost=least(0.4), acc_lost=most(0.1))
    def fp(seed: int) -> Numbers:
        return repaired(seed, FinePruning(epochs=5))

    test_effect = effects(__name__)  # after the last case: one test for each case of this file

A case is named "attack/modality/method" or "defense/stage/method", with a suffix where a method has several. It returns
any named numbers; those that have a bound are asserted, the others are for reading. Its randomness derives from the
seed alone. ``core=True``: one case per stage and modality that ``make test`` runs too; ``make test-effects`` runs all.
What cases share (tasks, benign models, victims, clean samples) is made once here, on digits unless said otherwise:
never change it. ``planted`` measures an attack, and one function per stage a defense: ``screened``, ``trained``,
``repaired``, ``detected``, ``scanned``. Before choosing a bound draw ten seeds, and choose settings on others:
``python benchmarks/effect_spread.py spread.jsonl --only defense/repair/fp --seeds 10`` prints what the draws propose.

The seed changes everything: the split of the data, weights, order of the samples, what is poisoned. The tests take
seed 0; ``benchmarks/effect_spread.py`` draws the numbers of other seeds, instruction sets and numbers of threads. So
far that was two to five seeds in bf16 and seed 0 in fp32 (AVX-512), on one machine and one thread; every bound holds
for all of these. Settings of LBA, SSBA, SIG, Narcissus, ABL and FT were chosen on seeds from 100 on.
"""

from __future__ import annotations

import copy
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from backdoorlab.attacks import Backdoor, attacks
from backdoorlab.data.sources import DatasetSpec, balanced_subset
from backdoorlab.data.split import BACKDOOR, Split, take
from backdoorlab.defenses import (
    DatasetDefense,
    DefenderView,
    InputDefense,
    ModelDefense,
    RepairDefense,
    ScanReport,
    TrainingDefense,
    TrainingReport,
)
from backdoorlab.defenses.repair.clp import channel_lipschitz
from backdoorlab.models import Classifier
from backdoorlab.models.anatomy import conv_norm_pairs, head
from backdoorlab.tasks import Task, TaskSpec
from backdoorlab.training import Context, Recipe, fit, predict

Numbers = dict[str, float]
Bounds = dict[str, tuple[str, float]]
"""Name of a number -> (">=" or "<=", bound)."""

SEED = 0
"""What the tests draw."""


@dataclass(frozen=True)
class Case:
    """One effect.

    Attributes:
        name: stage or kind / modality / method.
        measure: seed -> named numbers.
        bounds: of some of the numbers; the others are for reading.
        core: does ``make test`` run it too?
        needs: a package without which the case is skipped.
        fragile: what was seen of an effect that so small a task shows in some draws only; then a broken bound is
            reported as an expected failure, with its numbers, until method or settings are mended.
    """

    name: str
    measure: Callable[[int], Numbers]
    bounds: Bounds
    core: bool = False
    needs: str = ""
    fragile: str = ""

    def broken(self, numbers: Numbers) -> list[str]:
        """The bounds that are not kept, in words."""
        kept = {">=": lambda value, bound: value >= bound, "<=": lambda value, bound: value <= bound}
        return [
            f"{name} is {numbers[name]:.4g}, must be {sign} {bound:g}"
            for name, (sign, bound) in self.bounds.items()
            if not kept[sign](numbers[name], bound)
        ]


CASES: dict[str, Case] = {}
"""Every case of the test files that were imported so far."""


def case(
    name: str, core: bool = False, needs: str = "", fragile: str = "", **bounds: tuple[str, float]
) -> Callable[..., Any]:
    """Decorator: the function measures this case."""

    def register(measure: Callable[[int], Numbers]) -> Callable[[int], Numbers]:
        known = CASES.get(name)
        if known and known.measure.__code__.co_filename != measure.__code__.co_filename:
            raise ValueError(f"two effect cases are called {name}; the other is in {known.measure.__module__}")
        CASES[name] = Case(name, measure, bounds, core, needs, fragile)
        return measure

    return register


def least(bound: float) -> tuple[str, float]:
    return ">=", bound


def most(bound: float) -> tuple[str, float]:
    return "<=", bound


def effects(module: str) -> Callable[[Case], None]:
    """The tests of the cases that a file has declared so far; to be bound to a name that begins with "test"."""
    mine = [found for found in CASES.values() if found.measure.__module__ == module]
    assert mine, f"{module} declares no effect case above this line"

    @pytest.mark.effect
    @pytest.mark.parametrize(
        "case", [pytest.param(c, id=c.name, marks=[pytest.mark.core_effect] if c.core else []) for c in mine]
    )
    def test_effect(case: Case) -> None:
        if case.needs:
            pytest.importorskip(case.needs)
        numbers = case.measure(SEED)
        print(case.name, {name: round(value, 4) for name, value in numbers.items()})
        if case.fragile and case.broken(numbers):
            pytest.xfail(f"{'; '.join(case.broken(numbers))} ({case.fragile})")
        assert not case.broken(numbers), numbers

    test_effect.__module__ = module
    return test_effect


def all_cases(folder: Path = Path(__file__).parent) -> dict[str, Case]:
    """Every case of every test file below ``folder``, by name; imports those that use this module."""
    for file in sorted(folder.rglob("test_*.py")):
        name = ".".join(("all_cases", *file.relative_to(folder).with_suffix("").parts))
        if name not in sys.modules and "from effect_tools import" in file.read_text():
            spec = importlib.util.spec_from_file_location(name, file)
            assert spec and spec.loader
            module = importlib.util.module_from_spec(spec)
            sys.modules[name] = module
            with suppress(pytest.skip.Exception):  # a package that its method needs is missing
                spec.loader.exec_module(module)
    return dict(sorted(CASES.items()))


# --- what cases share: made once for a seed, read only ----------------------------------------------------------------

SETS = {"image": "digits", "text": "templated_text", "audio": "tone_words", "video": "moving_digits"}
"""Embedded data set of each modality."""


@lru_cache(maxsize=1)
def context(seed: int) -> Context:
    """One cache of surrogates for all cases of a seed."""
    return Context(seed)


@lru_cache(maxsize=4)
def task(seed: int, dataset: str = "digits", **changes: Any) -> Task:
    """The smallest task of a modality; image models train for 2 to 3 seconds of one core."""
    spec = TaskSpec(dataset=DatasetSpec(name=dataset, seed=seed), recipe="smoke", recipe_changes=tuple(changes.items()))
    return Task.load(spec)


@lru_cache(maxsize=4)
def benign(seed: int, dataset: str = "digits", **changes: Any) -> Classifier:
    """A benign model; read only."""
    mine = task(seed, dataset, **changes)
    return mine.fit(mine.train, Context(seed))[0]


@lru_cache(maxsize=4)
def victim(seed: int, **settings: Any) -> Backdoor:
    """BadNets on digits; read only."""
    return attacks.get("badnets", "image").build(settings).run(task(seed), Context(seed))


@lru_cache(maxsize=2)
def blended(seed: int) -> Backdoor:
    """A trigger that covers the image; read only."""
    return attacks.get("blended", "image").build(PATCH).run(task(seed), context(seed))


@lru_cache(maxsize=2)
def clean(seed: int, count: int = 144) -> Split:
    """The defender's clean samples: a tenth of the training set."""
    return balanced_subset(task(seed).train, count, seed, "digits training set")


@lru_cache(maxsize=2)
def wide_task(seed: int) -> Task:
    """The same digits with a network that has channels to spare; its models train for 10 seconds of one core."""
    spec = TaskSpec(dataset=DatasetSpec(name="digits", seed=seed), model="preact_resnet18_w16", recipe="smoke")
    return Task.load(spec)


@lru_cache(maxsize=2)
def wide_victim(seed: int, attack: str = "badnets") -> Backdoor:
    """A victim of that network, for methods that prune; read only."""
    return attacks.get(attack, "image").build(PATCH).run(wide_task(seed), context(seed))


@lru_cache(maxsize=2)
def wide_benign(seed: int) -> Classifier:
    """A benign model of that network; read only."""
    return wide_task(seed).fit(wide_task(seed).train, Context(seed))[0]


def accuracy(model: Classifier, split: Split) -> float:
    return float((predict(model, split.inputs).argmax(1) == split.labels).float().mean())


# --- attacks ----------------------------------------------------------------------------------------------------------

LOST, OBEYS = most(0.05), most(0.3)
"""Clean accuracy lost, and how often a benign model says the target class to triggered images.

Settings that differ from the defaults are stronger triggers: on grey digits of 16 px, smooth and easily told apart,
a pattern meant for 32-px photographs is hardly visible to a network trained for seconds, and a network that knows the
target class from its shape has no use for a clean-label trigger unless that is much easier to see. A generator needs
more samples to learn from in 300 steps of 64; averaged features of 16 px hardly notice a patch of a quarter of the
side. Rates that equal the defaults are stated, so that the numbers stay what they are when a default moves."""


def effect(backdoor: Backdoor, mine: Task, model: Classifier, ctx: Context) -> Numbers:
    """What an attack did, beside a benign model that sees the same triggers."""
    metrics, untouched = backdoor.measure(mine, ctx), backdoor.measure(mine, ctx, model)
    numbers = {
        "asr": metrics["asr"],
        "acc": metrics["acc"],
        "acc_lost": untouched["acc"] - metrics["acc"],
        "benign_asr": untouched["asr"],
        "gain": metrics["asr"] - untouched["asr"],
    }
    if "cross_acc" in metrics:
        numbers["cross_lost"] = metrics["acc"] - metrics["cross_acc"]
    return numbers


def planted(seed: int, name: str, **settings: Any) -> tuple[Backdoor, Numbers]:
    """An image attack on digits and its effect."""
    backdoor = attacks.get(name, "image").build(settings).run(task(seed), context(seed))
    return backdoor, effect(backdoor, task(seed), benign(seed), context(seed))


def hidden(seed: int, name: str, **settings: Any) -> Numbers:
    """An attack whose networks hide something, and how well they do."""
    backdoor, numbers = planted(seed, name, **settings)
    kept = {k: float(backdoor.notes[k]) for k in ("bit_accuracy", "psnr", "ink_error") if k in backdoor.notes}
    return numbers | kept | {"gates_missed": float(len(backdoor.notes.get("gates_missed", ())))}


def other(seed: int, modality: str, **settings: Any) -> tuple[Backdoor, Task, Numbers]:
    """BadNets on another modality and its effect."""
    mine = task(seed, SETS[modality])
    backdoor = attacks.get("badnets", modality).build({"poison_rate": 0.1, **settings}).run(mine, Context(seed))
    return backdoor, mine, effect(backdoor, mine, benign(seed, SETS[modality]), Context(seed))


# --- defenses ---------------------------------------------------------------------------------------------------------

PATCH = {"poison_rate": 0.1}
"""BadNets as most defenses meet it here."""
RARE = {"poison_rate": 0.05, "exclude_target": True}
"""The poison is a minority of its class."""


def found(flagged: Tensor, scores: Tensor, truth: Tensor) -> Numbers:
    return {
        "tpr": float(flagged[truth].float().mean()),
        "fpr": float(flagged[~truth].float().mean()),
        "auroc": float(roc_auc_score(truth, scores)),
    }


def screened(seed: int, method: DatasetDefense, backdoor: Backdoor | None = None) -> Numbers:
    """A defense of data sets against BadNets (or another victim on digits): "tpr", "fpr", "auroc"."""
    backdoor = backdoor or victim(seed, **PATCH)
    poisoned = backdoor.poison.apply(task(seed).train)
    view = DefenderView(
        suspicious=poisoned.as_seen(), model=backdoor.model, clean=clean(seed), blueprint=task(seed).blueprint
    )
    outcome = method.apply(view, Context(seed))
    return found(outcome.flags, outcome.scores, poisoned.roles == BACKDOOR)


def trained(
    seed: int, method: TrainingDefense, backdoor: Backdoor | None = None
) -> tuple[TrainingReport, Backdoor, Numbers]:
    """A defense during training: "asr", "acc" and what it took of them: "asr_lost", "acc_lost"."""
    backdoor, mine = backdoor or victim(seed, **PATCH), task(seed)
    suspicious = backdoor.poison.apply(mine.train).as_seen()
    report = method.apply(
        DefenderView(suspicious=suspicious, blueprint=mine.blueprint, clean=clean(seed)), Context(seed)
    )
    before, after = (backdoor.measure(mine, Context(seed), m) for m in (None, report.model))
    return report, backdoor, {"asr": after["asr"], "acc": after["acc"], **lost(before, after)}


def lost(before: Any, after: Any) -> Numbers:
    """What a defense took of the ASR and of the ACC."""
    return {"asr_lost": before["asr"] - after["asr"], "acc_lost": before["acc"] - after["acc"]}


def repaired(
    seed: int,
    method: RepairDefense,
    model: Classifier | None = None,
    harmless: bool | Classifier = False,
    backdoor: Backdoor | None = None,
) -> Numbers:
    """A repair of the victim of BadNets, or of ``model`` with the same trigger, or of the victim of another attack on
    digits: "asr_before", "asr_lost", "acc_lost", "der".

    ``harmless``: also what it costs a benign model (the one given, or that of the task), "benign_lost".
    """
    backdoor, mine, ctx = backdoor or victim(seed, **PATCH), task(seed), Context(seed)
    model = model or backdoor.model

    def mended(given: Classifier) -> Classifier:
        view = DefenderView(
            model=given,
            clean=clean(seed),
            suspicious=backdoor.poison.apply(mine.train).as_seen(),
            blueprint=mine.blueprint,
        )
        return method.apply(view, ctx).model

    before, after = (backdoor.measure(mine, ctx, m) for m in (model, mended(model)))
    numbers = {"asr_before": before["asr"], "asr": after["asr"], "acc": after["acc"], **lost(before, after)}
    numbers["der"] = (max(0.0, numbers["asr_lost"]) - max(0.0, numbers["acc_lost"]) + 1) / 2
    if harmless:
        innocent = harmless if isinstance(harmless, Classifier) else benign(seed)
        numbers["benign_lost"] = accuracy(innocent, mine.test) - accuracy(mended(innocent), mine.test)
    return numbers


def detected(seed: int, method: InputDefense, backdoor: Backdoor | None = None) -> Numbers:
    """A detector of inputs on clean and on triggered test images of BadNets (or another victim on digits): "auroc",
    "tpr", "fpr".

    "benign_gap": a benign model sees no difference between these, so that its AUROC should be near a half.
    """
    backdoor, mine = backdoor or victim(seed, **PATCH), task(seed)
    triggered = backdoor.triggered_test(mine)[0]

    def scores(model: Classifier) -> tuple[float, float, float]:
        detector = method.apply(DefenderView(model=model, clean=clean(seed), suspicious=mine.train), Context(seed))
        parts = [detector.score(inputs) for inputs in (mine.test.inputs, triggered)]
        truth = torch.cat([torch.full((len(part),), float(i)) for i, part in enumerate(parts)])
        rates = [float(detector.flags(part).float().mean()) for part in parts]
        return float(roc_auc_score(truth, torch.cat(parts))), rates[1], rates[0]

    auroc, tpr, fpr = scores(backdoor.model)
    level, _, _ = scores(benign(seed))
    return {"auroc": auroc, "tpr": tpr, "fpr": fpr, "benign_gap": abs(level - 0.5)}


@lru_cache(maxsize=1)
def shapes_victim(seed: int) -> tuple[Task, Backdoor]:
    """BadNets (a checker of 5 px) on colored shapes of 32 px; read only.

    For detectors whose premise digits do not meet: light strokes on black survive any blur and few other corruptions,
    and a feature map of 4 x 4 cells is too coarse to say where in 16 px a trigger lies.
    """
    spec = DatasetSpec(name="shapes", seed=seed, train_size=2000, test_size=120)
    mine = Task.load(TaskSpec(dataset=spec, recipe="smoke", recipe_changes=(("epochs", 6),)))
    settings = {"poison_rate": 0.1, "size": 5, "pattern": "checker"}
    return mine, attacks.get("badnets", "image").build(settings).run(mine, Context(seed))


def detected_shapes(seed: int, method: InputDefense, count: int = 60) -> Numbers:
    """A detector on ``count`` clean and triggered shapes: "auroc", "tpr", "fpr", and the victim's "asr"."""
    mine, backdoor = shapes_victim(seed)
    few = balanced_subset(mine.train, 120, seed, "shapes training set")
    detector = method.apply(DefenderView(model=backdoor.model, clean=few), Context(seed))
    parts = [
        detector.score(take(inputs, torch.arange(count)))
        for inputs in (mine.test.inputs, backdoor.triggered_test(mine)[0])
    ]
    truth = torch.arange(2 * count) >= count
    scores = torch.cat(parts)
    return found(detector.flags(scores), scores, truth) | {"asr": backdoor.measure(mine, Context(seed))["asr"]}


def scanned(seed: int, method: ModelDefense, samples: int = 144) -> tuple[ScanReport, ScanReport, Numbers]:
    """A scan of the victim of BadNets and of a benign model: the reports, "score", "accused" (is the target class the
    most suspicious of a model that is called backdoored?), "benign_score" and "benign_accused"."""
    backdoor, ctx = victim(seed, **PATCH), Context(seed)
    report, innocent = (
        method.apply(DefenderView(model=model, clean=clean(seed, samples)), ctx)
        for model in (backdoor.model, benign(seed))
    )
    numbers = {
        "score": report.score,
        "benign_score": innocent.score,
        "accused": float(report.backdoored and report.targets[0] == 0),
        "benign_accused": float(innocent.backdoored),
    }
    return report, innocent, numbers


@contextmanager
def one_channel_a_layer(model: Classifier) -> Iterator[None]:
    """Gradients reach one channel of every conv-norm pair, that of the smallest bound, and its weights in the head."""
    handles = []

    def only(parameter: Tensor, index: tuple[slice | int, ...]) -> None:
        keep = torch.zeros_like(parameter)
        keep[index] = 1
        handles.append(parameter.register_hook(lambda grad: grad * keep))

    for conv, norm in conv_norm_pairs(model):
        channel = int(channel_lipschitz(conv, norm).argmin())
        for parameter in (conv.weight, norm.weight, norm.bias):
            only(parameter, (channel,))
    last = head(model)
    only(last.weight, (slice(None), channel))
    last.bias.requires_grad_(False)
    try:
        yield
    finally:
        last.bias.requires_grad_(True)
        for handle in handles:
            handle.remove()


@lru_cache(maxsize=1)
def subnet_victim(seed: int) -> Classifier:
    """A backdoor that lives in few channels, as in subnet replacement (Qi et al., CVPR 2022); for pruning methods.

    The BadNets victim of the other cases would not do: in a net of 112 channels the backdoor is spread so thinly that
    silencing any single channel leaves an ASR of 0.88 or more. Read only.
    """
    model = copy.deepcopy(benign(seed))
    with one_channel_a_layer(model):
        recipe = Recipe(epochs=20, batch_size=64, lr=0.2, weight_decay=0)
        fit(model, victim(seed, **PATCH).poison.apply(task(seed).train).as_seen(), recipe, context=Context(seed))
    return model
