"""The double's own checks, each proven by a mistake that it has to see, and the MPS backend on mps tensors."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import torch_tqattn as tq
from metal import hosted
from metal.hosted import build

tqattn = torch.ops.tqattn
double = torch.ops.metal_double
Copy = Callable[[torch.Tensor, torch.Tensor, str], None]

MISTAKES = {
    "empty grid": "dispatch of nothing",
    "too many threads": "1025 threads a threadgroup; the pipeline allows 1024",
    "nil pipeline": "the pipeline is nil",
    "unbound buffer": "argument from at index 0: nothing is bound there",
    "offset outside": "offset 400 is outside a buffer of 400 bytes",
    "misaligned offset": "argument from at index 0: offset 2 is not aligned to 4 bytes",
    "large bytes": "setBytes of 4097 bytes; it takes 1 to 4096",
    "small bytes": "argument count at index 2: 2 bytes are bound; it has 4",
    "bytes for a result": "argument to at index 1: read-only bytes are bound where the kernel may write",
    "index 31": "buffer index 31; the last is 30",
    "no threadgroup memory": "argument scratch at index 0: no length of threadgroup memory was set",
    "odd threadgroup memory": "40 bytes of threadgroup memory: no multiple of 16",
    "large threadgroup memory": "32784 bytes of threadgroup memory; there are 32768",
    "end of encoding": "endEncoding on the stream's encoder",
    "fast math": "fast math was not switched off",
    "encoder fetched outside the queue": "the encoder was fetched outside the stream's queue",
    "encoder used outside the queue": "the encoder was used outside dispatch_sync",
    "encoder kept": "message setComputePipelineState: to a freed DoubleEncoder",
    "encoder retained": "the encoder was used after the stream ended it",
    "nested dispatch_sync": "dispatch_sync on a queue from within it: a deadlock",
    "exception across dispatch_sync": "a C.. exception left a block under dispatch_sync: thrown in a block",
    "synchronisation": "an operator synchronised the stream",
    "synchronisation on the queue": "the stream is synchronised from within its queue: a deadlock",
    "command buffer": "an operator asked for torch's command buffer",
    "over-release": "over-release of a NSString",
    "use of a freed object": "message length to a freed NSString",
    "no autorelease pool": "a NSString is autoreleased outside any pool",
}


@pytest.fixture(scope="module")
def copy_numbers() -> Copy:
    torch.ops.load_library(build.link("mistakes", [build.HERE / "mistakes" / "mistakes.mm"]))
    return torch.ops.metal_mistakes.copy_numbers


@pytest.fixture(autouse=True)
def _fresh_stream() -> Iterator[None]:
    torch.mps.synchronize()
    yield
    double.reset()


def numbers(count: int = 100) -> torch.Tensor:
    return torch.arange(float(count)).to("mps")


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_seen(copy_numbers: Copy, mistake: str) -> None:
    x = numbers()
    with pytest.raises(RuntimeError, match=f"Metal double: .*{MISTAKES[mistake]}"):
        copy_numbers(x, torch.empty_like(x), mistake)


def test_the_copy_without_a_mistake(copy_numbers: Copy) -> None:
    x = numbers()[3:80]
    y = torch.zeros(100, device="mps")
    copy_numbers(x, y[5:82], "none")
    assert torch.equal(y.cpu()[5:82], x.cpu())
    assert y.count_nonzero() == 77


def test_execution_waits_for_a_synchronisation(copy_numbers: Copy) -> None:
    x, y = numbers(), torch.empty(100, device="mps")
    for _ in range(10):
        copy_numbers(x, y, "none")
    assert double.pending() == 10
    assert torch.equal(y.cpu(), x.cpu())
    assert double.pending() == 0


def test_a_write_past_the_end_is_seen(copy_numbers: Copy) -> None:
    x = numbers(128)
    copy_numbers(x, torch.empty(127, device="mps"), "none")
    with pytest.raises(RuntimeError, match=r"wrote past the end of a buffer of 508 bytes|\(buffer 1, byte 508\)"):
        torch.mps.synchronize()


def test_unwritten_memory_is_poison() -> None:
    assert (torch.empty(64, dtype=torch.uint8, device="mps").cpu() == 0xFB).all()


def test_buffers_live_as_long_as_what_is_pending(copy_numbers: Copy) -> None:
    before = double.live_objects("DoubleBuffer")
    y = torch.empty(100, device="mps")
    for start in range(20):
        copy_numbers(numbers() + start, y, "none")  # the source is freed at once
    assert double.live_objects("DoubleBuffer") > before + 1
    assert torch.equal(y.cpu(), torch.arange(100.0) + 19)
    assert double.live_objects("DoubleBuffer") == before + 1


def test_a_leak_is_counted(copy_numbers: Copy) -> None:
    before = double.live_objects("NSMutableDictionary")
    copy_numbers(numbers(), numbers(), "leak")
    assert double.live_objects("NSMutableDictionary") == before + 1


def test_torch_works_on_mps_tensors() -> None:
    x = torch.arange(24.0, device="mps").view(2, 3, 4)
    assert x.device == torch.device("mps:0")
    assert x[1, 2].sum().item() == 86
    assert torch.equal(x[:, 1:, ::2].contiguous().cpu(), torch.arange(24.0).view(2, 3, 4)[:, 1:, ::2])
    assert torch.equal(torch.cat([x, x], 1).cpu(), torch.arange(24.0).view(2, 3, 4).repeat(1, 2, 1))
    index = torch.tensor([1, 0], device="mps")
    assert torch.equal(x.index_select(0, index).cpu(), x.cpu().flip(0))
    assert torch.equal(torch.where(x > 11, x, -x).cpu(), torch.where(x.cpu() > 11, x.cpu(), -x.cpu()))
    y = x.half().to(torch.bfloat16)
    y[0] = 0
    assert y.float().sum().item() == 210
    assert torch.equal(x.transpose(0, 2).clone().cpu(), x.cpu().transpose(0, 2))
    z = x.cpu()
    y, index = x.clone(), torch.tensor([2, 0])
    y[:, index, 3], z[:, index, 3] = 7.0, 7.0  # in place, on a view with other strides
    assert torch.equal(y.cpu(), z)
    event = torch.Event(device="mps")
    event.record()
    event.synchronize()
    assert event.query()
    mask = torch.rand(2, 3, 3) > 0.3
    exact = torch.nn.functional.scaled_dot_product_attention(z, z, z, mask)
    assert torch.allclose(torch.nn.functional.scaled_dot_product_attention(y, y, y, mask.to("mps")).cpu(), exact)
    with pytest.raises(TypeError, match="float64"):
        x.double()


# The MPS backend


def check_rotation(x: torch.Tensor) -> None:
    for inverse in (False, True):
        y = tqattn.rotate(x, inverse)
        assert y.device == x.device
        assert y.dtype == torch.float32
        torch.testing.assert_close(y.cpu(), tqattn.rotate(x.cpu(), inverse), rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("head_dim", [64, 80, 128, 192, 512])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rotate(head_dim: int, dtype: torch.dtype) -> None:
    check_rotation(torch.randn(3, 7, head_dim, dtype=dtype).to("mps"))


def test_rotate_a_view_with_a_storage_offset() -> None:
    base = torch.randn(5 * 64 + 3, dtype=torch.float16).to("mps")
    x = base[3:].view(5, 64)
    assert x.storage_offset() == 3
    check_rotation(x)
    check_rotation(x[2:])


def test_rotate_what_is_not_contiguous() -> None:
    check_rotation(torch.randn(4, 6, 2, 128).to("mps")[1:, ::2, 1])
    check_rotation(torch.randn(64, 6).to("mps").T)


def test_rotate_many_times_without_synchronising() -> None:
    x = torch.randn(5, 128).to("mps")
    start = x.clone()
    for _ in range(20):
        x = tqattn.rotate(tqattn.rotate(x), True)  # the ones before are freed at once
    assert double.pending() == 40
    torch.testing.assert_close(x.cpu(), start.cpu(), rtol=1e-5, atol=1e-5)


def test_nothing_is_leaked() -> None:
    x = torch.randn(5, 64).to("mps")
    tqattn.rotate(x).cpu()
    names = ["NSString", "NSMutableDictionary", "NSError", "MTLCompileOptions", "DoubleLibrary", "DoubleBuffer"]
    before = [double.live_objects(name) for name in names]
    for dtype in (torch.float32, torch.bfloat16, torch.float32):
        tqattn.rotate(x.to(dtype)).cpu()
    assert [double.live_objects(name) for name in names] == before


def test_the_pipelines_limit_of_threads_is_respected() -> None:
    x = torch.randn(5, 64).to("mps")
    tqattn.rotate(x).cpu()
    double.set_max_threads(64)
    with pytest.raises(RuntimeError, match="launched with 128 threads a threadgroup; on this device it may have 64"):
        tqattn.rotate(x)


def test_the_compilers_words_reach_the_user(tmp_path: Path) -> None:
    compiler = tmp_path / "compiler"
    compiler.write_text("#!/bin/sh\necho 'rotate.metal:7:1: error: nothing is right' >&2\nexit 1\n")
    compiler.chmod(0o755)
    double.set_compiler(str(compiler))
    try:
        with pytest.raises(
            RuntimeError, match=r"cannot compile tq_rotate_rows of rotate\.metal TQ_HEAD_DIM=96 "
        ) as raised:
            tqattn.rotate(torch.randn(2, 96, dtype=torch.float16).to("mps"))
        assert "rotate.metal:7:1: error: nothing is right" in str(raised.value)
    finally:
        hosted.use_compiler()
    check_rotation(torch.randn(2, 96, dtype=torch.float16).to("mps"))  # a failure is not remembered


def test_encoding_and_attention_without_synchronising() -> None:
    # Everything in one stream of commands, with nothing in between: what is encoded is read by the next call.
    cpu = tq.KVCache(1, 2, 64, 64, k_format="tq8", v_format="tq4", block_size=16, device="cpu")
    mps = tq.KVCache(1, 2, 64, 64, k_format="tq8", v_format="tq4", block_size=16, device="mps")
    q, k, v = torch.randn(1, 4, 1, 64), torch.randn(1, 2, 40, 64), torch.randn(1, 2, 40, 64)
    cpu.append(k, v)
    q_mps, k_mps, v_mps = q.to("mps"), k.to("mps"), v.to("mps")
    mps.append(k_mps, v_mps)
    out = tq.attention(q_mps, mps)
    assert double.pending() >= 3
    torch.testing.assert_close(out.cpu(), tq.attention(q, cpu), rtol=1e-4, atol=1e-5)
