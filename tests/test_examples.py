"""The example programs run as a user would run them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import decode_loop
import pytest
import torch
import transformers
from byte_model import ByteModel

ROOT = Path(__file__).parent.parent


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.fixture
def real_device(device: str) -> str:
    """A device that programs of their own have as well."""
    if device == "mps" and os.environ.get("TQATTN_HOSTED_MPS"):
        pytest.skip("the double of Metal is in this process alone")
    return device


@pytest.mark.slow
def test_decode_loop(real_device: str, tmp_path: Path) -> None:
    result = tmp_path / "result.json"
    sizes = ["--context", "300", "--prompt-length", "200", "--generate", "20"]
    formats = ["--formats", "f16/f16", "tq8/tq4", "tq3:plain"]
    done = run("examples/decode_loop.py", *sizes, *formats, "--device", real_device, "--json", str(result))
    assert done.returncode == 0, done.stderr
    report = json.loads(result.read_text())
    assert done.stdout.startswith(f"Device: {real_device}\n")
    assert report["device"] == real_device
    rows = report["rows"]
    assert [row["cache"] for row in rows] == ["dense float32", "f16/f16", "tq8/tq4", "tq3:plain"]
    dense, half, mixed, plain = rows
    assert dense["kld"] == 0
    assert half["kld"] < 1e-6
    assert half["agreement"] == 20
    assert 0 < mixed["kld"] < plain["kld"]
    # Two tokens' worth of header aside, the bytes are the formats' own: 320 positions, 4 layers, 2 heads of 128.
    assert half["nbytes"] == 300 * 4 * 2 * 2 * 128 * 2
    assert plain["nbytes"] == 300 * 4 * 2 * 2 * (128 * 3 // 8 + 4)
    for row in rows:
        assert row["cache"] in done.stdout
        assert 0.5 < row["bits_per_byte"] < 5


@pytest.mark.parametrize(
    ("mps", "cuda", "expected"),
    [(True, False, "mps"), (True, True, "mps"), (False, True, "cuda"), (False, False, "cpu")],
)
def test_the_decode_loop_takes_the_gpu(mps: bool, cuda: bool, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr("sys.argv", ["decode_loop.py"])
    assert decode_loop.parse_arguments().device == expected


def test_decode_loop_refuses_what_it_does_not_know() -> None:
    done = run("examples/decode_loop.py", "--formats", "tq7/tq4", "--context", "40", "--prompt-length", "20")
    assert done.returncode != 0
    assert "unknown storage format 'tq7'; choose one of f16, tq2" in done.stderr
    done = run("examples/decode_loop.py", "--context", "999999")
    assert done.returncode != 0
    assert "a context of 999999 needs as many" in done.stderr


@pytest.mark.slow
def test_generate(real_device: str, tmp_path: Path) -> None:
    result = tmp_path / "result.json"
    formats = ["--k-format", "f16", "--v-format", "f16"]
    options = ["--max-new-tokens", "30", *formats, "--device", real_device, "--json", str(result)]
    done = run("examples/generate.py", *options)
    assert done.returncode == 0, done.stderr
    stock, half = json.loads(result.read_text())["rows"]
    assert (stock["cache"], half["cache"]) == ("stock", "f16/f16")
    assert half["leading"] == 30
    assert half["same"] == 1.0
    # The last token is not fed; 4 layers, 2 sides, 2 heads of 128.
    assert stock["nbytes"] == (1024 + 29) * 4 * 2 * 2 * 128 * 4
    assert stock["nbytes"] / 2 <= half["nbytes"] < stock["nbytes"] / 2 * 1.25
    assert done.stdout.count("and her two daughters in") == 1  # the prompt is not shown again


def test_byte_model_is_what_transformers_loads() -> None:
    text = (ROOT / "examples" / "model" / "heldout.txt").read_bytes()[:300]
    tokens = torch.tensor([list(text)])
    model = transformers.AutoModelForCausalLM.from_pretrained(ROOT / "examples" / "model", dtype=torch.float32)
    expected = ByteModel.from_pretrained(ROOT / "examples" / "model")(tokens)
    assert (model(tokens).logits - expected).abs().max() <= 1e-3


@pytest.mark.slow
def test_training_writes_a_model_that_loads(tmp_path: Path) -> None:
    text, heldout = tmp_path / "text.txt", tmp_path / "heldout.txt"
    text.write_text("".join(f"line {i} says that the quick brown fox jumps over dog {i * i}\n" for i in range(400)))
    heldout.write_text("".join(f"another line, the {i}-th, to be measured on\n" for i in range(40)))
    sizes = ["--stages", "64:2", "128:2", "--batch-bytes", "512", "--recall-documents", "2", "--device", "cpu"]
    files = [str(text), "--heldout", str(heldout), "--output", str(tmp_path / "model")]
    done = run("examples/train.py", *files, *sizes)
    assert done.returncode == 0, done.stderr[-2000:]
    model = ByteModel.from_pretrained(tmp_path / "model")
    tokens = torch.tensor([list(heldout.read_bytes()[:100])])
    assert model(tokens).shape == (1, 100, 256)
    assert model(tokens).isfinite().all()
