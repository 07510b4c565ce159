"""The specialisations in which the shaders are checked: not every combination, but every value of each macro."""

from itertools import product

from torch_tqattn import format as fmt

INPUTS = ("float", "half", "bfloat")
QUERIES = (1, 2)
MATRIX_QUERIES = (8, 16)
MATRIX_HEAD_DIMS = (64, 128, 192, 256)
BLOCK_HEAD_DIMS = (64, 128, 256, 512)

Macros = dict[str, object]


def side_macros(side: str, storage: fmt.Format, has_means: bool) -> Macros:
    """How K or V is stored."""
    low, high = (*storage.planes, 0)[:2]
    widths = {f"TQ_{side}_BITS": storage.bits, f"TQ_{side}_LOW": low, f"TQ_{side}_HIGH": high}
    return {**widths, f"TQ_{side}_MEANS": int(has_means)}


def _side(side: str, name: str, blocks: bool) -> Macros:
    storage = fmt.FORMATS[name]
    return side_macros(side, storage, blocks and storage.is_coded)


def _stores() -> list[Macros]:
    """Every head dim, and every format of K next to another of V, with blocks and without; what the seeds have."""
    names = list(fmt.FORMATS)
    pairs = [(128, k, v) for k, v in zip(names, names[1:] + names[:1], strict=True)]
    pairs += [(head_dim, "tq8", "tq4") for head_dim in fmt.HEAD_DIMS] + [(80, "tq5", "tq3"), (512, "f16", "f16")]
    seed_pairs = product((256, 512), (("tq4", "tq4"), ("tq5-byte", "tq6-byte"), ("f16", "tq8")))
    cases = [(*pair, blocks, False) for pair, blocks in product(pairs, (False, True))]
    cases += [(head_dim, k, v, False, True) for head_dim, (k, v) in seed_pairs]
    return [
        {"TQ_HEAD_DIM": head_dim, **_side("K", k, blocks), **_side("V", v, blocks)}
        | {"TQ_TAIL": int(blocks), "TQ_EXACT_LEVELS": int(exact)}
        for head_dim, k, v, blocks, exact in cases
    ]


def _with(macros: list[Macros], name: str, values: tuple[object, ...]) -> list[Macros]:
    """The same specialisations with one macro more, which takes its values in turn."""
    return [{**m, name: values[i % len(values)]} for i, m in enumerate(macros)]


def specialisations(shader: str) -> list[Macros]:
    """The macros of each specialisation of a shader, by the name of its file; KeyError for an unknown one."""
    head_dims = [{"TQ_HEAD_DIM": d} for d in fmt.HEAD_DIMS]
    matrices = [m for m in _stores() if m["TQ_HEAD_DIM"] in MATRIX_HEAD_DIMS]
    varied = {"TQ_INPUT": INPUTS[1:], "TQ_QUERIES": MATRIX_QUERIES, "TQ_OUTPUT": INPUTS}
    for name, values in {**varied, "TQ_WHOLE": (1, 1, 0), "TQ_STAGED": (1, 0, 0)}.items():
        matrices = _with(matrices, name, values)
    wide: dict[str, tuple[object, ...]] = {"TQ_INPUT": INPUTS, "TQ_WIDE": (1, 0)}
    blocks = [m for m in _stores() if m["TQ_HEAD_DIM"] in BLOCK_HEAD_DIMS and m["TQ_TAIL"]]
    for name, values in {**wide, "TQ_PIECES": (8, 4, 2, 1), "TQ_BEST": (0, 0, 1)}.items():
        blocks = _with(blocks, name, values)
    known = {
        "attend_matrix.metal": matrices,
        "attend.metal": _with(_with(_stores(), "TQ_INPUT", INPUTS), "TQ_QUERIES", QUERIES),
        "decode.metal": _stores(),
        "encode.metal": _with(_with(_stores(), "TQ_INPUT", INPUTS), "TQ_WIDE", (1, 0)),
        "encode_block.metal": blocks,
        "reduce.metal": _with([{**d, "TQ_OUTPUT": t} for d, t in product(head_dims, INPUTS)], "TQ_WIDE", (1, 0)),
        "rotate.metal": [{**d, "TQ_INPUT": t} for d, t in product(head_dims, INPUTS)],
    }
    if shader not in known:
        raise KeyError(f"tests/metal/specialisations.py does not say how {shader} is specialised")
    return known[shader]
