"""What the CUDA and Triton kernels ask of a GPU, compiled for sm_80 and sm_90. Needs nvcc and Triton, but no GPU.

    python benchmarks/resource_usage.py                  # registers, spills, shared memory, theoretical occupancy
    python benchmarks/resource_usage.py --check          # and exit with 1 where a kernel spills registers
    python benchmarks/resource_usage.py --only triton    # without nvcc

Occupancy is the share of a multiprocessor's 64 warps that can be resident at once, by registers, shared memory and
the block's size. Kernels that wait for memory need enough of it to keep the memory busy, not all of it.
"""

import argparse
import itertools
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

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


class Variant(NamedTuple):
    """A Triton kernel as it is launched: the types of its arguments by name, and its constants and options."""

    name: str
    kernel: object
    types: dict[str, str]
    constants: dict[str, object]


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


def triton_variants() -> Iterator[Variant]:
    """Every variant that the official shapes launch."""
    from fastm3ae.kernels import gather_image_patches_triton as image_patches
    from fastm3ae.kernels import gather_patches_triton as patches
    from fastm3ae.kernels import random_patch_order_triton as order
    from fastm3ae.kernels import restore_patches_triton as restored

    outputs = {"keep_ptr": "*i64", "restore_ptr": "*i64", "is_hidden_ptr": "*i1"}
    kernel, blocks = order._random_patch_order_fwd_kernel, {"BLOCK_N": order._BLOCK_N, "BLOCK_M": order._BLOCK_M}
    types = {"noise_ptr": "*fp32", "seed_ptr": "*i64", **outputs, "N": "i32", "K": "i32"}
    yield Variant("random_patch_order", kernel, types, {**blocks, "FROM_SEED": False, "seed_ptr": None})
    yield Variant("random_patch_order_from_seed", kernel, types, {**blocks, "FROM_SEED": True, "noise_ptr": None})

    sizes = {name: "i32" for name in ("B", "N", "K", "D", "H", "W", "samples_per_split", "places_per_split")}
    rows_and_columns = {"BLOCK_L": patches._BLOCK_L, "BLOCK_D": patches._BLOCK_D}
    for dtype in ("fp32", "bf16"):
        floats = ("x", "positions", "cls", "tokens", "grad", "grad_x", "update", "mask_token")
        types = sizes | {f"{name}_ptr": f"*{dtype}" for name in floats}
        types |= {"keep_ptr": "*i64", "partial_ptr": "*fp32", "restore_ptr": "*i64"}
        yield Variant(f"gather_patches {dtype}", patches._gather_patches_fwd_kernel, types, rows_and_columns)
        yield Variant(f"scatter_patches {dtype}", patches._scatter_patches_kernel, types, rows_and_columns)
        for needs_positions in (True, False):
            constants = {
                "BLOCK_L": patches._BLOCK_L_BACKWARD,
                "BLOCK_D": patches._BLOCK_D,
                "BLOCK_K": patches._BLOCK_K,
                "NEEDS_POSITIONS": needs_positions,
            }
            name = f"gather_patches_backward {dtype}" + " of x alone" * (not needs_positions)
            yield Variant(name, patches._gather_patches_bwd_kernel, types, constants)
        blocks = {"BLOCK_L": restored._BLOCK_L, "BLOCK_D": restored._BLOCK_D}
        yield Variant(f"restore_patches {dtype}", restored._restore_patches_fwd_kernel, types, blocks)
        yield Variant(f"restore_patches_backward {dtype}", restored._restore_patches_bwd_kernel, types, blocks)

    kernel = image_patches._gather_image_patches_fwd_kernel
    for image, statistics in (("u8", {}), ("fp32", {"mean_ptr": None, "std_ptr": None})):
        types = {**sizes, "image_ptr": f"*{image}", "keep_ptr": "*i64", "pixels_ptr": "*bf16"}
        types |= {"mean_ptr": "*fp32", "std_ptr": "*fp32"}
        blocks = {"PATCH_SIZE": 16, "BLOCK_P": image_patches._BLOCK_P, "IS_UINT8": image == "u8"}
        yield Variant(f"gather_image_patches {image}", kernel, types, {**blocks, **statistics})
    yield from packed_attention_variants()
    yield from topk_attention_variants()


