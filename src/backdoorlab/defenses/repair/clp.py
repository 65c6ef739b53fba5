"""CLP: zero the channels whose Lipschitz bound is an outlier in its layer; no data at all.

Zheng et al., "Data-free Backdoor Removal Based on Channel Lipschitzness", ECCV 2022. A backdoor must turn a small pattern into
a large change of the features, so the channels that carry it are unusually sensitive. In evaluation mode a convolution W
with its batch norm (gain g, running variance v) is one linear map; channel k of it is bounded by

    L_k = sigma_max( reshape(W_k, [C_in, kernel]) ) |g_k| / sqrt(v_k + eps)

and is pruned (g_k = b_k = 0) when L_k > mean(L) + u std(L), statistics per layer.

Which norm belongs to which convolution is traced by data flow (:func:`~backdoorlab.models.anatomy.conv_norm_pairs`), not
taken from the order in which modules are declared: in pre-activation blocks conv1 -> bn2 is a pair, and the norm after a sum
has none. The standard deviation is the unbiased one (as in the paper's code).

Deviation: with ``transformer=True`` models without such pairs are pruned by the analogue for feed-forward neurons, linear
layers that follow a layer norm (gain g) and feed an activation: L_j = || W_j * g ||_2. The layer norm's own division by the
token's standard deviation depends on the input and is left out, so this ranks neurons but bounds nothing; expect less.

Measured on digits (convnet3, BadNets at 10 %): see ``tests/defenses/test_clp.py``.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from backdoorlab.core.errors import NotApplicable
from backdoorlab.core.method import param
from backdoorlab.data.split import Split
from backdoorlab.defenses.base import RepairDefense, defenses
from backdoorlab.models.anatomy import Channels, Call, channels, conv_norm_pairs, trace
from backdoorlab.models.classifier import Classifier
from backdoorlab.training.context import Context


def channel_lipschitz(conv: _ConvNd, norm: _BatchNorm) -> Tensor:
    """Upper bound of the Lipschitz constant of each channel of ``norm`` after ``conv``: float32 [C_out]."""
    weight = conv.weight.detach().float()
    if isinstance(conv, _ConvTransposeNd):
        weight = weight.transpose(0, 1)
    largest = torch.linalg.matrix_norm(weight.flatten(2), ord=2)
    variance = cast(Tensor, norm.running_var).float()
    gain = torch.ones_like(variance) if norm.weight is None else norm.weight.detach().float().abs()
    return largest * gain / (variance + norm.eps).sqrt()


def outliers(bounds: Tensor, u: float) -> Tensor:
    """Bool [C]: bounds more than ``u`` standard deviations above the mean of their layer."""
    return bounds > bounds.mean() + u * bounds.std()
