"""What is special to CUDA: streams, graphs, devices, threads, and what the compiler says. Everything else runs on cuda
tensors with the tests that take a device."""

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from caches import same_state
from oracle import float32_bound, relative_error
from stores import clone, empty_stores
from test_kernels import BATCH, KV_HEADS, SAMPLES, Sample, encode_on_both
from torch import Tensor

import torch_tqattn as tq

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
tqattn = torch.ops.tqattn
PACKAGE = Path(tq.__file__).parent


@contextmanager
def no_synchronisation() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def filled(tokens: int = 300, device: str = "cuda") -> tq.KVCache:
    """A cache of the same tokens on any device."""
    cache = tq.KVCache(2, 2, 128, 512, "tq8", "tq4", block_size=32, device=device)
    k, v = torch.randn(2, 2, 2, tokens, 128, generator=torch.Generator().manual_seed(1)).to(device)
    cache.append(k, v)
    return cache


def run_python(code: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, **options)


def test_the_kernels_run_not_the_reference() -> None:
    x = torch.randn(3, 64, device="cuda")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        tqattn.rotate(x, False)
        torch.cuda.synchronize()
    assert "tq_rotate_rows" in {event.name for event in profile.events()}


# Queries in half precision, which another kernel serves


def check_half_queries(q: Tensor, options: dict[str, Any], cpu: tq.KVCache, gpu: tq.KVCache) -> None:
    expected, expected_lse = tq.attention(q.float(), cpu, return_lse=True, **options)
    moved = {name: x.to(gpu.device) if isinstance(x, Tensor) else x for name, x in options.items()}
    out, lse = tq.attention(q.to(gpu.device), gpu, return_lse=True, **moved)
    out, lse = out.to(expected.device), lse.to(expected.device)
    seen = expected_lse.isfinite()
    assert torch.equal(lse.isneginf(), expected_lse.isneginf())
    assert (lse - expected_lse)[seen].abs().max() < 4e-3
    # Of the rotated queries and the weights, which are rounded to half precision, and of the result.
    error = (out.float() - expected)[seen].norm(dim=-1) / expected[seen].norm(dim=-1)
    assert error.max() < 2e-3 + torch.finfo(q.dtype).eps / 2


@pytest.mark.parametrize("sample", [s for s in SAMPLES if s.head_dim % 64 == 0 and s.head_dim <= 256], ids=str)
def test_half_precision_queries(sample: Sample) -> None:
    cpu, on_gpu, _ = encode_on_both(sample, "cuda")
    on_gpu.load_state_dict(cpu.state_dict())
    for heads, queries, dtype in ((KV_HEADS, 1, torch.half), (3 * KV_HEADS, 5, torch.bfloat16)):
        seen = len(cpu) if cpu.config.window is None else cpu._length - cpu._begin(queries)
        q = torch.randn(BATCH, heads, queries, sample.head_dim).to(dtype)
        check_half_queries(q, sample.attention_options(queries, heads, seen), cpu, on_gpu)


@pytest.mark.parametrize("head_dim", [128, 256])
@pytest.mark.parametrize("tokens", [100, 1000, 3000, 5000, 40_000])
def test_half_precision_queries_of_long_caches(head_dim: int, tokens: int) -> None:
    """One part, clusters of them, parts for another kernel, and as many as the device takes, against the float32
    kernel."""
    k, v = torch.randn(2, 1, 2, tokens, head_dim, device="cuda")
    for formats in (("tq4", "tq4"), ("tq8", "tq4"), ("f16", "tq8")):
        cache = tq.KVCache(1, 2, head_dim, tokens, *formats, device="cuda")
        cache.append(k + 0.5, v + 0.5)
        for heads, queries in ((8, 1), (8, 4)):
            q = torch.randn(1, heads, queries, head_dim, device="cuda", dtype=torch.half)
            check_half_queries(q, {"sinks": torch.randn(heads, device="cuda")}, cache, cache)


# A step that codes a block, which another kernel serves where a GPU has clusters


