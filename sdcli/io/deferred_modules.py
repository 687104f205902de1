"""Stand-ins for modules and for names in them, which import the real ones when they are first used.

For libraries that import at their top what they need for rare things, such as a client for the network. A stand-in
can be called, subclassed, asked for attributes and compared with by isinstance; only `except` needs the real class.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import types
from collections.abc import Iterator, Mapping
from importlib.machinery import ModuleSpec
from typing import Any

_packages_distributions = importlib.metadata.packages_distributions  # which may be replaced by the class below


class DeferredName:
    """A function, class or constant of a module that is not imported yet."""

    def __init__(self, module: str, name: str) -> None:
        self._module, self._name = module, name

    def _real(self) -> Any:
        module = importlib.import_module(self._module)
        found = getattr(module, self._name)
        if isinstance(found, DeferredName):
            raise ImportError(f"{self._module}.{self._name} is needed while {self._module} is being left out")
        return found

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._real()(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what inspect and functools ask of anything
            raise AttributeError(name)
        return getattr(self._real(), name)

    def __instancecheck__(self, instance: object) -> bool:
        return isinstance(instance, self._real())

    def __subclasscheck__(self, subclass: type) -> bool:
        return issubclass(subclass, self._real())

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[type, ...]:
        return (self._real(),)

    def __or__(self, other: Any) -> Any:
        """An annotation such as `Name | None`."""
        return Any

    __ror__ = __or__


class DeferredModule(types.ModuleType):
    """A module, with all names that one may ask it for as deferred ones."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__: list[str] = []
        self.__spec__ = ModuleSpec(name, None, is_package=True)  # find_spec raises for a module without

    def __getattr__(self, name: str) -> Any:
        if name == "__version__":
            return importlib.metadata.version(self.__name__)
        if name.startswith("__"):
            raise AttributeError(name)
        return DeferredName(self.__name__, name)


class DeferredDistributions(Mapping[str, list[str]]):
    """What `importlib.metadata.packages_distributions` returns, which reads the lists of all installed files."""

    def __init__(self) -> None:
        self._found: Mapping[str, list[str]] | None = None

    def _all(self) -> Mapping[str, list[str]]:
        if self._found is None:
            self._found = _packages_distributions()
        return self._found

    def __getitem__(self, package: str) -> list[str]:
        return self._all()[package]

    def __iter__(self) -> Iterator[str]:
        return iter(self._all())

    def __len__(self) -> int:
        return len(self._all())

    def __bool__(self) -> bool:
        return True
