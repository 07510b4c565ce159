"""KVCache.save and load: everything comes back, and whatever is not such a file is refused."""

import json
import zlib
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

import torch_tqattn as tq
from torch_tqattn import cache_file


def random_cache(device: str, tokens: int, left_padding: list[int] | None = None, **options: Any) -> tq.KVCache:
    arguments = {"batch_size": 2, "num_kv_heads": 2, "head_dim": 64, "capacity": 400, "device": device, **options}
    cache = tq.KVCache(**arguments)
    shape = (cache.config.batch_size, cache.config.num_kv_heads, tokens, cache.config.head_dim)
    cache.append(torch.randn(shape, device=device), torch.randn(shape, device=device), left_padding)
    return cache


def same_bytes(a: Tensor, b: Tensor) -> bool:
    a, b = (x.cpu().contiguous().view(-1).view(torch.uint8) for x in (a, b))
    return torch.equal(a, b)


def assert_same(a: tq.KVCache, b: tq.KVCache) -> None:
    one, two = a.state_dict(), b.state_dict()
    tensors, other_tensors = one.pop("tensors"), two.pop("tensors")
    assert one == two
    assert tensors.keys() == other_tensors.keys()
    for name, tensor in tensors.items():
        assert tensor.shape == other_tensors[name].shape
        assert same_bytes(tensor, other_tensors[name])
    assert all(map(same_bytes, a.dense(), b.dense()))


def assert_refused(path: Path, message: str | None = None) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        tq.KVCache.load(path)
    assert str(path) in str(caught.value)


def rewrite(path: Path, change: dict[str, Any], with_checksum: bool = True) -> None:
    """Change entries of the header; the tensors stay."""
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    header = json.loads(metadata["torch_tqattn"])
    for name, value in change.items():
        header[name] = {**header[name], **value} if isinstance(value, dict) else value
    metadata["torch_tqattn"] = json.dumps(header)
    if with_checksum:
        metadata["crc32"] = str(zlib.crc32(metadata["torch_tqattn"].encode()))
    safetensors.torch.save_file(tensors, path, metadata)


@pytest.mark.parametrize("k_format", tq.FORMATS)
@pytest.mark.parametrize("head_dim", [64, 80, 512])
def test_roundtrip_of_formats(device: str, tmp_path: Path, head_dim: int, k_format: str) -> None:
    for v_format in tq.FORMATS:
        cache = random_cache(device, 150, k_format=k_format, v_format=v_format, head_dim=head_dim)
        cache.save(tmp_path / "cache")
        assert_same(tq.KVCache.load(tmp_path / "cache", device), cache)


@pytest.mark.parametrize("tokens", [0, 1, 127, 128, 129, 390])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"block_size": 0, "encode": "plain"},
        {"block_size": 0, "sink_length": 0},
        {"block_size": 16, "sink_length": 40, "left_padding": [0, 60], "encode": "best"},
        {"block_size": 0, "sink_length": 40, "left_padding": [120, 0], "k_balance": torch.full((2, 64), 1.5)},
        {"window": 20, "capacity": 20},
        {"window": 20, "capacity": 20, "block_size": 0},
        {"window": 50, "block_size": 16, "residual_length": 30, "left_padding": [7, 0]},
        {"left_padding": [300, 5]},
        {"capacity": 391, "block_size": 16},
        {"batch_size": 1, "num_kv_heads": 1},
    ],
    ids=str,
)
def test_roundtrip(device: str, tmp_path: Path, options: dict[str, Any], tokens: int) -> None:
    cache = random_cache(device, tokens, **options)
    cache.save(str(tmp_path / "cache"))
    loaded = tq.KVCache.load(str(tmp_path / "cache"), device)
    assert loaded.config == cache.config
    assert loaded.nbytes == cache.nbytes
    assert len(loaded) == len(cache)
    assert loaded.device.type == device
    assert_same(loaded, cache)
    shape = (cache.config.batch_size, cache.config.num_kv_heads, 1, 64)
    more = torch.randn(shape, device=device)
    for either in (loaded, cache):
        either.append(more, more)
    assert_same(loaded, cache)


@pytest.mark.parametrize("window", [None, 60])
def test_roundtrip_after_crop(device: str, tmp_path: Path, window: int | None) -> None:
    for crop in (50, 1, 0, -20, -60):
        cache = random_cache(device, 333, window=window, block_size=16)
        cache.crop(crop)
        cache.save(tmp_path / "cache")
        assert_same(tq.KVCache.load(tmp_path / "cache", device), cache)


def test_only_what_is_held_is_written(device: str, tmp_path: Path) -> None:
    cache = random_cache(device, 20, k_format="f16", v_format="f16")
    cache.crop(3)
    cache.save(tmp_path / "cache")
    assert (tmp_path / "cache").stat().st_size < 2 * 2 * 2 * 3 * 64 * 2 + 2000


def test_save_replaces_an_older_file(device: str, tmp_path: Path) -> None:
    path = tmp_path / "cache"
    random_cache(device, 5).save(path)
    cache = random_cache(device, 9)
    cache.save(path)
    assert_same(tq.KVCache.load(path, device), cache)
    assert list(tmp_path.iterdir()) == [path]


def test_save_follows_a_link(device: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "folder" / "cache")
    cache = random_cache(device, 5)
    cache.save(link)
    assert link.is_symlink()
    assert_same(tq.KVCache.load(tmp_path / "folder" / "cache", device), cache)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        tq.KVCache.load(tmp_path / "no such file")


