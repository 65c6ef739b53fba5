"""Triggers with a closed form stamp images of any size as if made for it; all others say which size they want."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from attack_tools import make, pictures, reload, tiny_task
from backdoorlab.attacks import PoisoningAttack
from backdoorlab.attacks.common.pictures import key_image, read_picture, resize
from backdoorlab.attacks.triggers.base import Trigger
from backdoorlab.core.errors import InputError
from backdoorlab.training import Context

SMALL, LARGE = (3, 32, 32), (3, 64, 64)
FORMULA = ("sig", "ctrl", "ftrojan", "wanet", "bpp")
"""The attack's own trigger at another size is the same function of the same parameters."""
RESIZED = ("blended", "adap_blend")
"""The stored key is resized."""


def built_at(name: str, shape: tuple[int, int, int]) -> Trigger:
    """The trigger with the same parameters, built on data of that size."""
    attack = make(name)
    if isinstance(attack, PoisoningAttack):
        return attack.make_trigger(tiny_task(shape), Context(seed=3))
    return attack.run(tiny_task(shape), Context(seed=3)).trigger


@pytest.mark.parametrize("other", [LARGE, (3, 29, 47), (3, 33, 32)])
@pytest.mark.parametrize("name", FORMULA)
def test_another_size_is_the_trigger_built_for_it(name: str, other: tuple[int, int, int]) -> None:
    trigger, images = built_at(name, SMALL), pictures(other, 5, 2)
    expected = built_at(name, other)
    for mine in (trigger, reload(trigger)):
        assert torch.equal(mine(images), expected(images))  # type: ignore[arg-type]
    assert not torch.equal(trigger(images), images)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["sig", "ctrl", "ftrojan", *RESIZED])
def test_the_stored_pattern_rules_at_its_own_size(name: str) -> None:
    """At the original size the tensors that were stored are used, to the last bit, whatever the formula would say."""
    trigger = built_at(name, SMALL)
    tensors, config = trigger.state()
    changed = {key: value + (1 if value.dtype == torch.uint8 else 0.25) for key, value in tensors.items()}
    images = pictures(SMALL, 5, 2)
    other = type(trigger).from_state(changed, config)
    assert not torch.equal(other(images), trigger(images))  # type: ignore[arg-type]


@pytest.mark.parametrize("other", [LARGE, (3, 16, 16), (3, 29, 47)])
@pytest.mark.parametrize("name", RESIZED)
def test_a_key_is_resized(name: str, other: tuple[int, int, int], tmp_path: object) -> None:
    """As if the stored key had been a file of the user's and the attack built at that size."""
    trigger, images = built_at(name, SMALL), pictures(other, 5, 2)
    key = trigger.keys[0]  # type: ignore[attr-defined]
    Image.fromarray(key.permute(1, 2, 0).numpy()).save(f"{tmp_path}/key.png")
    attack = make(name, key=f"{tmp_path}/key.png")
    expected = attack.make_trigger(tiny_task(other), Context())  # type: ignore[attr-defined]
    for mine in (trigger, reload(trigger)):
        assert torch.equal(mine(images), expected(images))  # type: ignore[arg-type]
    assert torch.equal(read_picture(f"{tmp_path}/key.png", *other), resize(key[None], *other[1:])[0])


def test_a_resized_key_shows_the_same_picture() -> None:
    """Drawn keys are made of shapes in relative places: resizing one comes close to drawing it at that size."""
    resized, large, other = resize(key_image(3, 32, 32, 0)[None], 64, 64)[0], *(key_image(3, 64, 64, n) for n in (0, 1))
    rows = torch.stack([resized.flatten(), large.flatten(), other.flatten()]).float()
    alike, unlike = torch.corrcoef(rows)[0, 1:].tolist()
    assert alike > 0.7
    assert unlike < 0.3


def test_a_noise_key_is_not_resized() -> None:
    trigger = make("blended", pattern="noise").make_trigger(tiny_task(SMALL), Context())  # type: ignore[attr-defined]
    with pytest.raises(InputError, match=r"made for images of shape \(3, 32, 32\), got \(3, 64, 64\)"):
        trigger(pictures(LARGE, 5, 2))


@pytest.mark.parametrize("name", ["sig", "ctrl", "ftrojan", *RESIZED])
def test_channels_must_fit(name: str) -> None:
    with pytest.raises(InputError, match="made for images with 3 channels, got 1"):
        built_at(name, SMALL)(pictures((1, 64, 64), 5, 2))


def test_sizes_that_a_formula_cannot_serve() -> None:
    sig = built_at("sig", SMALL)
    with pytest.raises(InputError, match="6 periods cannot be drawn with 12 columns"):
        sig(pictures((3, 32, 12), 5, 2))
    windows = make("ftrojan", window=32).make_trigger(tiny_task(SMALL), Context())  # type: ignore[attr-defined]
    with pytest.raises(InputError, match="a window of 32 px does not fit an image of 28x40"):
        windows(pictures((3, 28, 40), 5, 2))
