"""What an attack makes first and shares between runs: a surrogate, an encoder, a generator, a pattern.

The key under which it is kept is not written by hand. It holds the arguments of the method that makes it and every
hyper-parameter of the attack but those that are declared in ``unread``; while it is made, these cannot be read:

    @asset("my-noise", unread=(*SELECTION, "strength"))
    def noise(self, ctx, surrogate: Task):
        model = clean_surrogate(surrogate, ctx)
        return {"noise": optimise(model, surrogate.train.inputs, self.target, self.steps, ctx)}

    def make_trigger(self, task, ctx):
        found = self.noise(ctx, surrogate=task).tensor("noise", tuple(task.train.inputs.shape[1:]))
        return AdditiveTrigger(self.strength * found)

Here the key holds data, model and recipe of the task, ``target``, ``steps`` and every hyper-parameter that is added
later. One that is missing from ``unread`` costs a needless training; one that is there by mistake is an error at once.
The attack's code counts like its hyper-parameters, but does not change the seed.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar, cast, overload

import torch
from torch import Tensor, nn

from backdoorlab.attacks.base import Attack
from backdoorlab.attacks.common.surrogate import asset_tensor, load_weights, surrogate_spec
from backdoorlab.core.errors import BackdoorLabError, InputError
from backdoorlab.core.seeding import isolated_rng
from backdoorlab.data.split import Split, content_digest
from backdoorlab.tasks import Task
from backdoorlab.training.context import Context, Tensors

SELECTION = ("poison_rate", "exclude_target", "cap_rate")
"""Hyper-parameters that say which training samples are poisoned: what is made before has no use for them."""

A = TypeVar("A", bound=Attack)
P = ParamSpec("P")
N = TypeVar("N", bound=nn.Module)


@dataclass(frozen=True)
class Asset:
    """Named tensors that were made once, or that lie in a file of the user's.

    Attributes:
        kind: of the asset, such as "lf-pattern".
        tensors: by name.
    """

    kind: str
    tensors: Tensors

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """One tensor, float32; see :func:`~backdoorlab.attacks.common.surrogate.asset_tensor` for what is refused."""
        return asset_tensor(self.tensors, name, shape, self.kind)

    def network(self, build: Callable[[], N]) -> N:
        """A network with these weights; see :func:`~backdoorlab.attacks.common.surrogate.load_weights`.

        Args:
            build: makes it with any weights; may draw from torch's global generators, which stay as they are.

        Returns:
            The network, in evaluation mode, without gradients.

        Raises:
            InputError: if names or shapes differ from the network's.
        """
        with isolated_rng(0):
            network = build()
        load_weights(network, self.tensors, self.kind)
        return network


class AssetMethod(Generic[A, P]):
    """A method of an attack that makes an asset; calling it gives the :class:`Asset`, made now or before.

    Attributes:
        kind: of the asset, one of the attack's ``asset_kinds``.
        unread: hyper-parameters that are not part of the key and cannot be read while the asset is made.
        build: (attack, context, arguments) -> tensors.
    """

    def __init__(
        self, kind: str, unread: tuple[str, ...], build: Callable[Concatenate[A, Context, P], Tensors]
    ) -> None:
        """See :func:`asset`."""
        # Variables of an enclosing function would reach the tensors past the key.
        if outer := [name for name in build.__code__.co_freevars if name != "__class__"]:
            raise TypeError(f"the asset {kind} must not use the outer variable {outer[0]!r}: make it an argument")
        self.kind, self.unread, self.build = kind, unread, build
        functools.update_wrapper(self, build)

    @overload
    def __get__(self, attack: None, owner: type[A]) -> AssetMethod[A, P]: ...
    @overload
    def __get__(self, attack: A, owner: type[A]) -> Callable[Concatenate[Context, P], Asset]: ...
    def __get__(self, attack: A | None, owner: type[A]) -> AssetMethod[A, P] | Callable[Concatenate[Context, P], Asset]:
        """Bind to an attack, as any method."""
        return self if attack is None else functools.partial(self.__call__, attack)

    def __call__(self, attack: A, ctx: Context, *args: P.args, **kwargs: P.kwargs) -> Asset:
        """The asset of these hyper-parameters and arguments.

        Raises:
            BackdoorLabError: if the attack does not declare the kind, if ``unread`` names no hyper-parameter, or if one
                that is in ``unread`` is read.
            InputError: if a hyper-parameter names a file or folder that is not there.
        """
        if self.kind not in attack.asset_kinds:
            raise BackdoorLabError(f"{attack.name}: the asset {self.kind} is not among the class's asset_kinds")
        spec, closed = self._spec(attack, ctx, *args, **kwargs)
        guarded = _guarded(attack, self.kind, closed)

        def build(asset_ctx: Context) -> Tensors:
            return self.build(guarded, asset_ctx, *args, **kwargs)

        return Asset(self.kind, ctx.asset(self.kind, spec, build, unseeded=_code(attack)))

    def spec(self, attack: A, ctx: Context, *args: P.args, **kwargs: P.kwargs) -> dict[str, Any]:
        """Everything that the asset depends on, JSON-able: its key, and where its seed comes from."""
        return self._spec(attack, ctx, *args, **kwargs)[0]

    def _spec(self, attack: A, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], frozenset[str]]:
        """Also which hyper-parameters are not part of it."""
        fields = {field.name: field for field in dataclasses.fields(attack)}
        if unknown := [name for name in self.unread if name not in fields]:
            raise BackdoorLabError(
                f"{attack.name}: {unknown[0]!r}, unread by the asset {self.kind}, is no hyper-parameter"
            )
        bound = inspect.signature(self.build).bind(attack, *args, **kwargs)
        bound.apply_defaults()
        spec: dict[str, Any] = {}
        for name, value in list(bound.arguments.items())[2:]:
            spec |= _entries(name, value)
        closed = frozenset(self.unread) | (spec.keys() & fields.keys())
        read = [field for name, field in fields.items() if name not in closed]
        files = attack.file_digests(only={field.name for field in read})
        for field in read:
            spec[field.name] = files.get(field.name, "") if field.metadata.get("path") else getattr(attack, field.name)
        return spec, closed


def asset(
    kind: str, *, unread: tuple[str, ...] = ()
) -> Callable[[Callable[Concatenate[A, Context, P], Tensors]], AssetMethod[A, P]]:
    """Turn a method that makes tensors into one that makes them once for all runs, see above.

    The method gets the attack, a context whose seed follows from the key, and its arguments. An argument is part of the
    key by its value: a number, text or a list of these as it is, tensors and splits by a hash of their content, a task
    by :func:`~backdoorlab.attacks.common.surrogate.surrogate_spec`, which knows nothing of its test data; the entries
    of a task that is called ``task`` lie in the key side by side with the others. An argument or entry with the name of
    a hyper-parameter stands in its place: that one cannot be read either. Hyper-parameters that name files or folders
    are part of the key by their content, "" for none.

    Args:
        kind: of the asset, one of the attack's ``asset_kinds``.
        unread: hyper-parameters that the tensors do not depend on, or only through arguments.

    Raises:
        TypeError: if the method uses variables of a function around it.
    """
    return lambda build: AssetMethod(kind, unread, build)


def _entries(name: str, value: object) -> dict[str, Any]:
    """What an argument adds to a key."""
    if isinstance(value, Task):
        return surrogate_spec(value) if name == "task" else {name: surrogate_spec(value)}
    if isinstance(value, Split):
        return {name: content_digest(value.inputs, value.labels)}
    if isinstance(value, Tensor):
        return {name: content_digest(value, torch.zeros(0, dtype=torch.int64))}
    return {name: value}


def _code(attack: Attack) -> dict[str, str]:
    """What tells apart assets of an attack whose code was changed."""
    try:
        return {"code digest": getattr(type(attack), "_unguarded", type(attack)).code_digest()}
    except InputError:  # typed in, not in a file: the benchmark, which keeps assets, refuses such a class
        return {}


def _guarded(attack: A, kind: str, closed: frozenset[str]) -> A:
    """The same attack, of whose hyper-parameters some cannot be read."""
    plain, original = type(attack), getattr(type(attack), "_unguarded", type(attack))

    def read(self: object, name: str) -> Any:
        if name in closed:
            raise BackdoorLabError(
                f"{plain.name}: making the asset {kind} reads the hyper-parameter {name!r}, which is not part of its "
                "key; take it out of `unread`, or pass as an argument what depends on it"
            )
        return plain.__getattribute__(self, name)

    names = {"__module__": plain.__module__, "__doc__": plain.__doc__, "__getattribute__": read, "_unguarded": original}
    guarded: object = object.__new__(type(plain.__name__, (plain,), names))
    guarded.__dict__.update(vars(attack))
    return cast(A, guarded)
