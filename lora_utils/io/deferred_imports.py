"""Packages whose own module is executed when something of it is used, and not because a part of it was imported.

`import torch` is what a run can't do without. torch's compiler, which diffusers, transformers and torch's optimizers
import for a decorator, takes as long again; so do packages that list all models there are.
"""

import importlib
import importlib.util
import inspect
import sys
import threading
from collections.abc import Callable, Sequence
from functools import partial, wraps
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, cast

_COMPILER = "torch._dynamo"
_APART = f"{_COMPILER}._trace_wrapped_higher_order_op"  # transformers' masks import it; it needs nothing of the package


def defer_packages(*names: str) -> None:
    """Let the modules in these packages be imported without the packages' own `__init__`, each until it is used."""
    for name in names:
        if name not in sys.modules:
            _DeferredPackage(name)


def defer_compiler() -> None:
    """Let `import torch._dynamo` cost nothing until something is compiled. What it was to leave alone, it will."""
    if _COMPILER not in sys.modules:
        sys.meta_path.insert(0, _FinderOfParts(_DeferredCompiler(_COMPILER)))


class _DeferredPackage(ModuleType):
    """A package that is executed when a name is asked for that it doesn't have yet."""

    def __init__(self, name: str):
        super().__init__(name)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            raise ModuleNotFoundError(f"No module named {name!r}")
        self.__spec__, self.__loader__, self.__file__ = spec, spec.loader, spec.origin
        self.__package__, self.__path__ = name, list(spec.submodule_search_locations or [])
        self._lock, self._executing = threading.RLock(), False
        sys.modules[name] = self
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, self)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # a question of inspection's, which every module answers with no
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        if not self._execute():
            raise AttributeError(f"partially executed module {self.__name__!r} has no attribute {name!r} yet")
        return getattr(sys.modules[self.__name__], name)

    def _execute(self) -> bool:
        """Execute the package's module, once, and become a plain one; a second thread waits for the first.

        -> False within its own execution
        """
        with self._lock:
            if self._executing:
                return False
            if type(self) is not ModuleType:
                self._executing = True
                try:
                    assert self.__spec__ is not None
                    assert self.__spec__.loader is not None
                    self.__spec__.loader.exec_module(self)
                    cast(Any, self).__class__ = ModuleType
                finally:
                    self._executing = False
        return True


class _DeferredCompiler(_DeferredPackage):
    """torch's compiler: its decorators mark functions for it, which works without it."""

    def __init__(self, name: str):
        super().__init__(name)
        self._marks: list[Callable[[Any], Any]] = []

    def allow_in_graph(self, function: Any) -> Any:
        self._marks.append(lambda compiler: compiler.allow_in_graph(function))
        return function

    def assume_constant_result(self, function: Any) -> Any:
        self._marks.append(lambda compiler: compiler.assume_constant_result(function))
        return function

    def disable(self, function: Any = None, recursive: bool = True, **options: Any) -> Any:
        if function is None:
            return partial(self.disable, recursive=recursive, **options)
        if not inspect.isfunction(function):
            self._execute()
            return self.disable(function, recursive, **options)
        call: list[Callable[..., Any]] = [function]

        def mark(compiler: Any) -> None:
            call[0] = compiler.disable(function, recursive, **options)

        @wraps(function)
        def marked(*args: Any, **kwargs: Any) -> Any:
            return call[0](*args, **kwargs)

        self._marks.append(mark)
        return marked

    def graph_break(self, msg: str = "") -> None:
        """Do nothing: nothing is being compiled."""

    def is_compiling(self) -> bool:
        return False

    def _execute(self) -> bool:
        executed, marks = super()._execute(), self._marks
        if executed:
            self._marks = []
            for mark in marks:
                mark(self)
        return executed


class _FinderOfParts(MetaPathFinder):
    """It has the compiler executed before a part of it is imported, as the import system would."""

    def __init__(self, package: _DeferredPackage):
        self.package = package

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if not name.startswith(f"{_COMPILER}.") or name == _APART or type(self.package) is ModuleType:
            return None
        executed = self.package._execute()
        imported = sys.modules.get(name) if executed else None  # the package may have imported it
        return None if imported is None else ModuleSpec(name, _Imported(imported))


class _Imported(Loader):
    """A loader of what is imported already."""

    def __init__(self, module: ModuleType):
        self.module, self.spec = module, module.__spec__

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return self.module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self.spec
