"""A double of Metal for Linux: with it, a torch without Apple's GPUs holds mps tensors, and the very Objective-C++ of
torch_tqattn runs on them. Load it right after torch, before anything asks whether there is an mps device, because torch
asks once:

    import metal.hosted
    metal.hosted.load()

or run any tests under it: TQATTN_HOSTED_MPS=1 pytest -k mps

It executes kernels with the compiler of metal/executed, which $TQATTN_METAL_MODE makes look for races ("race") or
memory errors ("sanitised"; process.py says what else that needs). It cannot show that Apple's compiler takes the
shaders, what a GPU's numbers and races are, or how fast anything is.
"""

import os
import shlex
import sys

import torch

from metal import mutations

from . import build

COMPILER = build.HERE.parent / "executed" / "compile.py"


def load() -> None:
    """Gives torch the mps device, and torch_tqattn its backend for it. Raises MissingToolError if a tool is missing."""
    torch.ops.load_library(build.double())
    if not torch.backends.mps.is_available():
        raise RuntimeError("the double was loaded too late: torch already knows that there is no mps device")
    torch.UntypedStorage.mps = _storage_to_mps  # type: ignore[assignment, method-assign]
    use_compiler()
    import torch_tqattn  # noqa: F401  (registers the operators that the backend implements)

    torch.ops.load_library(build.backend(mutations.current()))


def _storage_to_mps(storage: torch.UntypedStorage) -> torch.UntypedStorage:
    """What torch.load does; torch's own way is compiled only where there is MPS."""
    return torch.empty(0, dtype=torch.uint8).set_(storage).to("mps").untyped_storage()


def use_compiler() -> None:
    """Lets the double compile shaders as the executed proof does, with a fault of metal/mutations.py if one is set."""
    command = [sys.executable, str(COMPILER), "--mode", os.environ.get("TQATTN_METAL_MODE", "plain")]
    mutation = mutations.current()
    if mutation is not None and mutation.is_of_shader:
        command += ["--replace", mutation.old, mutation.new]
    # The sanitisers' libraries are for this process, not for the compiler.
    torch.ops.metal_double.set_compiler(f"env -u LD_PRELOAD {shlex.join(command)}")
