"""How many workgroups and simdgroups the seed-shaped kernels take, and what the environment may change about it."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

ops = torch.ops.tqattn

VARIABLES = ("TQATTN_TQ_NWG", "TQATTN_HYBRID_NWG", "TQATTN_TQ_NSG")
LENGTHS = (1, 512, 513, 1024, 1025, 2**31 - 1)

# Reads the policy, then sets every variable to another valid value and reads it again.
READ_TWICE = f"""
import os, torch, torch_tqattn
read = lambda: [[tuple(torch.ops.tqattn.launch_policy(kind, length)) for length in {LENGTHS}]
                for kind in ("tq", "tq_hb", "hybrid")]
first = read()
for name in {VARIABLES}:
    os.environ[name] = "2"
print(first, first == read())
"""


def policy(
    nwg: int | None = None, hybrid_nwg: int | None = None, nsg: int | None = None
) -> list[list[tuple[int, int]]]:
    """[tq, tq_hb, hybrid], each by length; a number overrides."""
    nwg_by_length = [16, 16, 32, 32, 32, 32]
    nsg_by_length = [1, 1, 1, 1, 4, 4]
    rows = [[16] * 6, nwg_by_length, nwg_by_length]
    forced = [nwg, nwg, hybrid_nwg]
    return [
        [(f or w, 1 if kind == 0 else nsg or s) for w, s in zip(row, nsg_by_length, strict=True)]
        for kind, (row, f) in enumerate(zip(rows, forced, strict=True))
    ]


@pytest.fixture(autouse=True)
def _clean_environment() -> None:
    if any(name in os.environ for name in VARIABLES):
        pytest.skip("the environment overrides the policy of this process")


def test_policy_by_length() -> None:
    kinds = ("tq", "tq_hb", "hybrid")
    assert [[ops.launch_policy(kind, length) for length in LENGTHS] for kind in kinds] == policy()


@pytest.mark.parametrize("kind", ["", "TQ", "tq ", "f16"])
def test_an_unknown_kind_is_refused(kind: str) -> None:
    with pytest.raises(ValueError, match=f"unknown kernel kind '{kind}'; choose one of tq, tq_hb, hybrid"):
        ops.launch_policy(kind, 1)


@pytest.mark.parametrize(
    ("op", "kv_seq_len", "nwg"),
    [
        ("flash_attn_vec_tq", 513, 16),
        ("flash_attn_vec_tq_hb", 512, 16),
        ("flash_attn_vec_tq_hb", 513, 32),
        ("flash_attn_vec_tq_hb_with_fused_undo", 513, 32),
        ("flash_attn_vec_hybrid", 512, 16),
        ("flash_attn_vec_hybrid", 513, 32),
    ],
)
def test_an_operator_without_a_number_takes_the_policy(op: str, kv_seq_len: int, nwg: int) -> None:
    """Seen from the room that partial results need."""
    heads, head_dim, capacity = 3, 256, 600
    row = head_dim // 2 if op == "flash_attn_vec_tq" else head_dim
    q = torch.randn(heads, head_dim)
    packed, norms = torch.zeros(1, capacity, row, dtype=torch.uint8), torch.ones(1, capacity)
    stores = (packed, norms, packed, norms)
    if op == "flash_attn_vec_hybrid":
        stores = (torch.zeros(1, capacity, head_dim).half(), packed, norms)
    bits = {} if op == "flash_attn_vec_tq" else {"codebook_bits": 8}
    needed = heads * nwg * (head_dim + 2)
    with pytest.raises(ValueError, match=f"tmp must hold .* = {needed} numbers, got {needed - 1}"):
        getattr(ops, op)(q, *stores, kv_seq_len, 1.0, **bits, tmp=torch.zeros(needed - 1))
    getattr(ops, op)(q, *stores, kv_seq_len, 1.0, **bits, tmp=torch.zeros(needed))


def test_environment_overrides_are_read_once() -> None:
    cases = [  # values of VARIABLES, and what is left of them
        (("1", "32", "1"), (1, 32, 1)),
        (("32", "1", "4"), (32, 1, 4)),
        (("7", "", "2"), (7, None, 2)),
        (("0", "33", "3"), (None, None, None)),
        (("33", "0", "8"), (None, None, None)),
        (("abc", "16x", "0"), (None, None, None)),
        (("16x", "-1", ""), (None, None, None)),
        (("", "abc", "2x"), (None, None, None)),
        (("99999999999999999999", "5", "abc"), (None, 5, None)),
    ]

    def run(values: tuple[str, ...]) -> str:
        environment = {**os.environ, **dict(zip(VARIABLES, values, strict=True))}
        done = subprocess.run([sys.executable, "-c", READ_TWICE], env=environment, capture_output=True, text=True)
        return done.stdout.strip() + done.stderr

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        outputs = list(pool.map(run, [values for values, _ in cases]))
    assert outputs == [f"{policy(*left)} True" for _, left in cases]
