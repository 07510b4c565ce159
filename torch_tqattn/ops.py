"""Loads the native library and gives devices without kernels the reference. docs/operators.md lists the operators."""

import platform
from collections.abc import Callable
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import torch

from . import reference, reference_seed

OPERATORS: dict[str, Callable[..., Any]] = {
    "rotate": reference.rotate,
    "encode_kv_": reference.encode_kv_,
    "attend": reference.attend,
    "decode_kv": reference.decode_kv,
    "decode_step_": reference.decode_step_,
    "fwht_sign_premult": reference_seed.fwht_sign_premult,
    "fwht_sign_undo": reference_seed.fwht_sign_undo,
    "hadamard_quantize_kv": reference_seed.hadamard_quantize_kv,
    "hadamard_quantize_kv_hb": reference_seed.hadamard_quantize_kv_hb,
    "flash_attn_vec_tq": reference_seed.flash_attn_vec_tq,
    "flash_attn_vec_tq_hb": reference_seed.flash_attn_vec_tq_hb,
    "flash_attn_vec_tq_hb_with_fused_undo": reference_seed.flash_attn_vec_tq_hb_with_fused_undo,
    "flash_attn_vec_hybrid": reference_seed.flash_attn_vec_hybrid,
    "flash_attn_vec_reduce": reference_seed.flash_attn_vec_reduce,
    "flash_attn_vec_reduce_tq_hb_undo": reference_seed.flash_attn_vec_reduce_tq_hb_undo,
}


def load_library(folder: Path) -> None:
    """Load this Python's native library from `folder`; ImportError, with what to do, if there is none that fits."""
    built = [folder / f"_C{suffix}" for suffix in EXTENSION_SUFFIXES]
    library = next((path for path in built if path.exists()), None)
    if library is None:
        others = ", ".join(sorted(path.name for path in folder.glob("_C*.so")))
        raise ImportError(
            f"torch_tqattn's native library for Python {platform.python_version()} is missing from {folder}"
            f"{f', which has {others} of another Python' if others else ''}. "
            "Build it, in a checkout: pip install --no-build-isolation -e ."
        )
    try:
        torch.ops.load_library(library)
    except OSError as error:
        raise ImportError(
            f"{library} cannot be loaded with PyTorch {torch.__version__}: it was built for another one. "
            "Build it for this one, in a checkout: rm -rf build && pip install --no-build-isolation -e .\n"
            f"({error.__cause__ or error})"  # torch says only which file
        ) from error


def with_checks(name: str) -> Callable[..., Any]:
    """The reference of operator `name` behind the operator's own checks, whatever the device."""
    operator = getattr(torch.ops.tqattn, name).default
    run = OPERATORS[name]

    def checked(*args: Any, **kwargs: Any) -> Any:
        # On a device without a backend, the native function checks its arguments and does nothing else.
        operator.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.Meta), *args, **kwargs)
        return run(*args, **kwargs)

    return checked


load_library(Path(__file__).parent)
for _name in OPERATORS:
    torch.library.impl(f"tqattn::{_name}", "CompositeExplicitAutograd")(with_checks(_name))
