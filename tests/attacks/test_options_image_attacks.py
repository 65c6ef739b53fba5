"""Options of single image attacks: what a patch looks like, files of the user's, who may be poisoned."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_contract_image_attacks import check_roles, make, planted, reload, tiny_task
from torch import Tensor

from backdoorlab.attacks import attacks
from backdoorlab.attacks.common.batch_poison import BatchPoisoner
from backdoorlab.attacks.image.adap_patch import draw_patches
from backdoorlab.attacks.image.bpp import QuantizeTrigger
from backdoorlab.attacks.image.input_aware import InputAware
from backdoorlab.attacks.image.refool import ReflectionTrigger
from backdoorlab.attacks.image.trojannn import draw_mask
from backdoorlab.attacks.targets import TargetMap
from backdoorlab.core.errors import InputError
from backdoorlab.training import Context

RGB, GREY = (3, 32, 32), (1, 16, 16)


def patch_of(shape: tuple[int, int, int], seed: int = 0, **settings: object) -> tuple[Tensor, Tensor]:
    trigger = make(attacks.get("badnets", "image"), **settings).make_trigger(tiny_task(shape), Context(seed=seed))  # type: ignore[attr-defined]
    return trigger.pattern, trigger.mask


def save(path: Path, pixels: np.ndarray) -> str:
    Image.fromarray(pixels.astype(np.uint8)).save(path)
    return str(path)


# --- BadNets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("position", "rows", "columns"),
    [
        ("bottom-right", (25, 29), (25, 29)),
        ("bottom-left", (25, 29), (3, 7)),
        ("top-right", (3, 7), (25, 29)),
        ("top-left", (3, 7), (3, 7)),
    ],
)
def test_badnets_places(position: str, rows: tuple[int, int], columns: tuple[int, int]) -> None:
    _, mask = patch_of(RGB, size=4, offset=3, position=position)
    for i in range(32):
        for j in range(32):
            assert bool(mask[i, j]) == (rows[0] <= i < rows[1] and columns[0] <= j < columns[1])


def test_badnets_colours() -> None:
    pattern, mask = patch_of(RGB, rgb="255, 0,17", pattern="checker", dark=1, size=3, position="top-left")
    for i in range(3):
        for j in range(3):
            assert pattern[:, i, j].tolist() == ([255, 0, 17] if (i + j) % 2 == 0 else [1, 1, 1])
    assert int(mask.sum()) == 9
    pattern, mask = patch_of(RGB, rgb=(9, 8, 7))
    assert pattern[:, mask].unique(dim=1).flatten().tolist() == [9, 8, 7]
    for wrong in ((1, 2), (0, 0, 256), (-1, 0, 0)):
        with pytest.raises(InputError, match="badnets: rgb must be three numbers from 0 to 255"):
            make(attacks.get("badnets", "image"), rgb=wrong)
    with pytest.raises(InputError, match="rgb gives 3 values, but the images have 1 channel; use color"):
        patch_of(GREY, rgb=(1, 2, 3))


def test_badnets_random_patch_has_a_seed() -> None:
    random = {"pattern": "random", "size": 5}
    first, again, other = (patch_of(RGB, run, **random)[0] for run in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other), "without a seed of its own the patch follows the run"
    one, same, two = (patch_of(RGB, run, pattern_seed=s, **random)[0] for run, s in ((0, 7), (1, 7), (0, 8)))
    assert torch.equal(one, same)
    assert not torch.equal(one, two)
    assert len(one[:, -5:, -5:].unique()) > 40


def test_badnets_takes_a_picture(tmp_path: Path) -> None:
    path = save(tmp_path / "patch.png", np.arange(48).reshape(4, 4, 3) * 5)
    pattern, mask = patch_of(RGB, patch=path, size=4, offset=1)
    assert torch.equal(
        pattern[:, 27:31, 27:31], (torch.arange(48).reshape(4, 4, 3) * 5).permute(2, 0, 1).to(torch.uint8)
    )
    assert int(mask.sum()) == 16
    assert bool(mask[27:31, 27:31].all())
    with pytest.raises(InputError, match="found no image file nowhere"):
        patch_of(RGB, patch="nowhere")


# --- files of the user's ----------------------------------------------------------------------------------------------


def test_adap_patch_takes_four_pictures(tmp_path: Path) -> None:
    paths = [save(tmp_path / f"{n}.png", np.full((6, 6, 3), 40 * n + 10)) for n in range(4)]
    pictures, masks = draw_patches(3, 32, 32, 0, tuple(paths))
    _, drawn = draw_patches(3, 32, 32, 0)
    for n in range(4):
        assert pictures[n][:, masks[n]].unique().tolist() == [40 * n + 10]
        assert bool((masks[n] | ~drawn[n]).all()), "a picture fills the square that the drawn patch lies in"
    attack = make(attacks.get("adap_patch", "image"), patches=",".join(paths))
    images = tiny_task(RGB).test.inputs
    stamped = attack.make_trigger(tiny_task(RGB), Context())(images)  # type: ignore[attr-defined]
    both = torch.where(masks[1], pictures[1], torch.where(masks[0], pictures[0], images))
    assert torch.equal(stamped, both)
    with pytest.raises(InputError, match="patches must be four image files, got 1"):
        make(attacks.get("adap_patch", "image"), patches=paths[0])


def test_adap_blend_takes_a_picture(tmp_path: Path) -> None:
    path = save(tmp_path / "key.png", np.full((8, 8, 3), 90))
    trigger = make(attacks.get("adap_blend", "image"), key=path).make_trigger(tiny_task(GREY), Context())  # type: ignore[attr-defined]
    assert trigger.keys.unique().tolist() == [90]


def test_trojannn_takes_a_mask(tmp_path: Path) -> None:
    mask = np.zeros((16, 16))
    mask[2:5, 3:9] = 255
    attack = make(attacks.get("trojannn", "image"), mask=save(tmp_path / "mask.png", mask))
    context, task = Context(), tiny_task(GREY)
    trigger = attack.make_trigger(task, context)  # type: ignore[attr-defined]
    assert np.array_equal(trigger.mask.numpy(), mask == 255)
    # The optimised picture of another outline, cached in the same place, must not be taken for this one's.
    apple = make(attacks.get("trojannn", "image")).make_trigger(task, context)  # type: ignore[attr-defined]
    assert torch.equal(apple.mask, draw_mask("apple", 16, 16))
    assert bool(apple.pattern[:, apple.mask].any())
    black = make(attacks.get("trojannn", "image"), mask=save(tmp_path / "black.png", np.zeros((16, 16))))
    with pytest.raises(InputError, match="has no white pixel at 16x16"):
        black.make_trigger(task, context)  # type: ignore[attr-defined]


def reflect(task_shape: tuple[int, int, int], **settings: object) -> ReflectionTrigger:
    attack = make(attacks.get("refool", "image"), **settings)
    trigger = attack.make_trigger(tiny_task(task_shape), Context())  # type: ignore[attr-defined]
    assert isinstance(trigger, ReflectionTrigger)
    return trigger


def test_refool_takes_a_folder(tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    for n in range(5):
        save(tmp_path / ("more" if n % 2 else ".") / f"{n}.png", np.full((20 + n, 30, 3), 50 * n))
    (tmp_path / "list.txt").write_text("no picture, no matter")
    attack = make(attacks.get("refool", "image"), reflections=str(tmp_path))
    used, held = (attack._trigger(tiny_task(RGB), part).pool for part in ("attack", "held out"))  # type: ignore[attr-defined]
    assert used.shape == (3, *RGB)
    assert held.shape == (2, *RGB)
    levels = [sorted(pool.flatten(1).unique().tolist()) for pool in (used, held)]
    assert sorted(levels[0] + levels[1]) == [0, 50, 100, 150, 200], "every image is in one of both pools"
    trigger, images = reflect(RGB, reflections=str(tmp_path)), tiny_task(RGB).test.inputs
    assert torch.equal(trigger.pool, used)
    assert torch.equal(reload(trigger)(images), trigger(images))  # type: ignore[arg-type]
    assert not torch.equal(trigger(images), reflect(RGB)(images))  # type: ignore[arg-type]
    assert len(reflect(RGB, reflections=str(tmp_path), pool=2).pool) == 2
    backdoor = attack.run(tiny_task(RGB), Context())
    assert 0 <= backdoor.notes["asr_held_out"] <= 1


def test_refool_says_what_is_wrong_with_a_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="found no folder 'no/where'"):
        reflect(GREY, reflections="no/where")
    with pytest.raises(InputError, match="has no image file"):
        reflect(GREY, reflections=str(tmp_path))
    save(tmp_path / "a.png", np.zeros((5, 5, 3)))
    with pytest.raises(InputError, match="has one image; at least two are needed"):
        reflect(GREY, reflections=str(tmp_path))
    (tmp_path / "b.jpg").write_text("words")
    with pytest.raises(InputError, match=r"cannot read image .*b\.jpg: it is of none of the known formats"):
        reflect(GREY, reflections=str(tmp_path))


# --- who is poisoned --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [cls for cls in attacks if "image" in cls.modalities and cls.label_mode == "clean"])
def test_clean_labels_and_all_to_all_exclude_each_other(cls: type) -> None:
    with pytest.raises(InputError, match=f"{cls.name}: target_map all-to-all needs new labels"):
        cls.build({"target_map": "all-to-all"})


def test_an_instance_with_clean_labels_refuses_all_to_all() -> None:
    attack = make(attacks.get("refool", "image"), clean_label=True)
    object.__setattr__(attack, "target_map", "all-to-all")
    with pytest.raises(InputError, match="refool: target_map all-to-all needs new labels"):
        attack.target_map_for(tiny_task(GREY))


@pytest.mark.parametrize("name", ["badnets", "blended", "wanet", "bpp", "input_aware", "lira"])
def test_all_to_all(name: str) -> None:
    task, attack = tiny_task(GREY), make(attacks.get(name, "image"), target_map="all-to-all")
    backdoor = attack.run(task, Context())
    check_roles(attack, task, backdoor.poison)
    _, wanted, true = backdoor.triggered_test(task)
    assert len(true) == len(task.test)
    assert torch.equal(wanted, (true + 1) % 4)


@pytest.mark.parametrize("rate", [0.25, 0.9])
def test_batches_without_the_target_class(rate: float) -> None:
    images = torch.randint(0, 256, (16, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    labels, indices = torch.arange(16) % 2, torch.arange(16)
    trigger, target_map = QuantizeTrigger(2, False), TargetMap("all-to-one", 0, 2)
    poisoner = BatchPoisoner(trigger, target_map, rate, QuantizeTrigger(4, False), cover_ratio=0.5, exclude_target=True)
    raw, given = poisoner(images, labels, indices, torch.Generator().manual_seed(0))
    count = min(8, int(rate * 16))
    odd = (indices % 2 == 1).nonzero().flatten()
    attacked = odd[:count]
    assert torch.equal(raw[attacked], trigger(images[attacked]))  # type: ignore[arg-type]
    assert given[attacked].tolist() == [0] * count
    rest = torch.ones(16, dtype=torch.bool)
    rest[attacked] = False
    assert torch.equal(given[rest], labels[rest]), "nobody else gets another label, and rows keep their place"
    covered = torch.cat([odd[count:], indices[::2]])[: count // 2]
    changed = (raw != images).flatten(1).any(1).nonzero().flatten()
    assert changed.tolist() == sorted([*attacked.tolist(), *covered.tolist()])


@pytest.mark.parametrize("name", ["wanet", "bpp"])
@pytest.mark.parametrize("poisoning", ["per-batch", "fixed-index"])
def test_training_attacks_spare_the_target_class(name: str, poisoning: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from backdoorlab.training import blueprint as module

    seen: list[tuple[Tensor, Tensor]] = []
    original = module.fit

    def spy(model, split, recipe, *, stamp, **rest):  # type: ignore[no-untyped-def]
        def watching(raw, labels, indices, generator):  # type: ignore[no-untyped-def]
            out = stamp(raw, labels, indices, generator)
            seen.append((labels, out[1]))
            return out

        return original(model, split, recipe, stamp=watching, **rest)

    monkeypatch.setattr(module, "fit", spy)
    attack = make(attacks.get(name, "image"), exclude_target=True, poisoning=poisoning)
    backdoor = attack.run(tiny_task(GREY), Context())
    check_roles(attack, tiny_task(GREY), backdoor.poison)
    relabelled = sum(int((after != before).sum()) for before, after in seen)
    assert relabelled == 12, "a quarter of 48 samples, all of which really change their label"


def test_input_aware_spares_the_target_class() -> None:
    cls = attacks.get("input_aware", "image")
    assert cls is InputAware
    spared = make(cls, exclude_target=True).run(tiny_task(GREY), Context(seed=3))
    check_roles(make(cls, exclude_target=True), tiny_task(GREY), spared.poison)
    assert bool((tiny_task(GREY).train.labels[spared.poison.indices[spared.poison.roles == 1]] != 0).all())
    weights = zip(spared.model.state_dict().values(), planted(cls).model.state_dict().values(), strict=True)
    assert any(not torch.equal(a, b) for a, b in weights), "the option reaches the training loop"
