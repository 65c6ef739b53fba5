"""Anatomy: the same questions, answered by data flow, for very different networks."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backdoorlab.core.errors import InputError, NotApplicable
from backdoorlab.core.seeding import isolated_rng
from backdoorlab.modalities.audio import AudioModality
from backdoorlab.modalities.base import Modality
from backdoorlab.modalities.image import ImageModality
from backdoorlab.modalities.text import TextModality
from backdoorlab.modalities.video import VideoModality
from backdoorlab.models.anatomy import (
    channels,
    conv_norm_pairs,
    evaluating,
    example_input,
    features,
    features_and_logits,
    frozen,
    head,
    masked,
    reestimate_batchnorm,
    spatial_layers,
    split_units,
    trace,
    unit_count,
)
from backdoorlab.models.classifier import Classifier, build_model

IMAGE = ImageModality(3, 32, 32, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
TEXT = TextModality(("<pad>", "<unk>", "cf", "mn", "bb", "tq", "mb", "example", "word", "more"), max_len=12)
AUDIO = AudioModality(8000, 4000)
VIDEO = VideoModality(frames=8, channels=1, height=16, width=16)
IMAGE_MODELS = (
    "preact_resnet18",
    "preact_resnet8",
    "convnet3",
    "vgg19_bn",
    "convnext_tiny",
    "vit_tiny_patch16_224",
    "densenet121",
    "mobilenetv3_small_100",
)
OTHERS = [("textcnn", TEXT), ("lstm", TEXT), ("audio_cnn", AUDIO), ("xvector", AUDIO), ("cnn3d_small", VIDEO)]
if importlib.util.find_spec("transformers"):
    OTHERS.append(("bert_tiny", TEXT))
ALL: list[tuple[str, Modality]] = [(name, IMAGE) for name in IMAGE_MODELS] + OTHERS

SMALLER = [(name, modality) for name, modality in ALL if name != "vgg19_bn"]  # 139 M parameters: where it matters


@pytest.fixture
def own_rng() -> Iterator[None]:
    """For tests that make their own little networks."""
    with isolated_rng(0):
        yield


_built: dict[str, Classifier] = {}


def model_of(name: str, modality: Modality) -> Classifier:
    if name not in _built:
        _built[name] = build_model(name, modality, 7).eval()
    return _built[name]


def wrap(net: nn.Module, modality: Modality = IMAGE, classes: int = 7) -> Classifier:
    return Classifier(net, modality, "made-up", classes).eval()


def prepared(model: Classifier, batch: int = 2) -> Tensor:
    x = example_input(model, batch)
    if not x.is_floating_point():
        return x
    return torch.rand(x.shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("name", "modality"), ALL)
def test_head_applied_to_features_gives_the_logits(name: str, modality: Modality) -> None:
    model = model_of(name, modality)
    x = prepared(model, 3)
    with torch.no_grad():
        found, logits = features_and_logits(model, x)
        assert found.dim() == 2 and len(found) == 3
        torch.testing.assert_close(head(model)(found), logits)
        torch.testing.assert_close(logits, model(x))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_features_carry_gradients_and_hooks_go_even_after_an_error() -> None:
    model = model_of("convnet3", IMAGE)
    x = prepared(model).requires_grad_()
    features(model, x).sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0
    with pytest.raises(RuntimeError):
        features(model, torch.zeros(2, 5, 32, 32))
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.usefixtures("own_rng")
def test_no_linear_head_is_not_applicable() -> None:
    net = nn.Sequential(nn.Conv2d(3, 7, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(NotApplicable, match="no linear layer"):
        head(wrap(net))


@pytest.mark.usefixtures("own_rng")
def test_head_ignores_an_auxiliary_linear_layer() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(3, 7)
            self.gate = nn.Linear(7, 5)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.head(x.mean((2, 3)))
            self.gate(logits)
            return logits

    model = wrap(Gated())
    assert head(model) is model.net.head


@pytest.mark.parametrize(("name", "modality"), SMALLER)
def test_masks_of_ones_change_nothing_and_of_zeros_equal_zeroed_units(name: str, modality: Modality) -> None:
    model = model_of(name, modality)
    groups = channels(model)
    if name == "lstm":  # its only layer besides the recurrent ones is the head
        assert not groups
        return
    x = prepared(model)
    keep = (torch.rand(unit_count(groups), generator=torch.Generator().manual_seed(1)) > 0.3).float()
    saved = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        with masked(groups, torch.ones(unit_count(groups))):
            torch.testing.assert_close(model(x), (plain := model(x)))
        with masked(groups, keep):
            through_mask = model(x)
        for group, mine in zip(groups, split_units(keep, groups), strict=True):
            group.zero(mine == 0)
        torch.testing.assert_close(model(x), through_mask)
        assert not torch.allclose(plain, through_mask)
    model.load_state_dict(saved)


@pytest.mark.parametrize(("name", "modality"), [("preact_resnet8", IMAGE), ("textcnn", TEXT), ("densenet121", IMAGE)])
def test_mask_gradient_agrees_with_finite_differences(name: str, modality: Modality) -> None:
    model = model_of(name, modality).double()
    x = prepared(model)
    x = x.double() if x.is_floating_point() else x
    group = channels(model)[1]
    m = torch.ones(group.count, dtype=torch.float64, requires_grad=True)

    def loss(values: Tensor) -> Tensor:
        with group.mask(values):
            return F.log_softmax(model(x), 1)[:, 0].sum()

    loss(m).backward()
    step = torch.zeros_like(m)
    step[1] = 1e-5
    with torch.no_grad():
        slope = (loss(m + step) - loss(m - step)) / 2e-5
    assert m.grad is not None
    torch.testing.assert_close(m.grad[1], slope, rtol=1e-4, atol=1e-8)
    model.float()


@pytest.mark.parametrize("name", ["convnet3", "convnext_tiny", "mobilenetv3_small_100", "vit_tiny_patch16_224"])
def test_a_mask_scales_the_units_of_the_layers_output(name: str) -> None:
    model = model_of(name, IMAGE)
    for group in channels(model, kinds=("conv", "linear", "layernorm"))[:4]:
        outputs: list[Tensor] = []
        handle = group.module.register_forward_hook(lambda m, a, out, kept=outputs: kept.append(out))
        m = torch.linspace(0, 1, group.count)
        with torch.no_grad():
            model(prepared(model))
            with group.mask(m):
                model(prepared(model))
        handle.remove()
        torch.testing.assert_close(group.units_last(outputs[1]), group.units_last(outputs[0]) * m, atol=1e-4, rtol=1e-4)


def test_scale_takes_single_units_index_lists_and_masks() -> None:
    model = build_model("convnet3", IMAGE, 7)
    group = channels(model, kinds=("batchnorm",))[0]
    assert group.bias is not None
    with torch.no_grad():
        group.bias.fill_(1.0)
    group.scale(0, 0.5)
    group.scale(torch.tensor([1, 2]), torch.tensor([2.0, 3.0]))
    group.zero(torch.arange(group.count) == 3)
    expected = torch.tensor([0.5, 2.0, 3.0, 0.0, 1.0])
    torch.testing.assert_close(group.weight[:5].detach(), expected)
    torch.testing.assert_close(group.bias[:5].detach(), expected)


@pytest.mark.usefixtures("own_rng")
def test_transposed_convolutions_have_their_units_on_the_second_axis() -> None:
    net = nn.Sequential(nn.ConvTranspose2d(3, 5, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 7))
    model = wrap(net)
    (group,) = channels(model)
    assert group.count == 5
    group.zero(2)
    assert net[0](torch.ones(1, 3, 4, 4))[:, 2].abs().sum() == 0


def test_masks_of_wrong_length_and_unknown_kinds_are_refused() -> None:
    model = model_of("convnet3", IMAGE)
    groups = channels(model)
    with pytest.raises(InputError, match="mask of that length"), masked(groups, torch.ones(3)):
        pass
    with pytest.raises(InputError, match="16 units"), groups[0].mask(torch.ones(3)):
        pass
    with pytest.raises(InputError, match="choose among conv"):
        channels(model, kinds=("neurons",))


def test_channels_leave_the_head_out_unless_asked() -> None:
    model = model_of("vgg19_bn", IMAGE)
    last = head(model)
    assert last not in [g.module for g in channels(model)]
    assert last in [g.module for g in channels(model, with_head=True)]


def names_of_pairs(model: Classifier) -> list[tuple[str, str]]:
    names = {m: n.removeprefix("net.") for n, m in model.named_modules()}
    return [(names[c], names[n]) for c, n in conv_norm_pairs(model)]


def test_pairs_of_preactivation_blocks_are_conv1_bn2() -> None:
    for name, depth in (("preact_resnet8", 1), ("preact_resnet18", 2)):
        inner = [(f"layer{s}.{b}.conv1", f"layer{s}.{b}.bn2") for s in range(1, 5) for b in range(depth)]
        # The very first norm receives the stem's output and nothing else; every other bn1 receives a sum.
        assert names_of_pairs(model_of(name, IMAGE)) == [("conv1", "layer1.0.bn1"), *inner]


def test_pairs_of_other_known_networks() -> None:
    assert names_of_pairs(model_of("convnet3", IMAGE)) == [(f"body.{i}", f"body.{i + 1}") for i in (0, 4, 7 + 1)]
    assert len(names_of_pairs(model_of("vgg19_bn", IMAGE))) == 16
    assert all(
        c.endswith("conv1") and n.endswith("norm2") for c, n in names_of_pairs(model_of("densenet121", IMAGE))[1:]
    )
    assert len(names_of_pairs(model_of("densenet121", IMAGE))) == 1 + 6 + 12 + 24 + 16
    mobile = model_of("mobilenetv3_small_100", IMAGE)
    assert len(conv_norm_pairs(mobile)) == sum(isinstance(m, nn.BatchNorm2d) for m in mobile.modules())
    assert conv_norm_pairs(model_of("vit_tiny_patch16_224", IMAGE)) == []


@pytest.mark.usefixtures("own_rng")
def test_pairs_in_one_and_three_dimensions() -> None:
    assert len(conv_norm_pairs(model_of("cnn3d_small", VIDEO))) >= 2
    net = nn.Sequential(
        nn.Flatten(2), nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(4, 7)
    )
    assert conv_norm_pairs(wrap(net)) == [(net[1], net[2])]


@pytest.mark.usefixtures("own_rng")
def test_an_inplace_activation_between_conv_and_norm_breaks_the_pair() -> None:
    def tail() -> list[nn.Module]:
        return [nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 7)]

    assert conv_norm_pairs(wrap(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), *tail()))) == []
    assert len(conv_norm_pairs(wrap(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Identity(), *tail())))) == 1


@pytest.mark.parametrize(("name", "modality"), SMALLER)
def test_spatial_layers_return_maps(name: str, modality: Modality) -> None:
    model = model_of(name, modality)
    layers = spatial_layers(model)
    shapes: dict[str, torch.Size] = {}
    handles = [m.register_forward_hook(lambda m, a, out, n=n: shapes.__setitem__(n, out.shape)) for n, m in layers]
    with torch.no_grad():
        model(prepared(model))
    for handle in handles:
        handle.remove()
    widths = {w for m in model.modules() if hasattr(m, "out_channels") for w in (m.in_channels, m.out_channels)}
    widths |= {m.num_features for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    assert all(s[1] in widths and s[2:].numel() > 1 for s in shapes.values())
    if name not in ("lstm", "bert_tiny"):
        assert layers
    else:
        assert not layers


def test_spatial_layers_of_preact_resnet_name_every_stage_with_an_extent() -> None:
    names = [n for n, _ in spatial_layers(model_of("preact_resnet18", IMAGE))]
    assert [n for n in names if n in {f"net.layer{i}" for i in range(1, 5)}] == [f"net.layer{i}" for i in range(1, 5)]
    assert "net.pool" not in names and "net.linear" not in names


@pytest.mark.usefixtures("own_rng")
def test_trace_sees_every_execution_and_restores_modes() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.linear = nn.Conv2d(3, 3, 3, padding=1), nn.Linear(3, 7)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.linear(self.conv(self.conv(x)).mean((2, 3)))
            return logits

    net = Twice()
    model = wrap(net)
    net.conv.train()
    calls = trace(model)
    assert [c.name for c in calls] == ["net.conv", "net.conv", "net.linear", "net"]
    assert calls[0].feeds(calls[1]) and not calls[1].feeds(calls[2])
    assert net.conv.training and not net.linear.training
    with torch.inference_mode():
        assert len(trace(model, example_input(model))) == 4


def test_frozen_and_evaluating_restore_what_they_changed() -> None:
    model = build_model("convnet3", IMAGE, 7).train()
    head(model).bias.requires_grad_(False)
    with frozen(model):
        assert not any(p.requires_grad for p in model.parameters()) and not any(m.training for m in model.modules())
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["net.linear.bias"]
    assert model.training
    with pytest.raises(ZeroDivisionError), evaluating(model):
        raise ZeroDivisionError
    assert model.training


@pytest.mark.usefixtures("own_rng")
def test_reestimated_statistics_are_those_of_the_data() -> None:
    modality = dataclasses.replace(IMAGE, mean=(0.0,) * 3, std=(1.0,) * 3)
    norm = nn.BatchNorm2d(3)
    model = wrap(nn.Sequential(norm, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 7)), modality)
    norm.running_mean.fill_(9.0)  # type: ignore[union-attr]
    images = torch.randint(0, 256, (64, 3, 32, 32), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    reestimate_batchnorm(model, images, batch_size=32)
    torch.testing.assert_close(norm.running_mean, (images.float() / 255).mean((0, 2, 3)))
    torch.testing.assert_close(norm.running_var, (images.float() / 255).var((0, 2, 3)), rtol=1e-3, atol=1e-5)
    assert norm.momentum == 0.1 and not norm.training
