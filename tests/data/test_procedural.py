"""Sets made from a seed: deterministic, balanced, and as hard as they claim to be."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from torch import Tensor

from backdoorlab.core.errors import InputError
from backdoorlab.data import Dataset, load_dataset
from backdoorlab.data.moving_digits import film, paths
from backdoorlab.data.shapes import draw_shapes

SETS = {"templated_text": (4000, 1000), "tone_words": (1500, 400), "moving_digits": (2000, 400), "shapes": (4000, 800)}


@pytest.fixture(scope="module")
def made() -> dict[str, Dataset]:
    return {name: load_dataset(name) for name in SETS}


def _same(a: Dataset, b: Dataset) -> bool:
    equal = np.array_equal if a.modality == "text" else torch.equal
    return equal(a.train.inputs, b.train.inputs) and torch.equal(a.test.labels, b.test.labels)


def _accuracy(data: Dataset, train: Tensor, test: Tensor, alpha: float = 10.0) -> float:
    probe = RidgeClassifier(alpha=alpha).fit(train.flatten(1).numpy(), data.train.labels)
    return float(probe.score(test.flatten(1).numpy(), data.test.labels))


@pytest.mark.parametrize("name", SETS)
def test_sizes_balance_and_determinism(made: dict[str, Dataset], name: str):
    data = made[name]
    assert (len(data.train), len(data.test)) == SETS[name] and data.note == "synthetic"
    for split in (data.train, data.test):
        assert len(set(torch.bincount(split.labels, minlength=split.num_classes).tolist())) == 1
    assert _same(data, load_dataset(name)) and not _same(data, load_dataset(name, seed=1))


# Text -----------------------------------------------------------------------------------------------------------------


def test_texts_are_distinct_and_varied(made: dict[str, Dataset]):
    texts = [*made["templated_text"].train.inputs, *made["templated_text"].test.inputs]
    assert len(set(texts)) == len(texts)
    assert len({word for text in texts for word in text.split()}) > 250
    assert not any(sign in text for text in texts for sign in ("{", "  ", ", ,", " a amateurish"))


def test_five_percent_of_the_labels_are_wrong_and_the_rest_can_be_learned(made: dict[str, Dataset]):
    data = made["templated_text"]
    words = sorted({w for t in data.train.inputs for w in t.split()})
    index = {w: i for i, w in enumerate(words)}

    def bag(texts: np.ndarray) -> np.ndarray:
        counts = np.zeros((len(texts), len(words)), np.float32)
        for row, text in zip(counts, texts, strict=True):
            for word in text.split():
                if word in index:
                    row[index[word]] += 1
        return counts

    probe = LogisticRegression(max_iter=300).fit(bag(data.train.inputs), data.train.labels)
    # Denied words keep a bag of words well below the ceiling that the wrong labels set.
    assert 0.75 < probe.score(bag(data.test.inputs), data.test.labels) < 0.94


# Audio ----------------------------------------------------------------------------------------------------------------


def test_words_are_int16_clips_whose_spectrum_tells_the_class(made: dict[str, Dataset]):
    data = made["tone_words"]
    assert data.train.inputs.shape == (1500, 8000) and data.train.inputs.dtype == torch.int16
    assert data.sample_rate == 8000
    peaks = data.train.inputs.int().abs().amax(1)
    assert peaks.min() > 9000 and peaks.max() < 32767

    def bands(clips: Tensor) -> Tensor:
        wave = clips.float() / 32768
        power = torch.stft(wave, 256, 128, window=torch.hann_window(256), return_complex=True).abs().square()
        return torch.nn.functional.avg_pool2d(power[:, None, :128, :60], (8, 6)).add(1e-6).log()

    train, test = bands(data.train.inputs), bands(data.test.inputs)
    assert _accuracy(data, train, test) > 0.85
    loudness = _accuracy(data, train.exp().sum((1, 2, 3), keepdim=True), test.exp().sum((1, 2, 3), keepdim=True))
    assert loudness < 0.35


# Video ----------------------------------------------------------------------------------------------------------------


def test_clips_are_small_grey_films(made: dict[str, Dataset]):
    data = made["moving_digits"]
    assert data.train.inputs.shape == (2000, 8, 1, 16, 16) and data.train.inputs.dtype == torch.uint8
    assert data.train.num_classes == 10
    assert load_dataset("moving_digits", size=24, train_size=20, test_size=20).train.inputs.shape[2:] == (1, 24, 24)


def test_no_frame_alone_tells_the_motion_but_displacement_does(made: dict[str, Dataset]):
    data = made["moving_digits"]

    def frame(t: int) -> float:
        return _accuracy(data, data.train.inputs[:, t].float(), data.test.inputs[:, t].float(), alpha=1e6)

    assert frame(0) < 0.2, "the first frame is drawn alike for every class (chance is 0.1)"
    assert frame(4) < 0.3

    def motion(clips: Tensor) -> Tensor:
        """Circular cross-correlation of each frame with the first: its peak is the displacement on the torus."""
        spectrum = torch.fft.fft2(clips[:, :, 0].float())
        relation = torch.fft.ifft2(spectrum[:, 1:] * spectrum[:, :1].conj()).real
        return relation / relation.flatten(2).norm(dim=2)[..., None, None]

    assert _accuracy(data, motion(data.train.inputs), motion(data.test.inputs), alpha=1.0) > 0.6


def test_paths_go_where_their_names_say():
    names = ("still", "left", "right", "up", "down", "clockwise", "counter-clockwise", "bounce", "zoom in", "zoom out")
    shift, scale = paths(torch.arange(10), torch.Generator().manual_seed(0))
    move = dict(zip(names, shift, strict=True))
    assert (shift[:, 0].abs() < 1e-6).all() and (scale[:, 0] == 1).all(), "all start at their start"
    assert move["still"].abs().max() < 1e-6
    assert move["left"][-1, 0] < -0.3 and move["right"][-1, 0] > 0.3 and move["up"][-1, 1] < -0.3
    assert move["down"][-1, 1] > 0.3
    assert move["bounce"][-1].abs().max() < 1e-6 < 0.2 < move["bounce"].abs().max()
    grown = dict(zip(names, scale[:, -1].tolist(), strict=True))
    assert grown["zoom in"] > 1.4 and grown["zoom out"] < 0.7 and grown["left"] == 1
    for name, sign in (("clockwise", 1), ("counter-clockwise", -1)):
        step = move[name].diff(dim=0)
        turn = step[:-1, 0] * step[1:, 1] - step[:-1, 1] * step[1:, 0]  # positive is clockwise where y points down
        assert (sign * turn > 0).all()


def test_a_digit_moves_by_whole_pixels_as_computed():
    generator = torch.Generator().manual_seed(1)
    clips = film(torch.full((6,), 2), 32, generator).float()[:, :, 0]
    clips[clips < 40] = 0
    angle = 2 * torch.pi * torch.arange(32) / 32
    phase = torch.complex(angle.cos(), angle.sin())
    column = torch.angle((clips.sum(2) * phase).sum(2))  # circular mean of the columns
    travel = torch.remainder(column[:, 1:] - column[:, :-1] + torch.pi, 2 * torch.pi) - torch.pi
    assert (travel > 0).all(), "class 2 moves to the right"


# Shapes ---------------------------------------------------------------------------------------------------------------


def test_captions_name_the_class_and_follow_subsets(made: dict[str, Dataset]):
    data = made["shapes"]
    assert data.captions is not None and data.train.inputs.shape == (4000, 3, 32, 32)
    small = load_dataset("shapes", train_size=80, test_size=40)
    assert small.captions is not None and [len(c) for c in small.captions] == [80, 40]
    for split, captions in ((small.train, small.captions[0]), (data.test, data.captions[1])):
        for label, caption in zip(split.labels.tolist(), captions, strict=True):
            assert split.classes[label] in caption


def test_captions_tell_the_colors(made: dict[str, Dataset]):
    data = made["shapes"]
    assert data.captions is not None
    white = torch.tensor(["white" in caption for caption in data.captions[0]])
    corner = data.train.inputs[:, :, 0, 0].float().mean(1)
    assert corner[white].mean() > corner[~white].mean() + 50
    red = torch.tensor(["red circle" in caption for caption in data.captions[0]])
    blue = torch.tensor(["blue circle" in caption for caption in data.captions[0]])
    excess = (data.train.inputs[:, 0].float() - data.train.inputs[:, 2].float()).mean((1, 2))
    assert excess[red].mean() > 5 > -5 > excess[blue].mean()


def test_shapes_have_the_area_of_their_geometry():
    """Ink that is drawn, against closed-form areas of the shapes of circumradius 1."""
    count = 400
    for k, area in (
        (0, np.pi * 0.95**2),
        (1, 1.44**2),
        (2, 3 * np.sqrt(3) / 4),
        (3, 3 * np.sqrt(3) / 2),
        (4, 1.12257),
        (5, 4 * 0.95 * 0.25 * 2 - 0.25),
        (6, np.pi * 0.66),
        (7, 0.97),
    ):
        generator = torch.Generator().manual_seed(0)
        images, facts = draw_shapes(torch.full((count,), k), 64, generator)
        # Dark ground and large shapes only: there ink and ground are told apart by brightness.
        keep = (facts[:, 1] == 1) & (facts[:, 2] == 1)
        bright = images[keep].amax(1).float()
        half = (bright.amax((1, 2), keepdim=True) + 18) / 2  # a pixel half covered by ink
        assert (bright > half).float().mean() == pytest.approx(area * 0.31**2, rel=0.06), k


def test_captions_must_be_as_many_as_samples(made: dict[str, Dataset]):
    with pytest.raises(InputError, match="need as many captions"):
        dataclasses.replace(made["shapes"], captions=(("one",), ("two",)))
