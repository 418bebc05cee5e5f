"""What each Triton kernel asks of a GPU, compiled ahead of time for sm_80 and sm_90: no GPU is needed.

python benchmarks/triton_resources.py    # the table; exit status 1 where a kernel spills registers
"""

import itertools
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastm3ae.kernels import gather_image_patches_triton as image_patches
from fastm3ae.kernels import gather_patches_triton as patches
from fastm3ae.kernels import packed_attention_backward_triton as attention_backward
from fastm3ae.kernels import packed_attention_triton as attention
from fastm3ae.kernels import random_patch_order_triton as order
from fastm3ae.kernels import restore_patches_triton as restored

ARCHITECTURES = (80, 90)


class Row(NamedTuple):
    kernel: str
    arch: int
    registers: int
    spills: int
    shared_bytes: int
    threads: int


def kernels() -> Iterator[tuple[str, object, dict[str, str], dict[str, object]]]:
    """Name, kernel, the types of its arguments and its constants, for every variant that the official shapes launch."""
    outputs = {"keep_ptr": "*i64", "restore_ptr": "*i64", "is_hidden_ptr": "*i1"}
    kernel, blocks = order._random_patch_order_fwd_kernel, {"BLOCK_N": order._BLOCK_N, "BLOCK_M": order._BLOCK_M}
    types = {"noise_ptr": "*fp32", "seed_ptr": "*i64", **outputs, "N": "i32", "K": "i32"}
    yield "random_patch_order", kernel, types, {**blocks, "FROM_SEED": False, "seed_ptr": None}
    yield "random_patch_order_from_seed", kernel, types, {**blocks, "FROM_SEED": True, "noise_ptr": None}

    sizes = {name: "i32" for name in ("B", "N", "K", "D", "H", "W", "samples_per_split", "places_per_split")}
    rows_and_columns = {"BLOCK_L": patches._BLOCK_L, "BLOCK_D": patches._BLOCK_D}
    for dtype in ("fp32", "bf16"):
        floats = (
            "x_ptr",
            "positions_ptr",
            "cls_ptr",
            "tokens_ptr",
            "grad_ptr",
            "grad_x_ptr",
            "update_ptr",
            "mask_token_ptr",
        )
        types = {
            **sizes,
            **dict.fromkeys(floats, f"*{dtype}"),
            "keep_ptr": "*i64",
            "partial_ptr": "*fp32",
            "restore_ptr": "*i64",
        }
        yield f"gather_patches {dtype}", patches._gather_patches_fwd_kernel, types, rows_and_columns
        yield f"scatter_patches {dtype}", patches._scatter_patches_kernel, types, rows_and_columns
        for needs_positions in (True, False):
            constants = {
                "BLOCK_L": patches._BLOCK_L_BACKWARD,
                "BLOCK_D": patches._BLOCK_D,
                "BLOCK_K": patches._BLOCK_K,
                "NEEDS_POSITIONS": needs_positions,
            }
            name = f"gather_patches_backward {dtype}" + " of x alone" * (not needs_positions)
            yield name, patches._gather_patches_bwd_kernel, types, constants
        blocks = {"BLOCK_L": restored._BLOCK_L, "BLOCK_D": restored._BLOCK_D}
        yield f"restore_patches {dtype}", restored._restore_patches_fwd_kernel, types, blocks
        yield f"restore_patches_backward {dtype}", restored._restore_patches_bwd_kernel, types, blocks

    kernel = image_patches._gather_image_patches_fwd_kernel
    for image, statistics in (("u8", {}), ("fp32", {"mean_ptr": None, "std_ptr": None})):
        types = {**sizes, "image_ptr": f"*{image}", "keep_ptr": "*i64", "pixels_ptr": "*bf16"}
        types |= {"mean_ptr": "*fp32", "std_ptr": "*fp32"}
        blocks = {"PATCH_SIZE": 16, "BLOCK_P": image_patches._BLOCK_P, "IS_UINT8": image == "u8"}
        yield f"gather_image_patches {image}", kernel, types, {**blocks, **statistics}
    yield from packed_attention_kernels()


def packed_attention_kernels() -> Iterator[tuple[str, object, dict[str, str], dict[str, object]]]:
    """The same for packed_attention, without slots and dropout and with all of it."""
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
            yield f"packed_attention{name} {dtype}" + " all" * has_all, kernel, types, constants


def compile_for(arch: int, kernel, types: dict[str, str], constants: dict[str, object]):
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
    """What cuobjdump says of the one function of a cubin: REG, STACK, LOCAL, ..."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(number) for name, number in re.findall(r"([A-Z]+):(\d+)", said)}


def rows() -> list[Row]:
    """One row per kernel variant and architecture; spills in bytes of stack per thread."""
    made = []
    for name, kernel, types, constants in kernels():
        for arch in ARCHITECTURES:
            compiled = compile_for(arch, kernel, types, constants)
            used = usage(compiled.asm["cubin"])
            spills = used["STACK"] + used["LOCAL"]
            threads = compiled.metadata.num_warps * 32
            made.append(Row(name, arch, used["REG"], spills, compiled.metadata.shared, threads))
    return made


if __name__ == "__main__":
    print(f"{'kernel':40} {'arch':>6} {'registers':>10} {'spills':>7} {'shared bytes':>13} {'threads':>8}")
    table = rows()
    for row in table:
        print(
            f"{row.kernel:40} {f'sm_{row.arch}':>6} {row.registers:10} {row.spills:7} {row.shared_bytes:13} "
            f"{row.threads:8}"
        )
    sys.exit(any(row.spills for row in table))
