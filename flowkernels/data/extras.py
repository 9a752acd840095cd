"""Packages that only some commands need."""

import importlib
from types import ModuleType


def optional(module: str, package: str, purpose: str) -> ModuleType:
    """Import a module of the extra [demo].

    Raises:
        ModuleNotFoundError: it is missing; the message says what for and how to get it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # of what it needs itself
        raise ModuleNotFoundError(f"{purpose} needs {package}: pip install 'flowkernels[demo]'", name=module) from None
