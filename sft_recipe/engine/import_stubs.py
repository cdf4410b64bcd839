"""Imports in less time: without packages that training never uses, and without looking for garbage meanwhile.

verl is made for reinforcement learning as well. Importing its SFT trainer brings in Ray, a web server and pandas, which
cost more than all else of verl and do nothing here. While verl is imported they are stand-ins, and only for verl:
whoever imports them later, such as a logger, gets the real ones.
"""

import gc
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

UNUSED = ("ray", "fastapi", "uvicorn", "datasets", "pandas", "zmq")


@contextmanager
def quick_imports(unused: Sequence[str] = ()) -> Iterator[None]:
    """For a block of imports: those of the packages `unused` that are not there yet become stand-ins.

    A stand-in may be named, inherited from and decorate a class while the block lasts. Whoever calls it afterwards gets
    a RuntimeError that says what was left out, except for `ray.is_initialized()`, which is False.
    """
    finder = _Finder([name for name in unused if name not in sys.modules])
    was_enabled = gc.isenabled()
    gc.disable()  # a module is no garbage: looking for some takes a quarter of the time
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        finder.is_importing = False
        for name in finder.made:
            sys.modules.pop(name, None)
        gc.freeze()  # nor will it be: later looks for garbage skip what was imported
        if was_enabled:
            gc.enable()


class _Finder(MetaPathFinder, Loader):
    """Finds stand-ins for some packages and for all that is in them."""

    def __init__(self, packages: list[str]):
        self.packages = packages
        self.made: list[str] = []
        self.is_importing = True

    def find_spec(self, name: str, _path: Any, _target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.partition(".")[0] in self.packages else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        self.made.append(spec.name)
        return _Module(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        module.__dict__["_stand_in"] = lambda name: _StandIn(name, (), {"_finder": self})
        if module.__name__ == "ray":
            module.__dict__["is_initialized"] = lambda: False


class _Module(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._stand_in(f"{self.__name__}.{name}")


class _StandIn(type):
    """A class in place of whatever a module has by that name."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _StandIn(f"{cls.__name__}.{name}", (), {"_finder": cls._finder})

    def __call__(cls, *_args: Any, **_kwargs: Any) -> Any:
        if cls._finder.is_importing:
            return cls
        raise RuntimeError(
            f"{cls.__name__} was called, but training was thought not to need it: see UNUSED in {__file__}"
        )
