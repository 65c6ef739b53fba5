"""One registry object per kind of thing: found by name, extended by plain imports and by entry points.

Built-in methods register themselves when their file is imported; the files of the registry's packages are imported on
the first look-up. Other installed packages extend a registry through an entry point of the registry's group whose
value is a module (or an object in it) that registers on import. A plug-in that fails to import is an error, not a
warning: a benchmark that silently lacks a method is worse than one that does not start.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from importlib.metadata import entry_points
from typing import ClassVar, Generic, Protocol, TypeVar

from backdoorlab.core.errors import BackdoorLabError, InputError, nearest, unknown


class Named(Protocol):
    """What every registered class states; it may have ``aliases`` too."""

    name: ClassVar[str]
    modalities: ClassVar[tuple[str, ...]]


T = TypeVar("T", bound=Named)


class Registry(Generic[T]):
    """Names to classes. One name may serve several modalities through several classes (badnets: image, text, ...)."""

    def __init__(self, kind: str, packages: tuple[str, ...], group: str) -> None:
        self.kind, self.packages, self.group = kind, packages, group
        self._entries: dict[tuple[str, str], type[T]] = {}
        self._aliases: dict[str, str] = {}
        self._loaded = False

    def register(self, cls: type[T]) -> type[T]:
        """Class decorator; the class states its ``name`` and ``modalities``, and may have ``aliases``.

        Raises:
            BackdoorLabError: if another method has that name for one of these modalities, or a name and an alias of two
                methods are the same: one of them could never be found. Nothing is registered then.
        """
        name, aliases = cls.name, _aliases(cls)
        for modality in cls.modalities:
            other = self._entries.get((name, modality))
            if other is not None and (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
                raise BackdoorLabError(
                    f"two {self.kind}s are called {name!r} for {modality}: {other.__module__} and {cls.__module__}"
                )
        names = {n: entry.__module__ for (n, _), entry in self._entries.items()}
        if name in self._aliases:
            raise BackdoorLabError(
                f"{self.kind} {name!r} ({cls.__module__}) has the name of an alias of {self._aliases[name]!r}"
            )
        for alias in aliases:
            if alias == name or alias in names:
                whose = "its own name" if alias == name else f"the name of another one ({names[alias]})"
                raise BackdoorLabError(f"{self.kind} {name!r} ({cls.__module__}): alias {alias!r} is {whose}")
            other_name = self._aliases.get(alias, name)
            if other_name != name:
                raise BackdoorLabError(
                    f"{self.kind}s {other_name!r} and {name!r} ({cls.__module__}) share the alias {alias!r}"
                )
        self._entries.update({(name, modality): cls for modality in cls.modalities})
        self._aliases.update(dict.fromkeys(aliases, name))
        return cls

    def canonical(self, name: str) -> str:
        """The registered name behind an alias; any other name as it is."""
        self._load()
        return self._aliases.get(name, name)

    def get(self, name: str, modality: str | None = None) -> type[T]:
        """Return the class of that name or alias.

        Raises:
            InputError: for an unknown name (with the nearest one) or a modality that the method does not serve.
        """
        name = self.canonical(name)
        served = {m: c for (n, m), c in self._entries.items() if n == name}
        if not served:
            raise unknown(self.kind, name, self.names(modality) or self.names())
        if modality is None:
            return next(iter(served.values()))
        if modality not in served:
            raise InputError(
                f"{self.kind} {name!r} does not serve {modality} data, only: {', '.join(sorted(served))}. "
                f"For {modality}: {', '.join(self.names(modality)) or 'none yet'}"
            )
        return served[modality]

    def names(self, modality: str | None = None) -> list[str]:
        """Sorted names, of one modality if given."""
        self._load()
        return sorted({n for n, m in self._entries if modality in (None, m)})

    def __iter__(self) -> Iterator[type[T]]:
        """Yield each registered class once, by name."""
        self._load()
        yield from dict.fromkeys(cls for _, cls in sorted(self._entries.items(), key=lambda item: item[0]))

    def _load(self) -> None:
        if self._loaded:
            return
        self._loaded = True
        try:
            for package in self.packages:
                root = importlib.import_module(package)
                for info in pkgutil.walk_packages(root.__path__, prefix=f"{package}."):
                    importlib.import_module(info.name)
            for point in entry_points(group=self.group):
                try:
                    loaded: object = point.load()
                except Exception as error:
                    raise BackdoorLabError(f"plug-in {point.name!r} ({point.value}) failed to load: {error}") from error
                if isinstance(loaded, type) and hasattr(loaded, "modalities"):
                    self.register(loaded)
        except BaseException:
            self._loaded = False
            raise


def by_attribute(registry: Registry[T], name: str) -> type[T]:
    """The class that is meant by an attribute such as ``attacks.BadNets`` or ``defenses.ANP``.

    Class names, registered names and aliases are understood, without regard to case and underscores. Where a name
    serves several modalities the first is returned; methods follow the task that they are used on.

    Raises:
        AttributeError: if there is none, with the nearest one.
    """
    if name.startswith("_"):
        raise AttributeError(name)
    classes: dict[str, type[T]] = {}
    for cls in registry:
        for label in (cls.__name__, cls.name, *_aliases(cls)):
            classes.setdefault(_folded(label), cls)
    if _folded(name) not in classes:
        raise AttributeError(f"no {registry.kind} {name!r}.{nearest(_folded(name), classes)}")
    return classes[_folded(name)]


def _aliases(cls: type[Named]) -> tuple[str, ...]:
    return getattr(cls, "aliases", ())


def _folded(name: str) -> str:
    return name.replace("_", "").replace("-", "").lower()
