"""Model builders and the anatomy helpers with which defenses read models."""

from backdoorlab.models.classifier import Classifier, build_model, default_model, models

__all__ = ["Classifier", "build_model", "default_model", "models"]
