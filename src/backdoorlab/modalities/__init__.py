"""How raw samples of each modality become model input, and how they are mixed or perturbed."""

from backdoorlab.modalities.base import Modality, modality_from_config, modality_of

__all__ = ["Modality", "modality_from_config", "modality_of"]
