"""Instruction sets that the user holds libraries to."""

from __future__ import annotations

import os


def onednn_limit() -> str | None:
    """What ``ONEDNN_MAX_CPU_ISA`` (older name ``DNNL_MAX_CPU_ISA``) limits oneDNN to; None if to nothing."""
    return os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or None
