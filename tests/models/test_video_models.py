from __future__ import annotations

import pytest
import torch

from backdoorlab.modalities.video import VideoModality
from backdoorlab.models import Classifier, build_model


@pytest.mark.parametrize("name", ["cnn3d_small", "r3d_18"])
@pytest.mark.parametrize("channels", [1, 3])
def test_logits_of_a_clip(name: str, channels: int) -> None:
    modality = VideoModality(8, channels, 16, 24)
    model = build_model(name, modality, 4, seed=1).eval()
    clips = torch.rand(2, channels, 8, 16, 24, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(clips)
        assert logits.shape == (2, 4) and bool(logits.isfinite().all())
        assert torch.allclose(model(clips[:1]), logits[:1], atol=1e-4)
        # Time is seen: a clip played backwards differs.
        assert not torch.allclose(model(clips.flip(2)), logits, atol=1e-5)


def test_normalisation_of_clips_is_per_channel() -> None:
    modality = VideoModality(4, 2, 8, 8, mean=(0.5, 0.25), std=(0.2, 0.5))
    model = Classifier(torch.nn.Flatten(), modality, "identity", 512)
    out = model(torch.ones(1, 2, 4, 8, 8)).reshape(2, -1)
    assert torch.allclose(out[0], torch.tensor(2.5)) and torch.allclose(out[1], torch.tensor(1.5))


def test_same_seed_same_weights() -> None:
    one, two, other = (build_model("cnn3d_small", VideoModality(), 4, seed=s).state_dict() for s in (1, 1, 2))
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert not torch.equal(one["net.linear.weight"], other["net.linear.weight"])
