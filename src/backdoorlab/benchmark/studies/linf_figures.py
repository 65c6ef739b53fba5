"""Figures of the study of l-infinity pruning."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from backdoorlab.analysis.figures import BAD, GREY, Row, drawn_rows
from backdoorlab.analysis.panels import COLORS, Curve, Panel, draw_panels

_NORMS = {"l1": "l1", "l2": "l2", "linf": "l-infinity"}
_SETTINGS = (
    ("benign", "clean", "benign model, clean", "#8c959f"),
    ("benign", "triggered", "benign model, triggered", COLORS[0]),
    ("backdoored", "clean", "backdoored model, clean", COLORS[3]),
    ("backdoored", "triggered", "backdoored model, triggered", BAD),
)
_BINS = 24
_STYLES = ("-", "--", "-.")
"""Of lines that may lie on each other."""

Tensors = Mapping[str, Mapping[str, Tensor]]


def histograms(about: str, norms: Tensors) -> bytes:
    """Largest channel of each sample under the four settings; a row per attack, a column per norm."""
    rows = []
    for attack, found in norms.items():
        row: list[Panel] = []
        for statistic, label in _NORMS.items():
            values = {(m, k): found[f"{m}.{k}.{statistic}.peak"].double() for m, k, _, _ in _SETTINGS}
            low = min(float(v.min()) for v in values.values())
            high = max(float(v.max()) for v in values.values())
            edges = torch.linspace(low, high if high > low else low + 1, _BINS + 1, dtype=torch.float64)
            middle = ((edges[1:] + edges[:-1]) / 2).tolist()
            curves = []
            for model, kind, name, color in _SETTINGS:
                counts = torch.histogram(values[model, kind], edges)[0]
                curves.append(Curve(name, middle, (counts / counts.sum()).tolist(), color, kind="area"))
            row.append(
                Panel(f"{attack}: {label}", "largest norm of a map", "share of samples" if not row else "", curves)
            )
        rows.append(row)
    return draw_panels("Norms of the last maps", f"{about}; test samples", rows)


def channels(about: str, norms: Tensors) -> bytes:
    """Mean norm of every channel, triggered over clean."""
    rows = []
    for attack, found in norms.items():
        row: list[Panel] = []
        for statistic, label in _NORMS.items():
            curves, limit = [], 0.0
            for model, name, color in (
                ("benign", "benign model", COLORS[0]),
                ("backdoored", "backdoored model", BAD),
            ):
                x, y = (found[f"{model}.{kind}.{statistic}.mean"].tolist() for kind in ("clean", "triggered"))
                limit = max(limit, *x, *y)
                curves.append(Curve(name, x, y, color, style="", marker="o"))
            curves.insert(0, Curve("unchanged", [0, limit], [0, limit], GREY, style=":"))
            row.append(
                Panel(f"{attack}: {label}", "mean norm, clean", "mean norm, triggered" if not row else "", curves)
            )
        rows.append(row)
    return draw_panels("What a trigger does to each channel", f"{about}; one mark per channel of the last maps", rows)


def pruning(about: str, sweeps: Tensors, chosen: Mapping[str, Mapping[str, float]]) -> bytes:
    """ACC and ASR over the fraction pruned; columns: ACC and ASR by the recovered, then by the real trigger."""
    rows = []
    for attack, found in sweeps.items():
        xs = [100 * f for f in found["fractions"].tolist()]
        row: list[Panel] = []
        for trigger in ("recovered", "real"):
            for short in ("acc", "asr"):
                curves = [
                    Curve(label, xs, found[f"{statistic}.{trigger}.{short}"].tolist(), color, style)
                    for (statistic, label), color, style in zip(_NORMS.items(), COLORS, _STYLES, strict=False)
                ]
                marks = [
                    (100 * chosen[attack][statistic], color)
                    for statistic, color in zip(_NORMS, COLORS, strict=False)
                    if trigger == "recovered"
                ]
                title = f"{attack}: {short.upper()}, {trigger} trigger"
                label = "share of test samples" if not row else ""
                row.append(Panel(title, "channels pruned (%)", label, curves, y_range=(-0.03, 1.05), marks=marks))
        rows.append(row)
    subtitle = f"{about}; ranked by each norm; dashed: fraction that clean samples and the recovered trigger choose"
    return draw_panels("Pruning by each norm", subtitle, rows)


def heat_maps(about: str, attack: str, found: Mapping[str, Tensor]) -> bytes:
    """Grad-CAM of the predicted class over clean and triggered images, in both models."""
    rows = []
    for kind in ("clean", "triggered"):
        rows.append(Row(kind, found[kind]))
        for model in ("benign", "backdoored"):
            if f"{model}.{kind}" in found:
                rows.append(Row(f"{model} model,\n{kind}", overlaid(found[kind], found[f"{model}.{kind}"])))
    return drawn_rows(f"{attack}: Grad-CAM", f"{about}; heat of the predicted class on the last maps", rows)


def overlaid(images: Tensor, heat: Tensor) -> Tensor:
    """Heat in colors over dimmed grey images: uint8 [S,C,H,W] and float [S,H,W] in [0, 1] -> uint8 [S,3,H,W]."""
    from matplotlib import colormaps

    painted = torch.from_numpy(colormaps["inferno"](heat.clamp(0, 1).numpy())[..., :3].copy()).permute(0, 3, 1, 2)
    grey = images.double().mean(1, keepdim=True) / 255
    return (255 * (0.35 * grey + 0.65 * painted)).clamp(0, 255).round().to(torch.uint8)
