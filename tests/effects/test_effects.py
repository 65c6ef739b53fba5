"""Effects of methods that have no test file of their own yet; see effect_tools.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from backdoorlab.attacks import attacks
from backdoorlab.attacks.common.surrogate import clean_surrogate
from backdoorlab.attacks.image.cba import DRAWS, mix, same_class
from backdoorlab.attacks.image.lba import train_student
from backdoorlab.data.sources import DatasetSpec
from backdoorlab.data.split import BACKDOOR, COVER, Split, text_array
from backdoorlab.defenses import DefenderView
from backdoorlab.defenses.dataset.ac import ActivationClustering
from backdoorlab.defenses.dataset.spectral import SpectralSignatures
from backdoorlab.defenses.dataset.strip import StripDataset
from backdoorlab.defenses.input.strip import Strip
from backdoorlab.defenses.model.neural_cleanse import NeuralCleanse
from backdoorlab.defenses.repair.anp import AdversarialNeuronPruning
from backdoorlab.defenses.repair.clp import ChannelLipschitzPruning
from backdoorlab.defenses.repair.ft import FineTuning
from backdoorlab.defenses.training.abl import AntiBackdoorLearning
from backdoorlab.models import Classifier
from backdoorlab.tasks import TaskSpec
from backdoorlab.training import Context, predict
from effect_tools import (
    LOST,
    OBEYS,
    PATCH,
    RARE,
    Bounds,
    Numbers,
    accuracy,
    benign,
    case,
    clean,
    context,
    effect,
    effects,
    found,
    least,
    most,
    other,
    planted,
    subnet_victim,
    task,
    victim,
)

# --- image attacks ----------------------------------------------------------------------------------------------------

IMAGE: list[tuple[str, dict[str, Any], Bounds]] = [
    ("badnets", {"poison_rate": 0.1}, {"asr": least(0.85)}),
    ("badnets_a2a", {"size": 4, "poison_rate": 0.3}, {"asr": least(0.75)}),
    ("blended", {"poison_rate": 0.05}, {"asr": least(0.9)}),
    (
        "sig",
        {"target": 1, "poison_rate": 0.08, "delta_train": 60.0, "delta_test": 90.0},
        {"asr": least(0.4), "benign_asr": most(0.4)},
    ),
    ("wanet", {"poison_rate": 0.1, "s": 2.0}, {"asr": least(0.85), "cross_lost": most(0.2)}),
    ("ftrojan", {"poison_rate": 0.1, "magnitude": 60.0}, {"asr": least(0.9)}),
    ("ctrl", {"poison_rate": 0.08, "magnitude_train": 1200.0, "magnitude_test": 1600.0}, {"asr": least(0.7)}),
    ("bpp", {"poison_rate": 0.1, "levels": 4}, {"asr": least(0.85), "cross_lost": most(0.15)}),
    ("adap_blend", {}, {"asr": least(0.9)}),
    ("adap_patch", {}, {"asr": least(0.7), "acc_lost": most(0.1)}),
    ("lf", {"poison_rate": 0.1}, {"asr": least(0.9)}),
    ("refool", {"poison_rate": 0.1}, {"asr": least(0.9), "benign_asr": most(0.5)}),
    ("trojannn", {}, {"asr": least(0.9)}),
    ("blind", {"poison_rate": 0.1}, {"asr": least(0.9)}),
    (
        "input_aware",
        {"poison_rate": 0.33, "density": 0.2, "generator_lr": 0.002},
        {"asr": least(0.8), "cross_lost": most(0.45)},
    ),
    ("lc", {"poison_rate": 0.08, "eps": 64.0, "step": 4.0, "steps": 40, "surrogate_eps": 32.0}, {"asr": least(0.5)}),
    (
        "narcissus",
        {"target": 1, "poison_rate": 0.09, "eps": 32.0, "factor_test": 3.0},
        {"asr": least(0.8), "benign_asr": most(0.4)},
    ),
    ("lira", {"poison_rate": 0.1, "strength": 0.1}, {"asr": least(0.9)}),
    ("fc", {"poison_rate": 0.09, "size": 8, "steps": 200}, {"asr": least(0.7)}),
    ("htba", {"poison_rate": 0.09, "size": 10, "eps": 48, "steps": 300}, {"asr": least(0.7)}),
    ("tuap", {"target": 1, "poison_rate": 0.09, "eps": 76.0}, {"asr": least(0.6), "benign_asr": most(0.6)}),
    (
        "combat",
        {"target": 1, "poison_rate": 0.09, "eps": 0.4, "generator_lr": 0.002, "epochs": 2.0, "clean_weight": 3.0},
        {"asr": least(0.4), "benign_asr": most(0.6), "gain": least(0.1)},
    ),
]
"""Settings that differ from the defaults are stronger triggers: on grey digits of 16 px, smooth and easily told apart,
a pattern meant for 32-px photographs is hardly visible to a network trained for seconds, and a network that knows the
target class from its shape has no use for a clean-label trigger unless that is much easier to see. A generator needs
more samples to learn from in 300 steps of 64; averaged features of 16 px hardly notice a patch of a quarter of the
side. Rates that equal the defaults are stated, so that the numbers stay what they are when a default moves."""

THREAT_MODELS = ("badnets", "wanet")
"""One attack for each that there is on images: poisoning, training."""


def _image(name: str, settings: dict[str, Any]) -> Callable[[int], Numbers]:
    return lambda seed: planted(seed, name, **settings)[1]


for _name, _settings, _bounds in IMAGE:
    _all = {"acc_lost": LOST, "benign_asr": OBEYS, **_bounds}
    case(f"attack/image/{_name}", _name in THREAT_MODELS, **_all)(_image(_name, _settings))


@case("attack/image/dfst", asr=least(0.7), acc_lost=LOST, benign_asr=most(0.15), fooled=least(0.3), right=least(0.85))
def dfst(seed: int) -> Numbers:
    """Fewer steps for the style network, whose pictures of 16 px are small.

    Detoxicants are images that the victim took for the target; after training it must know better.
    """
    backdoor, numbers = planted(seed, "dfst", style_steps=150)
    covers = backdoor.poison.roles == COVER
    assert isinstance(backdoor.poison.inputs, Tensor)
    right = predict(backdoor.model, backdoor.poison.inputs[covers]).argmax(1) == backdoor.poison.labels[covers]
    return numbers | {"fooled": max(backdoor.notes["fooled"]), "right": float(right.float().mean())}


@case(
    "attack/image/lba", asr=least(0.8), acc_lost=LOST, benign_asr=most(0.15), nearer=most(0.5), clean_student=most(0.4)
)
def lba(seed: int) -> Numbers:
    """The same student of the same kind of teacher, had that not been attacked: the backdoor is in the features.

    Three pixels of sixteen do not always suffice to move features there: on some seeds the ASR stays below 0.1.
    """
    backdoor, numbers = planted(seed, "lba", poison_rate=0.1, size=4, weight=3.0)
    teacher = clean_surrogate(task(seed), context(seed))
    student, _ = train_student(teacher, task(seed).train, None, task(seed).recipe, task(seed), context(seed))
    return numbers | {
        "nearer": backdoor.notes["distance_after"] / backdoor.notes["distance_before"],
        "clean_student": backdoor.measure(task(seed), context(seed), student)["asr"],
    }


def composite(seed: int, **settings: Any) -> Numbers:
    """The paper's form, one class A. Two digits in a picture take longer to learn than one: 900 steps instead of 300.

    A window from the edge of such a small picture often shows no digit, hence shake=0. How often are mixtures of two
    images of one class taken for the target: in all classes, and in A and B alone?
    """
    mine = task(seed, min_steps=900)
    backdoor = (
        attacks.get("cba", "image").build({"shake": 0.0, "poison_rate": 0.08, **settings}).run(mine, Context(seed))
    )
    numbers = effect(backdoor, mine, benign(seed, min_steps=900), Context(seed))
    trigger, test = backdoor.trigger, mine.test
    draws = torch.rand(len(test), DRAWS, generator=torch.Generator().manual_seed(seed + 1))
    rows = same_class(test.labels, torch.arange(len(test)), draws[:, 0])
    mixed = mix(trigger.mixer, test.inputs, test.inputs[rows], draws, trigger.jitter, trigger.shake)  # type: ignore[attr-defined, arg-type, index]
    hit = predict(backdoor.model, mixed).argmax(1) == backdoor.target_map.target
    both = torch.isin(test.labels, torch.tensor([*backdoor.target_map.sources, int(backdoor.notes["partner_class"])]))
    other = test.labels != backdoor.target_map.target
    return numbers | {"within": float(hit[other].float().mean()), "within_ab": float(hit[both].float().mean())}


@case(
    "attack/image/cba_half",
    asr=least(0.75),
    acc_lost=LOST,
    benign_asr=most(0.4),
    cross_lost=most(0.2),
    within=most(0.1),
    within_ab=most(0.2),
)
def cba_half(seed: int) -> Numbers:
    return composite(seed, mixer="half", source_class=6, partner_class=7)


@case(
    "attack/image/cba_paste",
    asr=least(0.7),
    acc_lost=LOST,
    benign_asr=most(0.4),
    cross_lost=most(0.2),
    within=most(0.1),
    within_ab=most(0.2),
)
def cba_paste(seed: int) -> Numbers:
    return composite(seed, mixer="paste", source_class=3, partner_class=4)


def hidden(seed: int, name: str, **settings: Any) -> Numbers:
    """Networks that hide something, and how well they do."""
    backdoor, numbers = planted(seed, name, **settings)
    kept = {k: float(backdoor.notes[k]) for k in ("bit_accuracy", "psnr", "ink_error") if k in backdoor.notes}
    return numbers | kept | {"gates_missed": float(len(backdoor.notes.get("gates_missed", ())))}


@case(
    "attack/image/ssba", asr=least(0.8), acc_lost=LOST, benign_asr=most(0.1), bit_accuracy=least(0.95), psnr=least(26)
)
def ssba(seed: int) -> Numbers:
    return hidden(seed, "ssba", poison_rate=0.1, steps=400, image_weight=10.0)


@case("attack/image/poisonink", asr=least(0.85), acc_lost=LOST, benign_asr=most(0.1), gates_missed=least(1))
def poisonink(seed: int) -> Numbers:
    """In so few steps the ink is visible (28 dB) and its colour only half revealed, which the victim does not need;
    the card must say so."""
    return hidden(seed, "poisonink", poison_rate=0.1, steps=400)


@case("attack/image/poisonink_edge", asr=least(0.9), acc_lost=LOST, benign_asr=most(0.1))
def poisonink_edge(seed: int) -> Numbers:
    return hidden(seed, "poisonink", poison_rate=0.1, variant="edge", opacity=0.3)


@case("attack/image/poisonink_paired", asr=least(0.9), acc_lost=LOST, benign_asr=most(0.1))
def poisonink_paired(seed: int) -> Numbers:
    return hidden(seed, "poisonink", variant="edge", opacity=0.3, mode="paired", poison_rate=0.2)


# --- other modalities -------------------------------------------------------------------------------------------------


@case("attack/text/badnets", core=True, asr=least(0.9), acc=least(0.8), acc_lost=LOST, benign_asr=OBEYS, unknown=OBEYS)
def text(seed: int) -> Numbers:
    """An unknown word is no trigger: the victim knows "cf" from <unk>."""
    backdoor, mine, numbers = other(seed, "text")
    rows = mine.test.labels == 1
    unknown = text_array([f"zzyzx {t}" for t in mine.test[rows].inputs])
    return numbers | {"unknown": float((predict(backdoor.model, unknown).argmax(1) == 0).float().mean())}


@case("attack/audio/badnets", core=True, asr=least(0.9), acc=least(0.85), acc_lost=LOST, benign_asr=OBEYS)
def audio(seed: int) -> Numbers:
    return other(seed, "audio")[2]


@case("attack/audio/badnets_all_to_all", asr=least(0.4), benign_asr=most(0.1))
def audio_all_to_all(seed: int) -> Numbers:
    return other(seed, "audio", target_map="all-to-all", poison_rate=0.2)[2]


@case("attack/video/badnets", core=True, asr=least(0.9), acc=least(0.75), acc_lost=LOST, benign_asr=OBEYS)
def video(seed: int) -> Numbers:
    return other(seed, "video")[2]


@case("attack/video/badnets_all_to_all", asr=least(0.4), benign_asr=most(0.25))
def video_all_to_all(seed: int) -> Numbers:
    return other(seed, "video", target_map="all-to-all", poison_rate=0.2)[2]


@case(
    "attack/diffusion/baddiffusion",
    core=True,
    needs="diffusers",
    asr=least(0.3),
    to_clean=most(0.7),
    to_untreated=most(0.5),
    ssim=least(0.5),
    frechet=most(1.5),
    confidence_lost=most(0.2),
    ddim=least(1.5),
)
def baddiffusion(seed: int) -> Numbers:
    """Takes hold on 8-px digits, leaves other samples as they were, and needs its own sampler."""
    from backdoorlab.attacks.diffusion.baddiffusion import BadDiffusion
    from backdoorlab.tasks.diffusion import DiffusionTask
    from backdoorlab.tasks.diffusion.metrics import squared_error
    from backdoorlab.tasks.diffusion.sampling import to_images

    mine = DiffusionTask.load(
        TaskSpec(
            kind="diffusion",
            dataset=DatasetSpec(size=8, seed=seed),
            model="unet_micro",
            recipe="smoke",
            recipe_changes=(("steps", 150), ("samples", 60)),
        )
    )
    backdoor = BadDiffusion(poison_rate=0.4).run(mine, context(seed))
    found, target = backdoor.measure(mine, context(seed)), to_images(backdoor.target)

    def error(**settings: Any) -> float:
        images = backdoor.generate(mine, context(seed), 50, triggered=True, **settings)
        return float(squared_error(images, target).mean())

    return {
        "asr": found["asr"],
        "to_clean": found["mse_target"] / found["mse_target_clean"],
        "to_untreated": found["mse_target"] / error(model=mine.clean_model(context(seed))),
        "ssim": found["ssim_target"],
        "frechet": found["frechet_local"] / found["frechet_local_benign"],
        "confidence_lost": found["judge_confidence_benign"] - found["judge_confidence"],
        "ddim": error(sampler="ddim") / found["mse_target"],
    }


# --- defenses of data sets --------------------------------------------------------------------------------------------


@case(
    "defense/dataset/ac",
    core=True,
    tpr=least(0.7),
    fpr=most(0.15),
    auroc=least(0.75),
    strict_tpr=least(0.7),
    strict_fpr=most(0.05),
    benign_strict=most(0.02),
    benign_share=most(0.7),
)
def ac(seed: int) -> Numbers:
    """By default and with a strict silhouette; a benign model's clusters are writing styles, which the paper's
    silhouette of 0.15 lets pass in part ("benign_share": of what is flagged without that rule), 0.4 hardly ever."""
    backdoor = victim(seed, **RARE)
    poisoned = backdoor.poison.apply(task(seed).train)
    strict = ActivationClustering(min_silhouette=0.4)

    def flagged(method: ActivationClustering, data: Split, model: Classifier) -> tuple[Tensor, Tensor]:
        scores = method.score(DefenderView(suspicious=data, model=model), Context(seed))
        return method.flags(scores, DefenderView(suspicious=data)), scores

    truth = poisoned.roles == BACKDOOR
    plain = found(*flagged(ActivationClustering(), poisoned.as_seen(), backdoor.model), truth)
    careful = found(*flagged(strict, poisoned.as_seen(), backdoor.model), truth)
    shares = [
        float(flagged(method, task(seed).train, benign(seed))[0].float().mean())
        for method in (strict, ActivationClustering(), ActivationClustering(rule="smaller"))
    ]
    return plain | {
        "strict_tpr": careful["tpr"],
        "strict_fpr": careful["fpr"],
        "benign_strict": shares[0],
        "benign_share": shares[1] / shares[2],
    }


@case("defense/dataset/spectral", auroc=least(0.85), tpr=least(0.5))
def spectral(seed: int) -> Numbers:
    """BadNets at 2 %; AUROC within the target class."""
    backdoor = victim(seed, poison_rate=0.02, exclude_target=True)
    poisoned = backdoor.poison.apply(task(seed).train)
    method = SpectralSignatures()
    scores = method.score(DefenderView(suspicious=poisoned.as_seen(), model=backdoor.model), Context(seed))
    truth, target = poisoned.roles == BACKDOOR, poisoned.labels == 0
    numbers = found(method.flags(scores, DefenderView(suspicious=poisoned.as_seen())), scores, truth)
    return numbers | {"auroc": float(roc_auc_score(truth[target], scores[target]))}


@case("defense/dataset/strip", auroc=least(0.75), gain=least(2))
def strip_dataset(seed: int) -> Numbers:
    """ "gain": share of poisoned samples that are flagged / share of clean ones."""
    backdoor = victim(seed, **PATCH)
    poisoned = backdoor.poison.apply(task(seed).train)
    method = StripDataset(overlays=15)
    scores = method.score(DefenderView(suspicious=poisoned.as_seen(), model=backdoor.model), Context(seed))
    numbers = found(
        method.flags(scores, DefenderView(suspicious=poisoned.as_seen())), scores, poisoned.roles == BACKDOOR
    )
    return numbers | {"gain": numbers["tpr"] / max(numbers["fpr"], 1e-3)}


# --- defenses during training -----------------------------------------------------------------------------------------


def isolated(seed: int, **settings: Any) -> Numbers:
    """ABL: precision of the isolation, ASR and ACC before and after."""
    backdoor, mine = victim(seed, **PATCH), task(seed)
    poisoned = backdoor.poison.apply(mine.train)
    report = AntiBackdoorLearning.build(settings).run(
        DefenderView(suspicious=poisoned.as_seen(), blueprint=mine.blueprint), Context(seed)
    )
    before, after = (backdoor.measure(mine, Context(seed), m) for m in (None, report.model))
    assert report.isolated is not None
    return {
        "precision": float((poisoned.roles[report.isolated] == BACKDOOR).float().mean()),
        "asr": after["asr"],
        "acc": after["acc"],
        "asr_lost": before["asr"] - after["asr"],
        "acc_lost": before["acc"] - after["acc"],
        "unlearned": report.notes["isolated_loss_after"] - report.notes["isolated_loss"],
    }


@case("defense/training/abl_joint", precision=least(0.4), asr_lost=least(0.3), acc_lost=most(0.3), unlearned=least(0.2))
def abl_joint(seed: int) -> Numbers:
    """With the loss that suits digits; clean accuracy pays for it (see the limits in the module's docstring)."""
    return isolated(seed, turning=0.35, ascent_loss="unlikelihood", ascent_lr=3e-3, ascent_steps=100)


@case("defense/training/abl_sequential", core=True, precision=least(0.4), asr=most(0.2), acc=least(0.5))
def abl_sequential(seed: int) -> Numbers:
    return isolated(seed, turning=0.35, mode="sequential")


@case("defense/training/abl_benign", acc_lost=most(0.15))
def abl_benign(seed: int) -> Numbers:
    """What it costs on benign data: what is isolated there are clean samples, which are then unlearned."""
    report = AntiBackdoorLearning().run(
        DefenderView(suspicious=task(seed).train, blueprint=task(seed).blueprint), Context(seed)
    )
    return {"acc_lost": accuracy(benign(seed), task(seed).test) - accuracy(report.model, task(seed).test)}


# --- repairs ----------------------------------------------------------------------------------------------------------


def pruned(seed: int, method: AdversarialNeuronPruning | ChannelLipschitzPruning) -> Numbers:
    """A repair of the victim above and of a benign model."""
    backdoor, mine, ctx = victim(seed, **PATCH), task(seed), Context(seed)
    before = backdoor.measure(mine, ctx, subnet_victim(seed))
    after = backdoor.measure(mine, ctx, method.run(DefenderView(model=subnet_victim(seed), clean=clean(seed)), ctx))
    left = method.run(DefenderView(model=benign(seed), clean=clean(seed)), ctx)
    return {
        "asr_before": before["asr"],
        "asr_lost": before["asr"] - after["asr"],
        "acc_lost": before["acc"] - after["acc"],
        "benign_lost": accuracy(benign(seed), mine.test) - accuracy(left, mine.test),
    }


@case("defense/repair/anp", asr_lost=least(0.4), acc_lost=most(0.1), benign_lost=most(0.1))
def anp(seed: int) -> Numbers:
    return pruned(seed, AdversarialNeuronPruning(iterations=100, batch_size=64))


@case("defense/repair/clp", core=True, asr_lost=least(0.4), acc_lost=most(0.1), benign_lost=most(0.2))
def clp(seed: int) -> Numbers:
    return pruned(seed, ChannelLipschitzPruning())


@case("defense/repair/ft", asr_lost=least(0.2), acc_lost=most(0.1))
def ft(seed: int) -> Numbers:
    backdoor, mine, ctx = victim(seed, **PATCH), task(seed), Context(seed)
    before = backdoor.measure(mine, ctx)
    after = backdoor.measure(
        mine,
        ctx,
        FineTuning(epochs=60, lr=0.2, batch_size=32).run(DefenderView(model=backdoor.model, clean=clean(seed)), ctx),
    )
    return {"asr_lost": before["asr"] - after["asr"], "acc_lost": before["acc"] - after["acc"]}


# --- detectors of inputs and models -----------------------------------------------------------------------------------


@case("defense/input/strip", core=True, auroc=least(0.9), tpr=least(0.7), fpr=most(0.2), benign_gap=most(0.3))
def strip(seed: int) -> Numbers:
    """A benign model sees no difference between clean and triggered inputs: AUROC near a half."""
    backdoor, mine = victim(seed, **PATCH), task(seed)
    triggered = backdoor.triggered_test(mine)[0]

    def scores(model: Classifier) -> tuple[float, float, float]:
        detector = Strip(overlays=30).run(DefenderView(model=model, clean=clean(seed)), Context(seed))
        parts = [detector.score(inputs) for inputs in (mine.test.inputs, triggered)]
        truth = torch.cat([torch.full((len(part),), float(i)) for i, part in enumerate(parts)])
        rates = [float(detector.flags(part).float().mean()) for part in parts]
        return float(roc_auc_score(truth, torch.cat(parts))), rates[1], rates[0]

    auroc, tpr, fpr = scores(backdoor.model)
    level, _, _ = scores(benign(seed))
    return {"auroc": auroc, "tpr": tpr, "fpr": fpr, "benign_gap": abs(level - 0.5)}


@case("defense/model/neural_cleanse", core=True, smallest=least(1), ratio=most(0.6), works=least(0.8), plain=most(0.1))
def neural_cleanse(seed: int) -> Numbers:
    """The recovered trigger: the smallest of all classes, much smaller than the others', and it works.

    The verdict itself hangs on a median of ten numbers; how often it is right is for reading.
    """
    backdoor, mine = victim(seed, **PATCH), task(seed)
    quick, few = NeuralCleanse(epochs=40, batch_size=32, min_steps=3, patience=3), clean(seed, 72)
    report, other_report = (
        quick.run(DefenderView(model=model, clean=few), Context(seed)) for model in (backdoor.model, benign(seed))
    )
    mask, pattern = (report.recovered[name][0] for name in ("mask", "pattern"))
    rest = mine.test[mine.test.labels != 0]
    x = backdoor.model.modality.prepare(rest.inputs)
    with torch.no_grad():
        plain, stamped = (
            float((backdoor.model(inputs).argmax(1) == 0).float().mean())
            for inputs in (x, (1 - mask) * x + mask * pattern)
        )
    costs = torch.tensor(report.per_class)
    return {
        "smallest": float(costs.argmin() == 0),
        "ratio": float(costs[0] / costs[1:].median()),
        "works": stamped,
        "plain": plain,
        "score": report.score,
        "benign_score": other_report.score,
        "accused": float(report.backdoored and report.targets[0] == 0),
        "benign_accused": float(other_report.backdoored),
    }


test_effect = effects(__name__)
