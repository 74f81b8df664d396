"""What a shared library asks of others: the proof that it uses torch's stable interface only."""

from __future__ import annotations

import re
import struct
import subprocess
from collections.abc import Iterable
from pathlib import Path

SHT_DYNSYM = 11


def undefined_symbols(path: Path) -> set[str]:
    """Undefined dynamic symbols of a 64-bit little-endian ELF file.

    Raises:
        ValueError: The file is something else.
    """
    data = path.read_bytes()
    if data[:6] != b"\x7fELF\x02\x01":
        raise ValueError(f"{path} is not a 64-bit little-endian ELF file")
    (table,) = struct.unpack_from("<Q", data, 0x28)
    entry, count = struct.unpack_from("<HH", data, 0x3A)
    sections = [struct.unpack_from("<IIQQQQIIQQ", data, table + i * entry) for i in range(count)]
    found = set()
    for kind, offset, size, link in ((s[1], s[4], s[5], s[6]) for s in sections):
        if kind != SHT_DYNSYM:
            continue
        strings = sections[link][4]
        for at in range(offset, offset + size, 24):
            name, _, _, section = struct.unpack_from("<IBBH", data, at)
            if section == 0 and name:
                end = data.index(b"\0", strings + name)
                found.add(data[strings + name : end].decode())
    return found


def unstable_symbols(symbols: Iterable[str]) -> set[str]:
    """Those that tie a library to one torch, one CPython or a CUDA library beside it.

    torch's stable interface is C functions with two prefixes; everything else of torch is C++ in
    its namespaces. The CUDA runtime is linked in, so none of its functions may be left open.
    """
    names = sorted(symbols)
    plain = demangled(names)
    found = set()
    for name, readable in zip(names, plain, strict=True):
        stable = name.startswith(("torch_", "aoti_torch_"))
        torch = not stable and ("torch" in name or "c10" in name or name.startswith("at_"))
        python = name.startswith(("Py", "_Py"))
        cuda = re.match(r"_*cu(da|blas|[A-Z])", name) is not None
        mangled = any(space in readable for space in ("c10::", "at::", "torch::"))
        if torch or python or cuda or mangled:
            found.add(name)
    return found


def demangled(names: Iterable[str]) -> list[str]:
    """C++ names as people write them, by binutils' c++filt."""
    listed = list(names)
    told = subprocess.run(
        ["c++filt"], input="\n".join(listed) + "\n", capture_output=True, text=True, check=True
    )
    return told.stdout.splitlines()[: len(listed)]
