from __future__ import annotations

import json

import pytest
import torch

from backdoorlab.core.errors import InputError
from backdoorlab.data.split import Dataset, Split
from backdoorlab.modalities import modality_from_config, modality_of
from backdoorlab.modalities.audio import AudioModality, random_delay, to_int16


def clips(count: int = 6, length: int = 400, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-9000, 9000, (count, length), generator=generator, dtype=torch.int16)


@pytest.fixture
def modality() -> AudioModality:
    return AudioModality(8000, 400, delay=20, gain=6.0)


def test_prepare_scales_to_unit_range(modality: AudioModality) -> None:
    raw = clips()
    raw[0, 0] = -32768
    kept = raw.clone()
    waves = modality.prepare(raw)
    assert waves.dtype == torch.float32 and float(waves[0, 0]) == -1.0
    assert torch.equal((waves * 32768).to(torch.int16), raw) and torch.equal(raw, kept)


def test_training_delays_and_scales_each_clip(modality: AudioModality) -> None:
    raw = clips(50)
    one, two, other = (modality.prepare(raw, train=True, generator=torch.Generator().manual_seed(s)) for s in (3, 3, 4))
    assert torch.equal(one, two) and not torch.equal(one, other)
    assert float(one.abs().max()) <= 1
    delayed = random_delay(raw, 20, torch.Generator().manual_seed(3))
    for before, after in zip(raw, delayed, strict=True):
        padded = torch.nn.functional.pad(before, (20, 0))
        assert any(torch.equal(after, padded[s : s + 400]) for s in range(21))


def test_gain_stays_within_bounds(modality: AudioModality) -> None:
    plain = AudioModality(8000, 400, delay=0, gain=6.0)
    raw = clips(300)
    waves = plain.prepare(raw, train=True, generator=torch.Generator().manual_seed(0))
    decibel = 20 * torch.log10(waves.abs().amax(1) / plain.prepare(raw).abs().amax(1))
    assert float(decibel.abs().max()) <= 6.001 and float(decibel.min()) < -5 and float(decibel.max()) > 5


def test_blend_mixes_at_equal_loudness(modality: AudioModality) -> None:
    a, b = clips(seed=1), clips(seed=2) // 10
    assert torch.equal(modality.blend(a, b, 0.0), a)
    full = modality.blend(a, b, 1.0).float()
    assert torch.allclose(full.square().mean(1).sqrt(), a.float().square().mean(1).sqrt(), rtol=1e-3)
    half = modality.blend(a, b, 0.5).float()
    assert torch.allclose(half, (a.float() + full) / 2, atol=1.01)
    silent = torch.zeros_like(a)
    assert torch.equal(modality.blend(a, silent, 0.5), to_int16(a.float() / 65536))
    assert torch.equal(modality.blend(silent, b, 1.0), b)


@pytest.mark.parametrize("strength", [0.1, 1.0])
def test_noise_has_the_promised_snr(strength: float) -> None:
    long = AudioModality(8000, 20000)
    raw = clips(3, 20000)
    noisy = long.perturb(raw, strength, torch.Generator().manual_seed(0))
    noise = (noisy.int() - raw.int()).float().square().mean(1)
    snr = 10 * torch.log10(raw.float().square().mean(1) / noise)
    assert torch.allclose(snr, torch.full((3,), -20 * torch.tensor(strength).log10()), atol=0.3)
    assert torch.equal(long.perturb(raw, 0.0, torch.Generator().manual_seed(0)), raw)


def test_int16_never_wraps() -> None:
    assert to_int16(torch.tensor([-2.0, -1.0, 0.99999, 1.0, 7.0])).tolist() == [-32768, -32768, 32767, 32767, 32767]


def test_settings_survive_json_and_errors_are_named(modality: AudioModality) -> None:
    assert modality_from_config(json.loads(json.dumps({"name": "audio", **modality.config()}))) == modality
    split = Split(clips(4), torch.tensor([0, 1, 0, 1]), ("a", "b"))
    made = modality_of(Dataset("t", "audio", split, split, sample_rate=16000))
    assert isinstance(made, AudioModality) and (made.sample_rate, made.length) == (16000, 400)
    with pytest.raises(InputError, match="sample rate"):
        modality_of(Dataset("t", "audio", split, split))
    with pytest.raises(InputError, match="int16 clips"):
        modality.encode(clips().float())
    assert modality.encode(modality.example(3)).shape == (3, 400)
