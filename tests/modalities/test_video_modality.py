from __future__ import annotations

import json

import pytest
import torch

from backdoorlab.core.errors import InputError
from backdoorlab.data.split import Dataset, Split
from backdoorlab.modalities import modality_from_config, modality_of
from backdoorlab.modalities.image import ImageModality
from backdoorlab.modalities.video import VideoModality


def clips(count: int = 5, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 4, 2, 16, 12), generator=generator, dtype=torch.uint8)


@pytest.fixture
def modality() -> VideoModality:
    return VideoModality(4, 2, 16, 12, (0.5, 0.4), (0.2, 0.3), crop=2)


def test_prepare_puts_channels_first(modality: VideoModality) -> None:
    raw = clips()
    kept = raw.clone()
    out = modality.prepare(raw)
    assert out.shape == (5, 2, 4, 16, 12) and out.dtype == torch.float32
    for t in range(4):
        assert torch.allclose(out[:, :, t], raw[:, t].float() / 255)
    assert torch.equal(raw, kept)


def test_crop_and_flip_are_shared_by_all_frames(modality: VideoModality) -> None:
    raw = clips(30)
    still = raw[:, :1].expand(-1, 4, -1, -1, -1).contiguous()
    flipping = VideoModality(4, 2, 16, 12, crop=2, flip=True)
    for chosen in (modality, flipping):
        out = chosen.prepare(still, train=True, generator=torch.Generator().manual_seed(0))
        assert all(torch.equal(out[:, :, 0], out[:, :, t]) for t in range(4))
        assert not torch.equal(out, chosen.prepare(still))
        again = chosen.prepare(still, train=True, generator=torch.Generator().manual_seed(0))
        assert torch.equal(out, again)
    padded = torch.nn.functional.pad(raw[0, 0], (2,) * 4).float() / 255
    windows = [padded[:, i : i + 16, j : j + 12] for i in range(5) for j in range(5)]
    first = modality.prepare(still, train=True, generator=torch.Generator().manual_seed(0))[0, :, 0]
    assert any(torch.allclose(first, w) for w in windows)


def test_blend_and_noise_work_frame_by_frame(modality: VideoModality) -> None:
    a, b = clips(seed=1), clips(seed=2)
    image = ImageModality(2, 16, 12)
    mixed = modality.blend(a, b, 0.3)
    assert isinstance(mixed, torch.Tensor)
    assert all(torch.equal(mixed[:, t], image.blend(a[:, t], b[:, t], 0.3)) for t in range(4))
    grey = torch.full((8, 4, 2, 16, 12), 128, dtype=torch.uint8)
    noise = modality.perturb(grey, 0.2, torch.Generator().manual_seed(0)).float() - 128
    assert float(noise.std()) == pytest.approx(25.5, rel=0.05)
    assert not torch.equal(noise[:, 0], noise[:, 1])


def test_settings_survive_json_and_errors_are_named(modality: VideoModality) -> None:
    assert modality_from_config(json.loads(json.dumps({"name": "video", **modality.config()}))) == modality
    split = Split(clips(4), torch.tensor([0, 1, 0, 1]), ("a", "b"))
    made = modality_of(Dataset("t", "video", split, split))
    assert isinstance(made, VideoModality)
    assert (made.frames, made.channels, made.height, made.width, made.crop) == (4, 2, 16, 12, 2)
    with pytest.raises(InputError, match="uint8 clips of shape"):
        modality.encode(clips().transpose(1, 2))
    assert modality.encode(modality.example(3)).shape == (3, 4, 2, 16, 12)
