"""One attention call of ggml, the library of llama.cpp and of its forks, through its public C interface.

    python -m peers.ggml '{"folder": "...", "type": "q4_0", "context": 4096, ...}'

is what cpu.py runs. The folder holds the shared libraries of a build of llama.cpp, of ggml alone or of a fork. None of
their code is here. K and V lie head by head, which suits them best; the mask that llama.cpp always gives hides nothing.
"""

import ctypes
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from peers.process import serve

TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 8}  # enum ggml_type
MASK_ROWS = 64  # forks want rows for more query tokens than there are
CONTEXT_BYTES, COPY_BYTES = 1 << 20, 64 << 10  # descriptions of tensors and graphs
BITS = {"f16": 16.0, "q8_0": 8.5, "q4_0": 4.5}  # a number in the cache
LARGEST_ERROR = {"f16": 0.01, "q8_0": 0.03, "q4_0": 0.3}  # of the result, for what a few bits cost


class InitParams(ctypes.Structure):
    """struct ggml_init_params"""

    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


class Ggml:
    """Functions of the libraries in a folder, found by name in any of them."""

    def __init__(self, folder: Path) -> None:
        paths = sorted(path for path in folder.rglob("libggml*") if path.suffix in (".so", ".dylib"))
        if not paths:
            raise SystemExit(f"no libggml*.so in {folder}: build llama.cpp or ggml with shared libraries")
        order = ("libggml-base", "libggml-cpu", "libggml")  # each needs those before it
        paths.sort(key=lambda path: order.index(path.stem) if path.stem in order else len(order))
        self._libraries = [ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL) for path in paths if path.stem in order]

    def __call__(self, name: str, *arguments: Any) -> Any:
        """Call a function that returns a pointer or nothing."""
        function = next(getattr(x, name) for x in self._libraries if hasattr(x, name))
        function.restype = ctypes.c_void_p
        return function(*(ctypes.c_void_p(x) if isinstance(x, int) and x > 0xFFFFFFFF else x for x in arguments))


def tensor(ggml: Ggml, memory: int, kind: str, *shape: int) -> int:
    return ggml("ggml_new_tensor_3d", memory, TYPES[kind], *(ctypes.c_int64(size) for size in shape))


def put(ggml: Ggml, target: int, x: np.ndarray) -> None:
    ggml("ggml_backend_tensor_set", target, x.ctypes.data, ctypes.c_size_t(0), ctypes.c_size_t(x.nbytes))


def fill(ggml: Ggml, target: int, kind: str, x: np.ndarray) -> None:
    """Store x, float32 [heads, tokens, head_dim], in a tensor of another type."""
    rows, columns = x.shape[0] * x.shape[1], x.shape[2]
    coded = np.empty(ggml("ggml_nbytes", target), np.uint8)
    numbers = (ctypes.c_int64(0), ctypes.c_int64(rows), ctypes.c_int64(columns))
    # A fork takes one pointer more; the others do not look at it.
    ggml("ggml_quantize_chunk", TYPES[kind], x.ctypes.data, coded.ctypes.data, *numbers, None, None)
    put(ggml, target, coded)


def expected(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Attention of q [heads, head_dim] over k, v [kv_heads, tokens, head_dim] in float64."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    logits = np.einsum("hgd,hnd->hgn", q.reshape(len(k), -1, q.shape[-1]), k) / np.sqrt(q.shape[-1])
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return np.einsum("hgn,hnd->hgd", weights / weights.sum(-1, keepdims=True), v).reshape(q.shape)


class Attention:
    """Graphs of one attention call each, over copies of the same cache."""

    def __init__(self, ggml: Ggml, q: np.ndarray, k: np.ndarray, v: np.ndarray, kind: str, copies: int) -> None:
        (kv_heads, context, head_dim), heads = k.shape, len(q)
        self._ggml, self._graphs = ggml, list[int]()
        self._backend = ggml("ggml_backend_cpu_init")
        memory = ggml("ggml_init", InitParams(CONTEXT_BYTES + copies * COPY_BYTES, None, True))
        query = tensor(ggml, memory, "f32", head_dim, 1, heads)
        mask = tensor(ggml, memory, "f16", context, MASK_ROWS, 1)
        pairs = []
        for _ in range(copies):
            pairs.append([tensor(ggml, memory, kind, head_dim, context, kv_heads) for _ in range(2)])
            scale, none = ctypes.c_float(head_dim**-0.5), ctypes.c_float(0)
            self._out = ggml("ggml_flash_attn_ext", memory, query, *pairs[-1], mask, scale, none, none)
            self._graphs.append(ggml("ggml_new_graph_custom", memory, ctypes.c_size_t(8), ctypes.c_bool(False)))
            ggml("ggml_build_forward_expand", self._graphs[-1], self._out)
        ggml("ggml_backend_alloc_ctx_tensors", memory, self._backend)
        put(ggml, query, q)
        put(ggml, mask, np.zeros((MASK_ROWS, context), np.float16))
        for pair in pairs:
            for target, x in zip(pair, (k, v), strict=True):
                fill(ggml, target, kind, x)

    def __call__(self, i: int) -> None:
        self._ggml("ggml_backend_graph_compute", self._backend, self._graphs[i % len(self._graphs)])

    def set_threads(self, threads: int) -> None:
        self._ggml("ggml_backend_cpu_set_n_threads", self._backend, threads)

    def last_result(self, like: np.ndarray) -> np.ndarray:
        """What the last of the graphs computed."""
        self(-1)
        result = np.empty_like(like)
        size = ctypes.c_size_t(result.nbytes)
        self._ggml("ggml_backend_tensor_get", self._out, result.ctypes.data, ctypes.c_size_t(0), size)
        return result


def main() -> None:
    settings = json.loads(sys.argv[1])
    kind, head_dim = settings["type"], settings["head_dim"]
    random = np.random.default_rng(0)
    q = random.standard_normal((settings["heads"], head_dim), np.float32)
    k, v = random.standard_normal((2, settings["kv_heads"], settings["context"], head_dim), np.float32)
    attention = Attention(Ggml(Path(settings["folder"])), q, k, v, kind, settings["copies"])
    exact = expected(q, k, v)
    error = np.linalg.norm(attention.last_result(q) - exact) / np.linalg.norm(exact)
    if not error < LARGEST_ERROR[kind]:
        raise SystemExit(f"{settings}: the result is wrong by {error:.3f}")
    serve(attention, attention.set_threads)


if __name__ == "__main__":
    main()
