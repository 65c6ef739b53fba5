"""What a defender sees. Never triggered test samples, roles, true labels of poisoned samples, or the test set."""

from __future__ import annotations

from typing import TypeVar

import torch

from backdoorlab.core.errors import BackdoorLabError, InputError
from backdoorlab.data.split import Split
from backdoorlab.models.classifier import Classifier
from backdoorlab.training.blueprint import Blueprint

T = TypeVar("T")

PARTS = {
    "model": "the suspicious model",
    "clean": "clean samples of the defender's own",
    "suspicious": "the suspicious training set",
    "blueprint": "architecture and training recipe",
}
"""What a view may hold, in words."""


class DefenderView:
    """What a defense is given, limited to what it declares in ``Defense.reads`` and ``Defense.may_read``.

    A defense that reads anything else is stopped: what a method needs is then always what its facts and its result card
    say. A view cannot be changed.
    """

    __slots__ = ("_blueprint", "_clean", "_model", "_reader", "_reads", "_suspicious")

    _model: Classifier | None
    _clean: Split | None
    _suspicious: Split | None
    _blueprint: Blueprint | None
    _reader: str
    _reads: tuple[str, ...]

    def __init__(
        self,
        *,
        model: Classifier | None = None,
        clean: Split | None = None,
        suspicious: Split | None = None,
        blueprint: Blueprint | None = None,
        reader: str = "this defense",
        reads: tuple[str, ...] = tuple(PARTS),
    ) -> None:
        """Put a view together.

        Args:
            model: the suspicious model, on the context's device; must not be changed by the defense.
            clean: clean samples of the defender's own.
            suspicious: the training set as a defender sees it: no roles, no true labels.
            blueprint: how models of this task are built and trained.
            reader: name of the defense that reads, for messages.
            reads: parts that it may read; all by default.
        """
        parts = {"model": model, "clean": clean, "suspicious": suspicious, "blueprint": blueprint}
        for name, value in {**parts, "reader": reader, "reads": reads}.items():
            object.__setattr__(self, f"_{name}", value)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"a defender's view cannot be changed (tried to set {name!r})")

    def __repr__(self) -> str:
        held = [name for name in PARTS if getattr(self, f"_{name}") is not None]
        return f"DefenderView({', '.join(held) or 'empty'}; {self._reader} reads {', '.join(self._reads) or 'nothing'})"

    def has(self, part: str) -> bool:
        """Is this part there, and may it be read? For what a defense declares in ``may_read``."""
        return part in self._reads and getattr(self, f"_{part}") is not None

    def limited(self, reader: str, reads: tuple[str, ...], may_read: tuple[str, ...] = ()) -> DefenderView:
        """The same view for one defense, which needs the parts in ``reads`` and can do without those in ``may_read``.

        Raises:
            InputError: if a part that it reads is not there, or a weight of the model is not finite.
        """
        view = DefenderView(
            model=self._model,
            clean=self._clean,
            suspicious=self._suspicious,
            blueprint=self._blueprint,
            reader=reader,
            reads=(*reads, *may_read),
        )
        for part in reads:
            getattr(view, part)
        if "model" in reads:
            for name, value in view.model.state_dict().items():
                if not bool(torch.isfinite(value).all()):
                    raise InputError(
                        f"{reader} needs a model whose weights are finite numbers; {name} holds NaN or inf"
                    )
        return view

    @property
    def model(self) -> Classifier:
        """The suspicious model."""
        return self._part("model", self._model)

    @property
    def clean(self) -> Split:
        """Clean samples of the defender's own."""
        return self._part("clean", self._clean)

    @property
    def suspicious(self) -> Split:
        """The training set as a defender sees it."""
        return self._part("suspicious", self._suspicious)

    @property
    def blueprint(self) -> Blueprint:
        """How models of this task are built and trained."""
        return self._part("blueprint", self._blueprint)

    def _part(self, name: str, value: T | None) -> T:
        if name not in self._reads:
            raise BackdoorLabError(
                f"{self._reader} reads {name!r} ({PARTS[name]}) but declares only: "
                f"{', '.join(self._reads) or 'nothing'}; add it to the class variable `reads`"
            )
        if value is None:
            raise InputError(f"{self._reader} needs {PARTS[name]} ({name}), which was not given")
        return value
