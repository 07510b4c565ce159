"""Reads Mach-O libraries for arm64, with nothing but Python: what they are, what they import and export, and whether
their signature is right.
"""

import hashlib
import struct
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

MAGIC = 0xFEEDFACF
ARM64 = 0x0100000C
DYLIB, BUNDLE = 6, 8
_MACOS = 1
_CODE_DIRECTORY, _SIGNATURE = 0xFADE0C02, 0xFADE0CC0
_SHA256 = 2
# Load commands
_SYMTAB, _LOAD_DYLIB, _ID_DYLIB, _CODE_SIGNATURE, _BUILD_VERSION = 0x2, 0xC, 0xD, 0x1D, 0x32
_LOAD_WEAK_DYLIB, _RPATH, _REEXPORT_DYLIB = 0x80000018, 0x8000001C, 0x8000001F
# Symbols
_EXTERNAL, _DEBUG, _TYPE = 0x01, 0xE0, 0x0E
_WEAK_REFERENCE = 0x40
# Ordinals of libraries that no load command names
SPECIAL_ORDINALS = {0: "itself", 253: "weak lookup", 254: "dynamic lookup", 255: "the executable"}


@dataclass(frozen=True)
class Import:
    symbol: str
    library: str  # its path as the load command gives it, or one of SPECIAL_ORDINALS


@dataclass
class MachO:
    """A library. Raises ValueError if the file is none for arm64."""

    path: Path
    libraries: list[str] = field(default_factory=list)
    rpaths: list[str] = field(default_factory=list)
    install_name: str | None = None
    minimum_macos: str | None = None

    def __post_init__(self) -> None:
        self.data = self.path.read_bytes()
        magic, cpu, _, self.file_type, commands, _, _, _ = struct.unpack_from("<8I", self.data)
        if (magic, cpu) != (MAGIC, ARM64) or self.file_type not in (DYLIB, BUNDLE):
            raise ValueError(f"{self.path} is no library for arm64: {magic:#x} {cpu:#x} {self.file_type}")
        self._symtab = (0, 0, 0, 0)
        self._signature: tuple[int, int] | None = None
        offset = 32
        for _ in range(commands):
            command, size = struct.unpack_from("<II", self.data, offset)
            self._read_command(command, offset, size)
            offset += size

    def _read_command(self, command: int, offset: int, size: int) -> None:
        def text() -> str:
            (start,) = struct.unpack_from("<I", self.data, offset + 8)
            return self.data[offset + start : offset + size].split(b"\0")[0].decode()

        if command in (_LOAD_DYLIB, _LOAD_WEAK_DYLIB, _REEXPORT_DYLIB):
            self.libraries.append(text())
        elif command == _ID_DYLIB:
            self.install_name = text()
        elif command == _RPATH:
            self.rpaths.append(text())
        elif command == _SYMTAB:
            self._symtab = struct.unpack_from("<4I", self.data, offset + 8)
        elif command == _CODE_SIGNATURE:
            self._signature = struct.unpack_from("<II", self.data, offset + 8)
        elif command == _BUILD_VERSION:
            platform, version = struct.unpack_from("<II", self.data, offset + 8)
            self.minimum_macos = f"{version >> 16}.{version >> 8 & 255}" if platform == _MACOS else None

    @cached_property
    def _symbols(self) -> list[tuple[str, bool, int]]:
        """Name, whether it is defined here, and the ordinal of the library it is to come from."""
        start, count, strings, strings_size = self._symtab
        names = self.data[strings : strings + strings_size]
        symbols = []
        for name, kind, _, description, _ in struct.iter_unpack("<IBBHQ", self.data[start : start + 16 * count]):
            if kind & _EXTERNAL and not kind & _DEBUG:
                text = names[name : names.index(b"\0", name)].decode()
                symbols.append((text, kind & _TYPE != 0, description >> 8))
        return symbols

    @cached_property
    def exports(self) -> set[str]:
        return {name for name, is_defined, _ in self._symbols if is_defined}

    @cached_property
    def imports(self) -> list[Import]:
        return [
            Import(name, SPECIAL_ORDINALS.get(ordinal) or self.libraries[ordinal - 1])
            for name, is_defined, ordinal in self._symbols
            if not is_defined
        ]

    def check_signature(self) -> str:
        """The kind of signature. Raises ValueError if there is none or a page is not what was signed."""
        if self._signature is None:
            raise ValueError(f"{self.path} is not signed: arm64 macOS does not load it")
        start, _ = self._signature
        magic, _, count = struct.unpack_from(">III", self.data, start)
        if magic != _SIGNATURE:
            raise ValueError(f"{self.path} has a signature of unknown kind {magic:#x}")
        for i in range(count):
            kind, offset = struct.unpack_from(">II", self.data, start + 12 + 8 * i)
            if kind == 0:
                return self._check_pages(start + offset, start)
        raise ValueError(f"{self.path} has a signature without a code directory")

    def _check_pages(self, directory: int, signature: int) -> str:
        fields = struct.unpack_from(">9I4B", self.data, directory)
        magic, _, _, flags, hashes, _, _, pages, limit, hash_size, hash_type, _, page_shift = fields
        if (magic, hash_type, hash_size, limit) != (_CODE_DIRECTORY, _SHA256, 32, signature):
            raise ValueError(f"{self.path} has a code directory that does not cover the file up to its signature")
        for page in range(pages):
            code = self.data[page << page_shift : min((page + 1) << page_shift, limit)]
            stored = directory + hashes + 32 * page
            if hashlib.sha256(code).digest() != self.data[stored : stored + 32]:
                raise ValueError(f"{self.path} was changed after it was signed, in page {page}")
        return "ad hoc" if flags & 2 else "with an identity"
