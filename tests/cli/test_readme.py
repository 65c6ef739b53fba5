"""What the README counts is what the registries hold, and what it prints is what the commands are."""

from __future__ import annotations

import re
from pathlib import Path

from backdoorlab.attacks import attacks
from backdoorlab.cli.quickstart import RATE, STEPS, quickstart_command
from backdoorlab.defenses import defenses

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
WORDS = " ".join(README.split())
ONE_EACH = ("text", "audio", "video", "diffusion")


def test_counts_are_those_of_the_registries() -> None:
    images = len(
        [name for name in attacks.names("image") if attacks.get(name, "image").__module__.startswith("backdoorlab.")]
    )
    own = {cls.name for cls in defenses if cls.__module__.startswith("backdoorlab.")}
    assert f"models: {images} attacks on images and one each on text, audio, video and diffusion models, and" in WORDS
    assert all(len(attacks.names(modality)) == 1 for modality in ONE_EACH), "then the README must say more"
    assert f"and {len(own)} defenses." in WORDS
    for count in re.findall(r"(\d+) image attacks", WORDS):
        assert int(count) == images


def test_the_tour_in_the_readme_is_the_tour() -> None:
    sample = README.split("backdoorlab quickstart: BadNets")[1].split("```")[0]
    for step in STEPS:
        assert re.search(rf"^backdoored\s+{step.name}\s", sample, re.MULTILINE), step.name
        assert step.words in sample
    told = f"1 training digit in {1 / RATE:.0f}"
    assert told in sample
    assert told in " ".join((quickstart_command.__doc__ or "").split())
