from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.signal import stft

from backdoorlab.core.errors import InputError
from backdoorlab.modalities.audio import AudioModality
from backdoorlab.models import build_model
from backdoorlab.models.audio import LogMel, mel_matrix

NAMES = ("audio_cnn", "xvector", "audio_lstm", "m5")


def slow_mel(bands: int, n_fft: int, rate: int) -> np.ndarray:
    """Triangles written down one weight at a time."""

    def hertz(mel: float) -> float:
        return 700 * (10 ** (mel / 2595) - 1)

    top = 2595 * math.log10(1 + rate / 2 / 700)
    out = np.zeros((n_fft // 2 + 1, bands))
    for band in range(bands):
        left, middle, right = (hertz(top * (band + i) / (bands + 1)) for i in range(3))
        for k in range(n_fft // 2 + 1):
            f = k * rate / n_fft
            if left < f <= middle:
                out[k, band] = (f - left) / (middle - left)
            elif middle < f < right:
                out[k, band] = (right - f) / (right - middle)
    return out


@pytest.mark.parametrize(("bands", "n_fft", "rate"), [(40, 256, 8000), (40, 512, 16000), (64, 1024, 22050)])
def test_mel_matrix(bands: int, n_fft: int, rate: int) -> None:
    made = mel_matrix(bands, n_fft, rate)
    assert np.allclose(made.numpy(), slow_mel(bands, n_fft, rate), atol=1e-6)
    assert float(made.max()) <= 1 and float(made.min()) == 0


@pytest.mark.parametrize("rate", [8000, 16000])
def test_log_mel_equals_scipy(rate: int) -> None:
    front = LogMel(rate)
    wave = torch.randn(2, rate // 2, generator=torch.Generator().manual_seed(0)) * 0.1
    length, hop = round(rate * 0.025), round(rate * 0.010)
    # scipy pads short windows with zeros at the end, torch on both sides: give it the padded window.
    before = (front.n_fft - length) // 2
    window = np.zeros(front.n_fft)
    window[before : before + length] = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(length) / length)
    _, _, spectrum = stft(
        wave.numpy().astype(np.float64),
        rate,
        window,
        front.n_fft,
        front.n_fft - hop,
        boundary="zeros",
        padded=False,
        scaling="spectrum",
    )
    power = np.abs(spectrum * window.sum()) ** 2
    log = np.log(slow_mel(40, front.n_fft, rate).T @ power + 1e-6)
    expected = (log - log.mean((1, 2), keepdims=True)) / log.std((1, 2), keepdims=True, ddof=1)
    got = front(wave).numpy()
    assert got.shape == expected.shape == (2, 40, 51)
    assert np.allclose(got, expected, atol=2e-3)


def test_front_end_stays_in_full_precision_and_bears_silence() -> None:
    front = LogMel(8000)
    wave = torch.randn(2, 4000, generator=torch.Generator().manual_seed(0)) * 0.1
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(front(wave), LogMel(8000)(wave)) and front(wave).dtype == torch.float32
    assert float(front(torch.zeros(1, 4000)).abs().max()) < 1e-3
    assert torch.allclose(front(wave), front(wave * 0.5), atol=0.02)  # loudness carries no class


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("rate", "length"), [(8000, 4000), (16000, 8000), (8000, 400)])
def test_logits_and_gradients_reach_the_waveform(name: str, rate: int, length: int) -> None:
    modality = AudioModality(rate, length)
    model = build_model(name, modality, 3, seed=1).eval()
    generator = torch.Generator().manual_seed(0)
    waves = (torch.randn(4, length, generator=generator) * 0.1).requires_grad_()
    logits = model(waves)
    assert logits.shape == (4, 3) and bool(logits.isfinite().all())
    (gradient,) = torch.autograd.grad(logits.square().sum(), waves)
    assert bool(gradient.isfinite().all()) and float(gradient.abs().max()) > 0
    assert torch.allclose(model(waves[:1]), logits[:1], atol=1e-4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.allclose(model(waves).float(), logits, atol=0.1)


def test_too_short_clips_are_an_error() -> None:
    with pytest.raises(InputError, match="50 ms"):
        build_model("audio_cnn", AudioModality(8000, 100), 2)
    with pytest.raises(InputError, match="unknown model"):
        build_model("audio_cn", AudioModality(8000, 8000), 2)