@pytest.mark.parametrize(
    ("head_dim", "formats", "settings"),
    [
        (64, ("tq8", "tq4"), {"block_size": 32}),
        (128, ("tq4", "tq4"), {"block_size": 128}),
        (128, ("tq5", "tq2"), {"block_size": 64, "window": 100}),
        (256, ("tq8", "tq8"), {"block_size": 128, "sink_length": 0}),
        (256, ("f16", "tq6"), {"block_size": 40, "residual_length": 9}),
        (512, ("tq3", "f16"), {"block_size": 17, "encode": "best"}),
    ],
    ids=str,
)
def test_a_step_that_codes_a_block(head_dim: int, formats: tuple[str, str], settings: dict[str, Any]) -> None:
    """Its bytes are those of the kernels that code a prompt; with padding, and a NaN in the block."""
    before = 2 * settings["block_size"] + settings.get("residual_length", 0)
    k, v = torch.randn(2, 2, 2, before + 2, head_dim, device="cuda", dtype=torch.half)
    k[1, 0, before - 12, 3] = float("nan")
    whole, stepped = (tq.KVCache(2, 2, head_dim, 400, *formats, device="cuda", **settings) for _ in range(2))
    whole.append(k, v, [0, 5])
    stepped.append(k[:, :, :before], v[:, :, :before], [0, 5])
    for i in (before, before + 1):
        stepped.append(k[:, :, i : i + 1], v[:, :, i : i + 1])
    assert whole._coded == stepped._coded == 2 * settings["block_size"]
    assert same_state(whole.state_dict(), stepped.state_dict())


# Streams and threads


def test_work_is_put_on_the_current_stream() -> None:
    x, stream = torch.zeros(1000, 128, device="cuda"), torch.cuda.Stream()
    expected = tqattn.rotate(torch.ones(1000, 128), False)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        x.fill_(1)  # what another stream would not wait for
        y = tqattn.rotate(x, False)
    stream.synchronize()
    assert relative_error(y, expected) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float, torch.half])
def test_many_streams_at_once(dtype: torch.dtype) -> None:
    cache, q = filled(), torch.randn(20, 2, 8, 1, 128, device="cuda", dtype=dtype)
    expected = [tq.attention(x, cache) for x in q]
    streams = [torch.cuda.Stream() for _ in range(4)]
    torch.cuda.synchronize()
    outs = []
    for i, x in enumerate(q):
        with torch.cuda.stream(streams[i % 4]):
            outs.append(tq.attention(x, cache))
    torch.cuda.synchronize()
    for out, exact in zip(outs, expected, strict=True):
        assert torch.equal(out, exact)


def test_a_thread_of_its_own() -> None:
    cache, q = filled(), torch.randn(2, 8, 1, 128, device="cuda")
    expected = tq.attention(q, cache)
    with ThreadPoolExecutor(4) as pool:
        outs = list(pool.map(lambda _: tqattn.attend(q, *cache._stores(), **visible(cache))[0], range(16)))
    assert all(torch.equal(out, expected) for out in outs)


def visible(cache: tq.KVCache) -> dict[str, int]:
    config = cache.config
    coded = (len(cache) - 1) // config.block_size * config.block_size
    held = {"start": 0, "coded": coded, "length": len(cache)}
    return {**held, "block_size": config.block_size, "sink_length": config.sink_length}


def test_nothing_synchronises() -> None:
    cache, q = filled(), torch.randn(2, 8, 1, 128, device="cuda")
    k, v = torch.randn(2, 2, 2, 70, 128, device="cuda")
    torch.cuda.synchronize()
    with no_synchronisation():
        cache.append(k, v)
        tq.attention(q, cache)
        cache.step(q, k[:, :, :1], v[:, :, :1])
        cache.dense()


# Graphs


def captured(call: Callable[[], object]) -> tuple[torch.cuda.CUDAGraph, object]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return graph, result


