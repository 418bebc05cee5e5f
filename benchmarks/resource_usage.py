"""What the CUDA and Triton kernels ask of a GPU, compiled for sm_80 and sm_90. Needs nvcc and Triton, but no GPU.

    python benchmarks/resource_usage.py            # registers, spills, shared memory, theoretical occupancy
    python benchmarks/resource_usage.py --check    # and exit with 1 where a kernel spills registers

Occupancy is the share of a multiprocessor's 64 warps that can be resident at once, by registers, shared memory and
the block's size. Kernels that wait for memory need enough of it to keep the memory busy, not all of it.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

SOURCES = sorted((Path(__file__).parents[1] / "csrc").glob("*.cu"))
ARCHITECTURES = (80, 90)
WARP, MAX_WARPS, MAX_BLOCKS, REGISTERS = 32, 64, 32, 1 << 16
# Of a multiprocessor; the system takes 1 KiB of it for each block.
SHARED_BYTES = {80: 164 << 10, 90: 228 << 10}


class Row(NamedTuple):
    kernel: str
    arch: int
    registers: int
    spills: int
    shared_bytes: int
    threads: int


def find_nvcc() -> str:
    candidates = (os.environ.get("CUDACXX", "nvcc"), "/usr/local/cuda/bin/nvcc")
    nvcc = next(filter(None, map(shutil.which, candidates)), None)
    if nvcc is None:
        sys.exit("resource_usage.py needs nvcc: on PATH, in /usr/local/cuda, or where CUDACXX says")
    return nvcc


def cuda_rows(sources: list[Path], arch: int) -> Iterator[Row]:
    """What ptxas says of each kernel, and the block's size that its launch bounds promise."""
    for source in sources:
        with tempfile.TemporaryDirectory() as folder:
            ptx = Path(folder) / "kernels.ptx"
            flags = ["-std=c++17", "-O3", "-DNDEBUG", f"-arch=sm_{arch}"]
            subprocess.run([find_nvcc(), *flags, "-ptx", "-o", ptx, source], check=True)
            assemble = [find_nvcc(), f"-arch=sm_{arch}", "-Xptxas", "-v", "-cubin", "-o", f"{folder}/cubin", ptx]
            said = subprocess.run(assemble, check=True, capture_output=True, text=True).stderr
            threads = dict(re.findall(r"\.entry (\w+)\([^)]*\)\s*\.maxntid (\d+)", ptx.read_text()))
        for entry in said.split("Compiling entry function ")[1:]:
            name = entry.split("'")[1]
            yield Row(
                demangle(name),
                arch,
                int(re.search(r"Used (\d+) registers", entry)[1]),
                # A stack frame without spills is an array that did not fit into registers: as slow, and counted here.
                sum(map(int, re.findall(r"(\d+) bytes (?:stack frame|spill)", entry))),
                sum(map(int, re.findall(r"(\d+) bytes smem", entry))),
                int(threads[name]),
            )


def demangle(name: str) -> str:
    """A kernel's name with its template arguments, without its namespace and the types of its parameters."""
    full = subprocess.run(["c++filt", name], capture_output=True, text=True, check=True).stdout.strip()
    full = full.removeprefix("void ").replace("(anonymous namespace)::", "").replace("fastm3ae::", "")
    return full.split("(")[0]


def occupancy(row: Row) -> float:
    """The share of a multiprocessor's warps that can be resident."""
    warps = -(-row.threads // WARP)
    registers_of_warp = -(-row.registers // 8) * 8 * WARP
    warps_by_registers = REGISTERS // registers_of_warp // 4 * 4  # a quarter on each of its four parts
    blocks = min(
        MAX_BLOCKS,
        MAX_WARPS // warps,
        warps_by_registers // warps,
        SHARED_BYTES[row.arch] // (row.shared_bytes + 1024),
    )
    return blocks * warps / MAX_WARPS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit with 1 where a kernel spills registers")
    arguments = parser.parse_args()
    import triton_resources

    rows = [row for arch in ARCHITECTURES for row in cuda_rows(SOURCES, arch)]
    rows += (Row(*row) for row in triton_resources.rows())
    columns = ("kernel", "arch", "registers", "spill bytes", "shared bytes", "threads", "occupancy")
    print("{:70} {:>5} {:>9} {:>11} {:>12} {:>7} {:>9}".format(*columns))
    for row in sorted(rows):
        print(
            f"{row.kernel:70} sm_{row.arch} {row.registers:9} {row.spills:11} {row.shared_bytes:12} {row.threads:7} "
            f"{occupancy(row):9.0%}"
        )
    spilling = [row for row in rows if row.spills]
    print(f"\n{len(spilling)} of {len(rows)} kernels spill registers")
    if arguments.check and spilling:
        sys.exit(1)


if __name__ == "__main__":
    main()
