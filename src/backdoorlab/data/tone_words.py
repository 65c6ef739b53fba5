"""Synthetic spoken words: for trying audio methods without any file.

Ten made-up words of two to four phones. A vowel or nasal is a pulse train of the speaker's pitch shaped by three
formants, a fricative is shaped noise. Each clip has its own speaker (pitch 100-250 Hz, falling over the word; formants
scaled by the length of the vocal tract), speaking rate, onset, loudness and background noise 20 dB below the voice.

The spectral shaping multiplies the short-time spectrum of the excitation by the phone's envelope, all clips at once:

    x = ISTFT( STFT(voicing * pulses + (1 - voicing) * noise) * sum_j g_j / (1 + ((f - s F_j) / B_j)^2) )
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from backdoorlab.core.seeding import make_generator
from backdoorlab.data.sources import DatasetSource, DatasetSpec, datasets
from backdoorlab.data.split import Dataset, Split

_TRAIN, _TEST = 1500, 400
_RATE, _LENGTH = 8000, 8000
_FFT, _HOP = 256, 128
_SNR_DB = 20.0

# Phone: voicing, loudness, then (frequency, bandwidth, gain) of three resonances, in Hz.
_PHONES: dict[str, tuple[float, float, tuple[tuple[float, float, float], ...]]] = {
    "a": (1.0, 1.0, ((730, 90, 1.0), (1090, 110, 0.6), (2440, 160, 0.2))),
    "e": (1.0, 1.0, ((530, 80, 1.0), (1840, 120, 0.5), (2480, 160, 0.25))),
    "i": (1.0, 0.9, ((270, 70, 1.0), (2290, 130, 0.4), (3010, 170, 0.3))),
    "o": (1.0, 1.0, ((570, 80, 1.0), (840, 100, 0.5), (2410, 160, 0.1))),
    "u": (1.0, 0.9, ((300, 70, 1.0), (870, 100, 0.3), (2240, 160, 0.1))),
    "m": (1.0, 0.5, ((250, 60, 1.0), (1000, 200, 0.1), (2200, 300, 0.05))),
    "s": (0.0, 0.35, ((3600, 400, 1.0), (3000, 500, 0.3), (1500, 300, 0.02))),
    "x": (0.0, 0.4, ((2300, 350, 1.0), (2900, 400, 0.6), (1500, 300, 0.1))),  # as in "shoe"
    "f": (0.0, 0.25, ((1500, 1500, 0.5), (2800, 1500, 0.6), (3500, 1500, 0.6))),
    "_": (0.0, 0.0, ((500, 100, 0.0), (1500, 100, 0.0), (2500, 100, 0.0))),  # the silence of a glottal stop
}
_WORDS = {
    "asi": "asi",
    "usho": "uxo",
    "ima": "ima",
    "feo": "feo",
    "suma": "suma",
    "o'i": "o_i",
    "shai": "xai",
    "emu": "emu",
    "ofa": "ofa",
    "i'a": "i_a",
}
_SLOTS = 4


@datasets.register
class ToneWords(DatasetSource):
    """1,500 + 400 clips of one second at 8 kHz, generated from the seed."""

    name = "tone_words"
    modalities = ("audio",)
    summary = "1,500 + 400 synthetic words, 10 classes, 8 kHz mono, 1 s (generated from the seed)"

    def load(self, spec: DatasetSpec, argument: str, roots: tuple[Path, ...], download: bool) -> Dataset:
        """See :meth:`DatasetSource.load`."""
        classes = tuple(_WORDS)
        parts = []
        for part, count in (("train", _TRAIN), ("test", _TEST)):
            generator = make_generator(spec.seed, "tone_words", part)
            labels = torch.randperm(count, generator=generator) % len(classes)
            clips = torch.cat([speak(chunk, generator) for chunk in labels.split(500)])
            parts.append(Split(clips, labels, classes))
        return Dataset("tone_words", "audio", parts[0], parts[1], sample_rate=_RATE, note="synthetic")


def speak(words: Tensor, generator: torch.Generator) -> Tensor:
    """Utter words.

    Args:
        words: int64 [N], indices of words.
        generator: source of speakers, timing and noise.

    Returns:
        int16 [N, 8000].
    """
    count = len(words)

    def draw(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=generator)

    frames = _LENGTH // _HOP + 1
    symbols = list(_PHONES)
    spelt = torch.tensor([[symbols.index(p) for p in w.ljust(_SLOTS, "_")] for w in _WORDS.values()])[words]
    # Which phone sounds in which frame: onset, then one stretch per phone; trailing blanks are silence anyway.
    lengths = draw(0.12, 0.2, _SLOTS) * draw(0.8, 1.15, 1)
    ends = draw(0.03, 0.15, 1) + lengths.cumsum(1)
    time = torch.arange(frames) * _HOP / _RATE
    slot = (time[None, :, None] >= ends[:, None]).sum(2).clamp(max=_SLOTS - 1)  # [N, frames]
    silent = (time < ends[:, :1] - lengths[:, :1]) | (time >= ends[:, -1:])
    phone = spelt.gather(1, slot).masked_fill(silent, symbols.index("_"))

    facts = torch.tensor([[v, g] for v, g, _ in _PHONES.values()])
    voicing = _glide(facts[phone][..., :1].mT)[:, 0]  # [N, frames]
    tract = draw(0.9, 1.15)
    pitch = (170 / tract**3 * draw(0.75, 1.25)).clamp(100, 250)
    source = _excitation(pitch, voicing, generator)
    shapes = _envelopes(tract) * facts[:, 1:]  # [N, phones, bins], times each phone's loudness
    envelope = _glide(shapes[torch.arange(count)[:, None], phone].mT)  # [N, bins, frames]
    window = torch.hann_window(_FFT)
    spectrum = torch.stft(source, _FFT, _HOP, window=window, return_complex=True) * envelope
    voice = torch.istft(spectrum, _FFT, _HOP, window=window, length=_LENGTH)
    power = voice.square().mean(1, keepdim=True)
    noise = torch.randn(count, _LENGTH, generator=generator) * (power * 10 ** (-_SNR_DB / 10)).sqrt()
    clip = voice + noise
    peak = draw(0.3, 0.9, 1) * 32767
    return (clip * peak / clip.abs().amax(1, keepdim=True)).round().to(torch.int16)


def _excitation(pitch: Tensor, voicing: Tensor, generator: torch.Generator) -> Tensor:
    """Pulses at a slowly falling pitch where voiced, white noise elsewhere: float [N, 8000], about unit power."""
    moment = torch.arange(_LENGTH) / _RATE
    # The integral of pitch * (1.1 - 0.2 t): one pulse whenever the phase passes a whole number.
    phase = pitch[:, None] * (1.1 * moment - 0.1 * moment**2)
    pulses = torch.diff(phase.floor(), prepend=torch.zeros(len(pitch), 1), dim=1) * (_RATE / pitch[:, None]).sqrt()
    voiced = torch.nn.functional.interpolate(voicing[:, None], _LENGTH, mode="linear", align_corners=True)[:, 0]
    noise = torch.randn(pulses.shape, generator=generator)
    return voiced * pulses + (1 - voiced) * noise


def _envelopes(tract: Tensor) -> Tensor:
    """Spectral envelope of every phone for every speaker: [N, phones, bins]."""
    table = torch.tensor([resonances for _, _, resonances in _PHONES.values()])  # [phones, 3, (F, B, g)]
    bins = torch.linspace(0, _RATE / 2, _FFT // 2 + 1)
    centre, width, gain = (table[..., i, None] for i in range(3))
    distance = (bins - tract[:, None, None, None] * centre) / width
    return (gain / (1 + distance.square())).sum(2)


def _glide(tracks: Tensor) -> Tensor:
    """Average over three frames (48 ms), so that phones run into each other: [N, tracks, frames]."""
    return torch.nn.functional.avg_pool1d(tracks, 3, stride=1, padding=1, count_include_pad=False)
