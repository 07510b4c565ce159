"""Files of caches: safetensors with a header that states kind, version, configuration, counters and checksums."""

import json
import os
import tempfile
import zlib
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor, uint8

from .format import FORMAT_VERSION

KIND = "torch_tqattn.KVCache"


def write_state(path: str | os.PathLike[str], state: dict[str, Any]) -> None:
    """Write what KVCache.state_dict returned. A reader, or a crash, never sees half a file."""
    tensors = {name: t.contiguous().cpu() for name, t in state["tensors"].items()}
    described = {name: value for name, value in state.items() if name != "tensors"}
    checksums = {name: _checksum(t) for name, t in tensors.items()}
    header = json.dumps({"kind": KIND, **described, "crc32": checksums})
    metadata = {"torch_tqattn": header, "crc32": str(zlib.crc32(header.encode()))}
    target = Path(path).resolve()
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=target.name) as folder:
        temporary = os.path.join(folder, target.name)
        safetensors.torch.save_file(tensors, temporary, metadata)
        os.replace(temporary, target)


def read_state(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What write_state wrote; an exception of some kind if the file is foreign, of another version, or damaged."""
    with safetensors.safe_open(str(path), "pt") as file:
        metadata = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if "torch_tqattn" not in metadata:
        raise ValueError("it holds something else")
    header = json.loads(metadata["torch_tqattn"])
    if header["kind"] != KIND or header["version"] != FORMAT_VERSION:
        raise ValueError(
            f"it holds {header['kind']} version {header['version']}, supported is {KIND} version {FORMAT_VERSION}"
        )
    if metadata.get("crc32") != str(zlib.crc32(metadata["torch_tqattn"].encode())):
        raise ValueError("the checksum of its header is wrong: the file is damaged")
    for name, tensor in tensors.items():
        if header["crc32"].get(name) != _checksum(tensor):
            raise ValueError(f"the checksum of {name} is wrong: the file is damaged")
    return {**header, "tensors": tensors}


def _checksum(tensor: Tensor) -> int:
    return zlib.crc32(tensor.view(-1).view(uint8).numpy().data)
