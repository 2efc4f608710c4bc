"""The machine code of a kernel as a list of instructions: NVRTC compiles, nvdisasm disassembles."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shutil
import struct
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

from tests import nvrtc

_LABEL = re.compile(r"([.$\w]+):$")
_INSTRUCTION = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
_REMARK = re.compile(r"\s*\(\*.*?\*\)")
_COMMA = re.compile(r",\s*(?![^\[]*\])")  # a comma between operands, not one inside of an address
_PARAMETERS, _CLUSTER = 0x0A, 0x3D  # attributes: where parameters begin, and blocks of a cluster


class Instruction(NamedTuple):
    """A line of disassembly."""

    address: int
    guard: str | None  # the predicate that the instruction depends on, such as "P0" or "!UP1"
    opcode: str  # the instruction's name with its modifiers, such as "IADD3.X"
    operands: tuple[str, ...]


class Program(NamedTuple):
    """The compiled code of a kernel, and what it says of itself."""

    architecture: int
    instructions: tuple[Instruction, ...]
    labels: dict[str, int]  # addresses of labels, by name
    parameters: int  # address in constant bank 0 at which the parameters begin
    constants: dict[int, bytes]  # contents of the banks of constants, by number
    registers: int  # registers of a thread
    shared: int  # bytes of a block's static shared memory
    cluster: int  # blocks of a cluster


def find_nvdisasm() -> str | None:
    """The path of nvdisasm: of the package nvidia-cuda-nvdisasm, else on the path or in a CUDA toolkit."""
    packages = importlib.util.find_spec("nvidia")
    for folder in packages.submodule_search_locations or () if packages else ():
        for path in sorted(Path(folder).glob("**/bin/nvdisasm*")):
            if os.access(path, os.X_OK):
                return str(path)
    return shutil.which("nvdisasm") or shutil.which("nvdisasm", path="/usr/local/cuda/bin")


@functools.cache
def compile_program(text: str, architecture: int, options: tuple[str, ...] = ()) -> Program:
    """Compile a text with one kernel; `architecture` and `options` are those of `nvrtc.compile_text`."""
    cubin, log = nvrtc.compile_text(text, architecture, options)
    tool = find_nvdisasm()
    assert tool is not None, "no nvdisasm: pip install nvidia-cuda-nvdisasm"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        listing = subprocess.run([tool, "-c", str(path)], capture_output=True, text=True, check=True).stdout
    instructions, labels = parse(listing)
    constants, parameters, cluster = {}, 0, 1
    for name, data in _sections(cubin):
        bank = re.match(r"\.nv\.constant(\d+)\.", name)
        if bank:
            constants[int(bank[1])] = data
        elif name.startswith(".nv.info."):
            attributes = _attributes(data)
            parameters = int.from_bytes(attributes[_PARAMETERS][4:6], "little")
            cluster = int.from_bytes(attributes.get(_CLUSTER, b"\1")[:4], "little")
    usage = nvrtc.usage(log)
    return Program(architecture, instructions, labels, parameters, constants, usage.registers, usage.shared, cluster)


def parse(listing: str) -> tuple[tuple[Instruction, ...], dict[str, int]]:
    """The instructions of a listing of nvdisasm, and the addresses of its labels."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    waiting: list[str] = []  # labels in front of the next instruction
    for line in listing.splitlines():
        line = _REMARK.sub("", line)
        label, found = _LABEL.match(line), _INSTRUCTION.match(line)
        if label:
            waiting.append(label[1])
        elif found:
            address = int(found[1], 16)
            labels |= dict.fromkeys(waiting, address)
            waiting = []
            operands = tuple(_COMMA.split(found[4])) if found[4] else ()
            instructions.append(Instruction(address, found[2], found[3], operands))
    return tuple(instructions), labels


def _sections(elf: bytes) -> list[tuple[str, bytes]]:
    """The sections of a 64-bit ELF file, by name."""
    (table,) = struct.unpack_from("<Q", elf, 40)
    size, count, names = struct.unpack_from("<HHH", elf, 58)
    headers = [struct.unpack_from("<IIQQQQ", elf, table + i * size) for i in range(count)]
    texts = headers[names][4]
    result = []
    for name, _, _, _, offset, length in headers:
        begin = texts + name
        result.append((elf[begin : elf.index(b"\0", begin)].decode(), elf[offset : offset + length]))
    return result


def _attributes(data: bytes) -> dict[int, bytes]:
    """The attributes of a kernel, by number. Each has four bytes; those of form 4 have as many more as the last two
    say.
    """
    at, result = 0, {}
    while at < len(data):
        form, attribute, size = struct.unpack_from("<BBH", data, at)
        end = at + 4 + (size if form == 4 else 0)
        result[attribute] = data[at + 4 : end]
        at = end
    return result