def test_truncated(device: str, tmp_path: Path) -> None:
    path = tmp_path / "cache"
    random_cache(device, 140, left_padding=[0, 3]).save(path)
    data = path.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    for length in (0, 1, 7, 8, 9, header // 2, header - 1, header, header + 1, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:length])
        assert_refused(path)
    path.write_bytes(data + b"\0")
    assert_refused(path)


@pytest.mark.parametrize("bits", [0x01, 0x20, 0xFF])
def test_one_wrong_byte(device: str, tmp_path: Path, bits: int) -> None:
    path = tmp_path / "cache"
    cache = random_cache(device, 140, left_padding=[0, 3])
    cache.save(path)
    data = path.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    content = header - len(data[8:header]) + len(data[8:header].rstrip())  # after it come spaces
    for place in [*range(content), *range(header, len(data), len(data) // 60), len(data) - 1]:
        damaged = bytearray(data)
        damaged[place] ^= bits
        path.write_bytes(damaged)
        assert_refused(path)


def test_foreign_files(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    path.write_text("This is a text, and not a cache at all.\n" * 10)
    assert_refused(path)
    safetensors.torch.save_file({"weight": torch.zeros(3)}, path)
    assert_refused(path, "something else")
    for header in ("[]", "{}", "not json", '{"kind": "torch_tqattn.KVCache"}', '{"kind": "another", "version": 1}'):
        safetensors.torch.save_file({"weight": torch.zeros(3)}, path, {"torch_tqattn": header})
        assert_refused(path)
    folder = tmp_path / "folder"
    folder.mkdir()
    assert_refused(folder)


CONTRADICTIONS: list[tuple[dict[str, Any], str]] = [
    ({"version": 2}, "version 2, supported is torch_tqattn.KVCache version 1"),
    ({"kind": "another"}, "it holds another"),
    ({"counters": {"length": -1}}, "counters contradict"),
    ({"counters": {"length": 100}}, "counters contradict"),
    ({"counters": {"length": 401}}, "counters contradict"),
    ({"counters": {"length": "140"}}, "counters contradict"),
    ({"counters": {"length": 140.0}}, "counters contradict"),
    ({"counters": {"length": 139}}, "k_tail is"),
    ({"counters": {"coded": 127}}, "counters contradict"),
    ({"counters": {"coded": 0}}, "counters contradict"),
    ({"counters": {"coded": 256}}, "counters contradict"),
    ({"counters": {"stored": 128}}, "counters contradict"),
    ({"counters": {"first": 5}}, "counters contradict"),
    ({"counters": {"first": -5}}, "counters contradict"),
    ({"config": {"capacity": 139}}, "counters contradict"),
    ({"config": {"head_dim": 80}}, "expected"),
    ({"config": {"head_dim": 65}}, "unsupported head_dim 65"),
    ({"config": {"batch_size": 3}}, "expected"),
    ({"config": {"k_format": "tq6"}}, "expected"),
    ({"config": {"block_size": 0}}, "counters contradict"),
    ({"config": {"colour": "red"}}, "colour"),
    ({"config": {"sink_length": 5}}, "k_tail is .*, expected"),
    ({"config": {"sink_length": -1}}, "sink_length must be"),
    ({"crc32": {"k_codes": 1}}, "checksum of k_codes is wrong"),
]


@pytest.mark.parametrize(("change", "message"), CONTRADICTIONS, ids=str)
def test_header_that_contradicts_the_rest(device: str, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "cache"
    random_cache(device, 140).save(path)
    rewrite(path, change)
    assert_refused(path, message)


def test_configuration_without_one_of_its_fields(device: str, tmp_path: Path) -> None:
    path = tmp_path / "cache"
    state = random_cache(device, 140).state_dict()
    del state["config"]["sink_length"]
    cache_file.write_state(path, state)
    assert_refused(path, "sink_length")


def test_header_without_its_checksum(device: str, tmp_path: Path) -> None:
    path = tmp_path / "cache"
    random_cache(device, 140).save(path)
    rewrite(path, {"config": {"capacity": 500}}, with_checksum=False)
    assert_refused(path, "checksum of its header is wrong")


def test_a_failed_save_leaves_the_older_file(device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "cache"
    older = random_cache(device, 5)
    older.save(path)
    save_file = safetensors.torch.save_file

    def fail_midway(tensors: dict[str, Tensor], name: str, metadata: dict[str, str]) -> None:
        save_file(tensors, name, metadata)
        Path(name).write_bytes(Path(name).read_bytes()[:100])
        raise OSError("No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", fail_midway)
    with pytest.raises(OSError, match="No space left"):
        random_cache(device, 9).save(path)
    with pytest.raises(OSError, match="No space left"):
        random_cache(device, 9).save(tmp_path / "another")
    assert list(tmp_path.iterdir()) == [path]
    assert_same(tq.KVCache.load(path, device), older)


def test_save_to_a_folder_that_is_not_there(device: str, tmp_path: Path) -> None:
    cache = random_cache(device, 5)
    with pytest.raises(FileNotFoundError):
        cache.save(tmp_path / "missing" / "cache")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder"):
        cache.save(tmp_path / "folder")
    assert list(tmp_path.iterdir()) == [tmp_path / "folder"]
    assert list((tmp_path / "folder").iterdir()) == []