@pytest.mark.parametrize("dtype", [torch.float, torch.half])
def test_attention_in_a_graph(dtype: torch.dtype) -> None:
    cache, q = filled(), torch.randn(2, 8, 1, 128, device="cuda", dtype=dtype)
    tq.attention(q, cache)
    graph, out = captured(lambda: tq.attention(q, cache))
    for _ in range(3):
        q.copy_(torch.randn_like(q))
        graph.replay()
        assert isinstance(out, Tensor)
        assert torch.equal(out, tq.attention(q, cache))


def test_a_step_in_a_graph() -> None:
    sizes = {"slots": 64, "block_size": 16, "tail_slots": 32, "sink_length": 4, "device": "cuda"}
    stores = empty_stores("tq8", "tq4", 128, **sizes)
    k, v = torch.randn(2, 2, 2, 40, 128, device="cuda")
    tqattn.encode_kv_(k, v, *stores, 0, 0, 32, block_size=16, sink_length=4)
    other = clone(stores)
    q, k, v = (torch.randn(2, heads, 1, 128, device="cuda") for heads in (8, 2, 2))

    def step(held: list) -> tuple[Tensor, Tensor]:
        return tqattn.decode_step_(q, k, v, *held, 0, 40, 32, 32, block_size=16, sink_length=4)

    step(clone(stores))
    graph, result = captured(lambda: step(stores))
    for _ in range(3):  # each time over the same position
        for x in (q, k, v):
            x.copy_(torch.randn_like(x))
        graph.replay()
        for x, y in zip(result, step(other), strict=True):
            assert torch.equal(x, y)
    for x, y in zip(stores, other, strict=True):
        assert not isinstance(x, Tensor) or torch.equal(x, y)


def test_first_use_in_a_graph() -> None:
    """Kernels that are not there yet are compiled and loaded while a graph is captured."""
    done = run_python(
        "import torch, torch_tqattn\n"
        "x = torch.randn(5, 64, device='cuda')\n"
        "graph = torch.cuda.CUDAGraph()\n"
        "with torch.cuda.graph(graph):\n"
        "    y = torch.ops.tqattn.rotate(x, False)\n"
        "graph.replay()\n"
        "torch.testing.assert_close(y.cpu(), torch.ops.tqattn.rotate(x.cpu(), False))\n"
    )
    assert done.returncode == 0, done.stderr


# Devices


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one CUDA device")
def test_a_device_that_is_not_the_current_one() -> None:
    first, second = filled(device="cuda:0"), filled(device="cuda:1")
    q = torch.randn(2, 8, 1, 128)
    outs = [tq.attention(q.to(cache.device), cache) for cache in (first, second)]
    assert outs[1].device == torch.device("cuda:1")
    assert torch.cuda.current_device() == 0
    assert torch.equal(outs[0].cpu(), outs[1].cpu())
    with pytest.raises(ValueError, match="cuda:1"):
        tq.attention(q.to("cuda:0"), second)


def test_files_go_between_cpu_and_cuda(tmp_path: Path) -> None:
    q, cache = torch.randn(2, 8, 1, 128), filled(device="cuda")
    expected = tq.attention(q.to("cuda"), cache)
    cache.save(tmp_path / "cuda.safetensors")
    here = tq.KVCache.load(tmp_path / "cuda.safetensors", device="cpu")
    assert relative_error(tq.attention(q, here), expected) < 2 * float32_bound(300)
    here.save(tmp_path / "cpu.safetensors")
    there = tq.KVCache.load(tmp_path / "cpu.safetensors", device="cuda")
    assert torch.equal(tq.attention(q.to("cuda"), there), expected)


# Limits


def test_more_sequences_than_a_grid_has_rows() -> None:
    batch = 70_000
    x = torch.randn(batch, 1, 4, 64)
    outs = []
    for device in ("cpu", "cuda"):
        stores = empty_stores("tq8", "tq8", 64, batch=batch, heads=1, slots=8, device=device)
        on_device = x.to(device)
        tqattn.encode_kv_(on_device, on_device, *stores, 0, 0, 4)
        k, _ = tqattn.decode_kv(*stores, 64, 0, 4, 4)
        outs.append((k, *tqattn.attend(on_device[:, :, :1].contiguous(), *stores, 0, 4, 4)))
    for y, expected in zip(outs[1], outs[0], strict=True):
        assert relative_error(y, expected) < 1e-2  # a tie between two levels falls differently now and then
        assert relative_error(y[-1000:], expected[-1000:]) < 1e-2


