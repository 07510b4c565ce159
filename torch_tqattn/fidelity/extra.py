"""Packages that only the instrument needs."""

from importlib import import_module
from types import ModuleType


def require(name: str) -> ModuleType:
    """The module `name`, which the extra "eval" brings; ModuleNotFoundError that says so if it is missing."""
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name.partition(".")[0]:
            raise
        package = error.name
        raise ModuleNotFoundError(f"{package} is missing: pip install 'torch_tqattn[eval]'", name=package) from error
