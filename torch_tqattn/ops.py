"""Loads the native library and gives devices without kernels the reference. docs/operators.md lists the operators."""

from collections.abc import Callable
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


def _load_library() -> None:
    folder = Path(__file__).parent
    libraries = sorted(folder.glob("_C*.so"))
    if not libraries:
        raise ImportError(
            f"torch_tqattn's native library is missing from {folder}. Build it: pip install --no-build-isolation -e ."
        )
    torch.ops.load_library(libraries[0])


def with_checks(name: str) -> Callable[..., Any]:
    """The reference of operator `name` behind the operator's own checks, whatever the device."""
    operator = getattr(torch.ops.tqattn, name).default
    run = OPERATORS[name]

    def checked(*args: Any, **kwargs: Any) -> Any:
        # On a device without a backend, the native function checks its arguments and does nothing else.
        operator.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.Meta), *args, **kwargs)
        return run(*args, **kwargs)

    return checked


_load_library()
for _name in OPERATORS:
    torch.library.impl(f"tqattn::{_name}", "CompositeExplicitAutograd")(with_checks(_name))