def test_more_queries_than_a_grid_has_rows() -> None:
    cache = filled(40)
    q = torch.randn(2, 8, 70_000, 128, device="cuda", dtype=torch.half)
    held = {**visible(cache), "causal": False}
    out, _ = tqattn.attend(q, *cache._stores(), **held)
    last, _ = tqattn.attend(q[:, :, -3:].contiguous(), *cache._stores(), **held)
    # Rounded alike but for when the largest logit of a tile changes.
    torch.testing.assert_close(out[:, :, -3:], last, rtol=2e-3, atol=2e-3)


def test_codes_that_are_not_aligned_are_refused() -> None:
    stores = empty_stores("tq8", "tq8", 64, batch=1, heads=1, slots=8, device="cuda")
    stores[0] = torch.zeros(8 * 64 + 1, dtype=torch.uint8, device="cuda")[1:].view(1, 1, 8, 64)
    with pytest.raises(RuntimeError, match=r"argument 0 of tq_decode begins at .* multiple of 4"):
        tqattn.decode_kv(*stores, 64, 0, 4, 4)


# Faults


def test_a_store_of_more_than_32_bits_is_refused() -> None:
    if torch.cuda.mem_get_info()[0] < 8 << 30:
        pytest.skip("there is no room for such a store")
    cache = tq.KVCache(1, 1, 512, 2**23 + 128, "tq8", "tq2", "cuda")
    kv = torch.randn(1, 1, 1, 512, device="cuda")
    with pytest.raises(ValueError, match="must be smaller than 4 GiB; its 8388736 slots"):
        cache.append(kv, kv)
    assert len(cache) == 0


def package_with(fault: tuple[bytes, bytes], folder: Path) -> Path:
    """A folder with a copy of the package in whose library the shaders have this fault: old text, new text."""
    old, new = fault
    (library,) = shutil.copytree(PACKAGE, folder / PACKAGE.name).glob("_C*.so")
    binary = library.read_bytes()
    assert old in binary
    library.write_bytes(binary.replace(old, new.ljust(len(old))))
    return folder


def test_the_compilers_words_reach_the_user(tmp_path: Path) -> None:
    done = run_python(
        "import torch, torch_tqattn\n"
        "for _ in range(2):\n"  # a failure is not remembered
        "    try:\n"
        "        torch.ops.tqattn.rotate(torch.randn(2, 96, device='cuda'), False)\n"
        "    except RuntimeError as error:\n"
        "        print(error)\n",
        cwd=package_with((b"tq_apply_signs(signs, row);", b"tq_apply_sings(signs, row);"), tmp_path),
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("cannot compile tq_rotate_rows of rotate.metal TQ_HEAD_DIM=96 TQ_INPUT=float for") == 2
    assert done.stdout.count('error: identifier "tq_apply_sings" is undefined') >= 2
    assert "row.h(" in done.stdout


@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="compute-sanitizer is not on the path")
def test_racecheck_sees_missing_barriers(tmp_path: Path) -> None:
    """`make check-cuda` would, too."""
    code = (
        "import torch, torch_tqattn as tq\n"
        "cache = tq.KVCache(1, 1, 128, 512, 'tq8', 'tq4', block_size=32, device='cuda')\n"
        "x = torch.randn(1, 1, 300, 128, device='cuda')\n"
        "cache.append(x, x)\n"
        "tq.attention(x[:, :, :1], cache)\n"
        "torch.cuda.synchronize()\n"
    )
    fault = b"threadgroup_barrier(mem_flags::mem_threadgroup);", b";"
    command = ["compute-sanitizer", "--tool", "racecheck", "--error-exitcode", "9", sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=package_with(fault, tmp_path), check=False)
    assert done.returncode == 9, done.stdout + done.stderr
