"""When bf16 is used: only where the hardware has it and the user's limits on instruction sets leave it in."""

from __future__ import annotations

import pytest
import torch

from backdoorlab.benchmark.meter import hardware
from backdoorlab.models import build_model
from backdoorlab.tasks import Task
from backdoorlab.training import Context, Recipe, predict
from backdoorlab.training.context import autocast, fast_bf16

CPU = torch.device("cpu")

pytestmark = pytest.mark.auto_precision


@pytest.fixture(autouse=True)
def server(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor with AVX512-BF16 and no limits."""
    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")


@pytest.mark.parametrize("name", ["ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"])
@pytest.mark.parametrize(
    ("limit", "bf16"),
    [
        ("AVX2", False),
        ("avx2_vnni_2", False),
        ("AVX512_CORE", False),
        ("AVX512_CORE_VNNI", False),
        ("AVX512_CORE_BF16", True),
        ("AVX512_CORE_AMX", True),
        ("ALL", True),
        ("", True),
    ],
)
def test_limits_on_onednn_are_honoured(monkeypatch: pytest.MonkeyPatch, name: str, limit: str, bf16: bool) -> None:
    monkeypatch.setenv(name, limit)
    assert fast_bf16(CPU) is bf16
    assert hardware(CPU)["precision"] == ("bf16" if bf16 else "fp32")
    assert hardware(CPU)["onednn_max_isa"] == (limit or None)


def test_the_newer_name_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DNNL_MAX_CPU_ISA", "AVX2")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "ALL")
    assert fast_bf16(CPU)


@pytest.mark.parametrize("capability", ["AVX2", "DEFAULT"])
def test_limits_on_torch_are_honoured(monkeypatch: pytest.MonkeyPatch, capability: str) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert not fast_bf16(CPU)
    assert hardware(CPU)["instructions"] == capability


def test_a_processor_without_bf16_does_not_emulate_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert not fast_bf16(CPU)
    with autocast(CPU):
        assert not torch.is_autocast_enabled("cpu")
    with autocast(CPU, "bf16"):
        assert torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("arch", ["convnet3", "preact_resnet8"])
def test_bf16_answers_as_fp32_does(digits_task: Task, arch: str) -> None:
    """To within what eight bits of mantissa leave over a dozen layers."""
    model = build_model(arch, digits_task.modality, 10)
    digits_task.fit(digits_task.train, Context(), model=model, recipe=Recipe(epochs=1, lr=0.02, precision="bf16"))
    exact, coarse = (predict(model, digits_task.test.inputs[:100], precision=p) for p in ("fp32", "bf16"))
    assert bool(torch.isfinite(coarse).all())
    assert float((exact - coarse).norm() / exact.norm()) < 0.05
