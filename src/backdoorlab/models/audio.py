"""Audio networks on waveforms in [-1, 1]: CNN, x-vector and LSTM on log-mel spectrograms, and M5 on samples.

The log-mel front end belongs to the network, so that gradients reach the waveform and a checkpoint is complete:
power spectrum of 25 ms Hann windows every 10 ms, 40 triangular filters on the HTK mel scale
m = 2595 log10(1 + f / 700) from 0 to half the sampling rate, log(. + 1e-6), then each clip brought to mean 0 and
variance 1 over time and bands (loudness carries no class).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from backdoorlab.core.errors import InputError
from backdoorlab.core.instructions import onednn_limit
from backdoorlab.modalities.audio import AudioModality
from backdoorlab.modalities.base import Modality, expect_modality
from backdoorlab.models.classifier import ModelBuilder, models


def mel_matrix(bands: int, n_fft: int, sample_rate: int) -> Tensor:
    """Triangular filters of height 1 with corners equally spaced in mel (HTK).

    Args:
        bands: number of filters.
        n_fft: length of the Fourier transform.
        sample_rate: in Hz.

    Returns:
        float32 [n_fft // 2 + 1, bands].
    """
    top = 2595 * math.log10(1 + sample_rate / 2 / 700)
    corners = 700 * (10 ** (torch.linspace(0, top, bands + 2, dtype=torch.float64) / 2595) - 1)
    frequency = torch.arange(n_fft // 2 + 1, dtype=torch.float64)[:, None] * sample_rate / n_fft
    low, centre, high = corners[:-2], corners[1:-1], corners[2:]
    rising, falling = (frequency - low) / (centre - low), (high - frequency) / (high - centre)
    return torch.minimum(rising, falling).clamp_min(0).float()


class LogMel(nn.Module):
    """Waveforms [B,L] -> standardised log-mel spectrograms [B,bands,frames], always in float32."""

    window: Tensor
    mel: Tensor

    def __init__(self, sample_rate: int, bands: int = 40) -> None:
        super().__init__()
        self.hop, length = round(sample_rate * 0.010), round(sample_rate * 0.025)
        self.n_fft = 2 ** math.ceil(math.log2(length))
        self.register_buffer("window", torch.hann_window(length), persistent=False)
        self.register_buffer("mel", mel_matrix(bands, self.n_fft, sample_rate), persistent=False)

    def forward(self, waves: Tensor) -> Tensor:
        """[B,L] -> [B,bands,1 + L // hop]; reduced precision is switched off, as powers span ten decades."""
        with torch.autocast(waves.device.type, enabled=False):
            spectrum = torch.stft(
                waves.float(),
                self.n_fft,
                self.hop,
                len(self.window),
                self.window,
                center=True,
                pad_mode="constant",
                return_complex=True,
            )
            power = spectrum.real.square() + spectrum.imag.square()
            log = torch.log(power.transpose(1, 2) @ self.mel + 1e-6).transpose(1, 2)
            mean, std = log.mean((1, 2), keepdim=True), log.std((1, 2), keepdim=True)
            return (log - mean) / std.clamp_min(0.01)


class AudioCNN(nn.Module):
    """Log-mel as an image: four conv-BN-ReLU blocks (16, 32, 64, 64 channels) with 2x2 max pooling in between.

    The first convolution has a stride of 2, which makes training on a CPU four times as fast.
    """

    def __init__(self, sample_rate: int, num_classes: int, widths: tuple[int, ...] = (16, 32, 64, 64)) -> None:
        super().__init__()
        self.front = LogMel(sample_rate)
        layers: list[nn.Module] = []
        for block, (before, width) in enumerate(zip((1, *widths), widths, strict=False)):
            if block:
                layers.append(nn.MaxPool2d(2, ceil_mode=True))
            stride = 1 if block else 2
            layers += [nn.Conv2d(before, width, 3, stride, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        self.body = nn.Sequential(*layers).to(memory_format=torch.channels_last)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(widths[-1], num_classes)

    def forward(self, waves: Tensor) -> Tensor:
        """Waveforms [B,L] -> logits [B,K]."""
        logits: Tensor = self.linear(self.pool(self.body(self.front(waves).unsqueeze(1))).flatten(1))
        return logits


class XVector(nn.Module):
    """Time-delay network with mean and standard deviation over time (Snyder et al., ICASSP 2018), width 128.

    Frame layers see (context, dilation) (5,1), (3,2), (3,3), (1,1), (1,1); BatchNorm as in the paper's Kaldi recipe.
    """

    def __init__(self, sample_rate: int, num_classes: int, width: int = 128, bands: int = 40) -> None:
        super().__init__()
        self.front = LogMel(sample_rate, bands)
        layers: list[nn.Module] = []
        for before, context, dilation in (
            (bands, 5, 1),
            (width, 3, 2),
            (width, 3, 3),
            (width, 1, 1),
            (width, 1, 1),
        ):
            same = dilation * (context - 1) // 2
            layers += [
                nn.Conv1d(before, width, context, dilation=dilation, padding=same, bias=False),
                nn.BatchNorm1d(width),
                nn.ReLU(),
            ]
        self.frames = nn.Sequential(*layers)
        self.segment = nn.Sequential(nn.Linear(2 * width, width, bias=False), nn.BatchNorm1d(width), nn.ReLU())
        self.linear = nn.Linear(width, num_classes)

    def forward(self, waves: Tensor) -> Tensor:
        """Waveforms [B,L] -> logits [B,K]."""
        frames = self.frames(self.front(waves)).float()
        std = (frames.var(2, unbiased=False) + 1e-5).sqrt()
        logits: Tensor = self.linear(self.segment(torch.cat([frames.mean(2), std], 1)))
        return logits


def _held_below_avx512() -> bool:
    """Is oneDNN limited to less than AVX-512? Its LSTM of several layers cannot be made then; torch's own can."""
    return (onednn_limit() or "all").lower() in ("sse41", "avx", "avx2", "avx2_vnni", "avx2_vnni_2")


class AudioLSTM(nn.Module):
    """Two LSTM layers of 128 units over log-mel frames, mean over time, linear."""

    def __init__(self, sample_rate: int, num_classes: int, hidden: int = 128, bands: int = 40) -> None:
        super().__init__()
        self.front = LogMel(sample_rate, bands)
        self.lstm = nn.LSTM(bands, hidden, num_layers=2, batch_first=True)
        self.linear = nn.Linear(hidden, num_classes)

    def forward(self, waves: Tensor) -> Tensor:
        """Waveforms [B,L] -> logits [B,K]."""
        frames = self.front(waves).transpose(1, 2)
        with torch.backends.mkldnn.flags(enabled=torch.backends.mkldnn.enabled and not _held_below_avx512()):
            states, _ = self.lstm(frames)
        logits: Tensor = self.linear(states.mean(1))
        return logits


class M5(nn.Module):
    """Convolutions on samples (Dai et al., ICASSP 2017): kernel 80 at 1 ms stride, then 3, 3, 3; BN, ReLU, pool 4."""

    def __init__(self, sample_rate: int, num_classes: int, widths: tuple[int, ...] = (32, 32, 64, 64)) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for block, (before, width) in enumerate(zip((1, *widths), widths, strict=False)):
            first = not block
            kernel, stride = (80, max(1, sample_rate // 1000)) if first else (3, 1)
            layers += [
                nn.Conv1d(before, width, kernel, stride, padding=kernel // 2, bias=False),
                nn.BatchNorm1d(width),
                nn.ReLU(),
                nn.MaxPool1d(4, ceil_mode=True),
            ]
        self.body = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool1d(1)
        self.linear = nn.Linear(widths[-1], num_classes)

    def forward(self, waves: Tensor) -> Tensor:
        """Waveforms [B,L] -> logits [B,K]."""
        logits: Tensor = self.linear(self.pool(self.body(waves.unsqueeze(1))).flatten(1))
        return logits


def _rate(modality: Modality) -> int:
    sound = expect_modality(modality, AudioModality)
    if sound.length < sound.sample_rate // 20:
        raise InputError(f"clips of {sound.length} samples are shorter than 50 ms at {sound.sample_rate} Hz")
    return sound.sample_rate


class _Audio(ModelBuilder):
    modalities = ("audio",)


@models.register
class BuildAudioCNN(_Audio):
    """The default for sounds."""

    name = "audio_cnn"
    summary = "four conv-BN-ReLU blocks on log-mel, 60 k parameters: default for sounds"

    def build(self, modality: Modality, num_classes: int) -> nn.Module:
        """See :meth:`ModelBuilder.build`."""
        return AudioCNN(_rate(modality), num_classes)


@models.register
class BuildXVector(_Audio):
    """The speaker-recognition one."""

    name = "xvector"
    summary = "x-vector: time-delay network on log-mel, statistics pooling, width 128"

    def build(self, modality: Modality, num_classes: int) -> nn.Module:
        """See :meth:`ModelBuilder.build`."""
        return XVector(_rate(modality), num_classes)


@models.register
class BuildAudioLSTM(_Audio):
    """The recurrent one."""

    name = "audio_lstm"
    summary = "two LSTM layers of 128 units on log-mel"

    def build(self, modality: Modality, num_classes: int) -> nn.Module:
        """See :meth:`ModelBuilder.build`."""
        return AudioLSTM(_rate(modality), num_classes)


@models.register
class BuildM5(_Audio):
    """The one on raw samples."""

    name = "m5"
    summary = "M5: four convolutions on raw samples"

    def build(self, modality: Modality, num_classes: int) -> nn.Module:
        """See :meth:`ModelBuilder.build`."""
        return M5(_rate(modality), num_classes)