def packed_attention_variants() -> Iterator[Variant]:
    """Those of packed_attention, without slots and dropout and with all of it."""
    from fastm3ae.kernels import packed_attention_backward_triton as attention_backward
    from fastm3ae.kernels import packed_attention_triton as attention

    for dtype, torch_dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        of_queries, of_keys = attention_backward.query_blocks(torch_dtype), attention_backward.key_blocks(torch_dtype)
        kernels = {
            "": (attention._packed_attention_fwd_kernel, attention.forward_blocks(torch_dtype, 325)),
            " short": (attention._packed_attention_fwd_kernel, attention.forward_blocks(torch_dtype, 64)),
            "_backward queries": (attention_backward._packed_attention_bwd_queries_kernel, of_queries),
            "_backward keys": (attention_backward._packed_attention_bwd_keys_kernel, of_keys),
            "_backward slots": (attention_backward._packed_attention_bwd_slots_kernel, of_keys),
        }
        for (name, (kernel, blocks)), has_all in itertools.product(kernels.items(), (False, True)):
            types = {name: f"*{dtype}" if name.endswith("_ptr") else "i32" for name in kernel.arg_names}
            types |= {"q_offsets_ptr": "*i32", "k_offsets_ptr": "*i32", "seed_ptr": "*i64"}
            types |= dict.fromkeys(("log2_lse_ptr", "delta_ptr", "partial_k_ptr", "partial_v_ptr"), "*fp32")
            types |= dict.fromkeys(("scale", "log2_scale", "kept_frac", "kept_scale"), "fp32")
            constants = {"HAS_MEMORY": has_all, "HAS_DROPOUT": has_all, "D": 64, **blocks}
            constants |= {} if has_all else {"seed_ptr": None}
            yield Variant(f"packed_attention{name} {dtype}" + " all" * has_all, kernel, types, constants)


def topk_attention_variants() -> Iterator[Variant]:
    """Those of topk_attention, for both widths of a head."""
    from fastm3ae.kernels import topk_attention_triton as topk

    for dtype, torch_dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        kernels = {
            "": (topk._topk_attention_fwd_kernel, topk.forward_blocks(torch_dtype)),
            "_backward queries": (topk._topk_attention_bwd_queries_kernel, topk.query_blocks(torch_dtype)),
            "_backward keys": (topk._topk_attention_bwd_keys_kernel, topk.key_blocks(torch_dtype)),
        }
        for (name, (kernel, blocks)), head_dim in itertools.product(kernels.items(), (32, 64)):
            types = {name: f"*{dtype}" if name.endswith("_ptr") else "i32" for name in kernel.arg_names}
            types |= dict.fromkeys(("log2_lse_ptr", "delta_ptr"), "*fp32") | {"is_kept_ptr": "*i32"}
            types |= dict.fromkeys(("scale", "log2_scale"), "fp32")
            yield Variant(f"topk_attention{name} {dtype} {head_dim}", kernel, types, {"D": head_dim, **blocks})


def compile_triton(variant: Variant, arch: int):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    _, kernel, types, constants = variant
    names = kernel.arg_names
    options = {name: constants[name] for name in ("num_warps", "num_stages") if name in constants}
    constants = {name: value for name, value in constants.items() if name in names}
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    # Pointers, the official widths and strides are multiples of 16, for which Triton specialises a launch.
    is_aligned = [
        types[name].startswith("*") or name.startswith("stride") or name in ("D", "H", "W")
        for name in names
        if name not in constants
    ]
    places = [i for i, name in enumerate(names) if name not in constants]
    aligned = {
        (i,): [["tt.divisibility", 16]] for i, is_multiple in zip(places, is_aligned, strict=True) if is_multiple
    }
    return triton.compile(
        ASTSource(kernel, signature, constants, aligned), target=GPUTarget("cuda", arch, 32), options=options
    )


def usage(cubin: bytes) -> dict[str, int]:
    """What Triton's cuobjdump says of the one function of a cubin: REG, STACK, LOCAL, ..."""
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(number) for name, number in re.findall(r"([A-Z]+):(\d+)", said)}


def triton_rows(arch: int) -> Iterator[Row]:
    """What cuobjdump says of each variant; spills in bytes of stack per thread."""
    for variant in triton_variants():
        compiled = compile_triton(variant, arch)
        used = usage(compiled.asm["cubin"])
        threads = compiled.metadata.num_warps * WARP
        yield Row(variant.name, arch, used["REG"], used["STACK"] + used["LOCAL"], compiled.metadata.shared, threads)


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
    parser.add_argument("--only", choices=("cuda", "triton"), help="one kind of kernels (default: both)")
    arguments = parser.parse_args()

    rows = []
    for arch in ARCHITECTURES:
        if arguments.only != "triton":
            rows += cuda_rows(SOURCES, arch)
        if arguments.only != "cuda":
            rows += triton_rows(arch)
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
