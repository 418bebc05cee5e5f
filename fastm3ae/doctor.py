"""What this installation consists of, which code serves each op on each device, and what is missing."""

import platform
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib import metadata, util
from types import ModuleType

import torch

import fastm3ae

__all__ = ["Diagnosis", "diagnose"]

PACKAGES = ("torch", "triton", "transformers", "timm")
WITHOUT_CUDA = (
    "The CUDA kernels are not built: install fastm3ae again where there is an nvcc (CUDACXX, CUDA_HOME, PATH), or with "
    "FASTM3AE_CUDA=1, which fetches one from PyPI."
)


@dataclass
class Diagnosis:
    """What was found.

    Args:
        facts: Lines of a name and its value, or of a device's op and its implementation.
        advice: What is missing, and how to get it; one line each.
        broken: What does not work although it should.
    """

    facts: list[tuple[str, str]] = field(default_factory=list)
    advice: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)

    def render(self) -> str:
        """Returns the report, with the verdict on its last line."""
        lines = [f"{name:<28}{value}" for name, value in self.facts]
        lines += [f"advice: {line}" for line in self.advice]
        lines += [f"broken: {line}" for line in self.broken]
        return "\n".join([*lines, "broken" if self.broken else "everything that is here works"])


def diagnose() -> Diagnosis:
    """Looks at versions, GPUs and kernels, and tries a kernel on each device."""
    found = Diagnosis()
    found.facts.append(("fastm3ae", f"{fastm3ae.__version__} in {fastm3ae.__path__[0]}"))
    found.facts.append(("python", f"{platform.python_version()}, {sys.executable}"))
    for name in PACKAGES:
        found.facts.append((name, _version(name) or "missing"))
    found.facts.append(("CUDA of torch", torch.version.cuda or "none: a torch for CPUs"))
    driver_gpus = _nvidia_smi()
    for name, driver, _ in driver_gpus:
        found.facts.append(("driver", f"{driver} for {name}"))
    gpus = _gpus()
    for index, (name, capability, memory_bytes) in enumerate(gpus):
        text = f"{name}, compute capability {capability[0]}.{capability[1]}, {memory_bytes / 2**30:.0f} GiB"
        found.facts.append((f"cuda:{index}", text))
    if not gpus:
        found.facts.append(("GPU", "none that torch sees"))
        if driver_gpus:
            found.broken.append(
                f"The driver sees {driver_gpus[0][0]}, torch does not: install a torch for CUDA that driver "
                f"{driver_gpus[0][1]} runs, and look at CUDA_VISIBLE_DEVICES."
            )
    try:
        from fastm3ae import kernels
    except ImportError as error:
        found.broken.append(str(error))
        return found
    architectures = kernels.CUDA_ARCHITECTURES
    found.facts.append(
        ("CUDA kernels", f"{' '.join(architectures)}, by nvcc {kernels.CUDA_VERSION}" if architectures else "not built")
    )
    if not architectures:
        (found.broken if gpus else found.advice).append(WITHOUT_CUDA)
    for index, (name, capability, _) in enumerate(gpus):
        if architectures and not fits(architectures, capability):
            wanted = f"{capability[0]}{capability[1]}"
            found.broken.append(
                f"None of the architectures of the CUDA kernels runs on cuda:{index}, {name}: install fastm3ae again "
                f"with CMAKE_CUDA_ARCHITECTURES={wanted}."
            )
    has_triton = _version("triton") is not None
    if not has_triton:
        (found.broken if gpus else found.advice).append(
            "Triton is missing, which several ops need on a GPU: pip install 'triton>=3.6'."
        )
    for name in ("transformers", "timm"):
        if _version(name) is None:
            found.broken.append(f"{name} is missing: pip install {name}.")
    for module in sorted({getattr(kernels, name).__module__ for name in kernels.__all__}):
        if serving := implementations(sys.modules[module], architectures, has_triton):
            found.facts.append((module.rpartition(".")[2], f"CPU: {serving[0]:<9}CUDA: {serving[1]}"))
    if _version("transformers") and _version("timm"):
        from fastm3ae.model.attention import backends

        found.facts.append(("attention of the step", f"CPU: {backends('cpu')}"))
        found.facts.append(("", f"CUDA: {backends('cuda')}"))
    for device in ("cpu", *(f"cuda:{index}" for index in range(len(gpus)) if architectures)):
        found.broken += _try(kernels, device)
    return found


def fits(architectures: Iterable[str], capability: tuple[int, int]) -> bool:
    """Whether any of the architectures runs on a GPU.

    Args:
        architectures: sm_XY is machine code for GPUs of compute capability X.Y and later ones of the same X, with a
            letter for X.Y alone; compute_XY is PTX for any that is not older, compiled by the driver. A word such as
            "native" does not say, and counts as fitting.
        capability: X and Y of the GPU.
    """
    for architecture in architectures:
        kind, separator, number = architecture.partition("_")
        if not separator:
            return True
        digits = number.rstrip("af")
        compiled = int(digits[:-1]), int(digits[-1])
        if number != digits:
            if compiled == capability:
                return True
        elif compiled <= capability and (kind == "compute" or compiled[0] == capability[0]):
            return True
    return False


def implementations(module: ModuleType, architectures: Iterable[str], has_triton: bool) -> tuple[str, str] | None:
    """Returns what serves the ops of a file of kernels/ on CPUs and on GPUs, by the launchers that the file has.

    None: it has none, because its functions call the ops of other files.
    """
    launchers = [name for name in vars(module) if name.startswith("launch_")]
    if not launchers:
        return None
    on_cpu = "C++" if any("_cpu" in name for name in launchers) else "PyTorch"
    if not any("_cuda" in name for name in launchers):
        return on_cpu, "refused, it runs on the CPU only"
    if util.find_spec(f"{module.__name__}_triton"):
        return on_cpu, "Triton" if has_triton else "refused, Triton is missing"
    return on_cpu, "CUDA C++" if architectures else "refused, the CUDA kernels are not built"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _gpus() -> list[tuple[str, tuple[int, int], int]]:
    """Name, compute capability and bytes of memory of each GPU that torch sees."""
    if not torch.cuda.is_available():
        return []
    properties = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return [(gpu.name, (gpu.major, gpu.minor), gpu.total_memory) for gpu in properties]


def _nvidia_smi() -> list[tuple[str, str, str]]:
    """Name, driver version and compute capability of each GPU that the driver sees; empty without a driver."""
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", "--query-gpu=name,driver_version,compute_cap", "--format=csv,noheader"]
    process = subprocess.run(command, capture_output=True, text=True)
    rows = [tuple(line.split(", ")) for line in process.stdout.splitlines()] if process.returncode == 0 else []
    return [row for row in rows if len(row) == 3]


def _try(kernels: ModuleType, device: str) -> list[str]:
    """Computes a loss that is known, 1 / 2, and returns what went wrong."""
    pred, image, is_hidden = torch.ones(1, 2, 3), torch.tensor([0.0, 1.0]).expand(1, 3, 1, 2), torch.ones(1, 2) > 0
    try:
        pred, image, is_hidden = (tensor.to(device) for tensor in (pred, image, is_hidden))
        loss = kernels.masked_pixel_loss(pred, image, is_hidden, patch_size_px=1, normalize_target=False).item()
    except RuntimeError as error:
        return [f"masked_pixel_loss on {device}: {error}"]
    return [] if loss == 0.5 else [f"masked_pixel_loss on {device} gives {loss} instead of 0.5"]
