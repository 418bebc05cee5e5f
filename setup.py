"""Builds fastm3ae._C from csrc/ with CMake and ninja, without torch; pyproject.toml holds everything else.

FASTM3AE_CUDA: 0 leaves the CUDA kernels out, 1 insists on them, and fetches nvcc from PyPI where there is none; unset,
they are built where there is an nvcc. CMAKE_CUDA_ARCHITECTURES says for which GPUs, MAX_JOBS limits the processes.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

SOURCE_DIR = Path(__file__).resolve().parent
# 13.0, because every driver that runs CUDA 13 runs what it compiles.
NVCC_WHEELS = [f"nvidia-{name}==13.0.*" for name in ("cuda-nvcc", "cuda-crt", "nvvm", "cuda-runtime", "cuda-cccl")]
WITHOUT_CUDA = """
fastm3ae is built WITHOUT its CUDA kernels: {reason}.
Everything runs on CPUs; on a GPU, operations that need these kernels will refuse to run. To build them, install the
CUDA toolkit or point CUDACXX to an nvcc, and install again; FASTM3AE_CUDA=1 fetches nvcc from PyPI (280 MB).
`fastm3ae doctor` shows what is there.
"""


def wants_cuda() -> bool | None:
    """What FASTM3AE_CUDA asks for; None where it leaves the choice to the machine."""
    value = os.environ.get("FASTM3AE_CUDA", "")
    if value not in ("", "0", "1"):
        raise SystemExit(f"FASTM3AE_CUDA must be 0 or 1, got {value!r}")
    return bool(int(value)) if value else None


def find_toolkit_nvcc() -> str | None:
    """The nvcc that CUDACXX names; else that of CUDA_HOME, of PATH, or of the usual folder, the first that exists."""
    if os.environ.get("CUDACXX"):
        nvcc = shutil.which(os.environ["CUDACXX"])
        if nvcc is None:
            raise SystemExit(f"CUDACXX must be a program, got {os.environ['CUDACXX']!r}")
        return nvcc
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    candidates = [*(f"{home}/bin/nvcc" for home in homes), "nvcc", "/usr/local/cuda/bin/nvcc"]
    return next(filter(None, map(shutil.which, candidates)), None)


def find_wheel_nvcc() -> str | None:
    """The nvcc of NVCC_WHEELS, if they are installed where this build runs."""
    spec = importlib.util.find_spec("nvidia")
    folders = spec.submodule_search_locations if spec and spec.submodule_search_locations else []
    found = [nvcc for folder in folders for nvcc in Path(folder).glob("cu*/bin/nvcc")]
    return str(found[0]) if found else None


def announce(text: str) -> None:
    """Prints to stderr, and to the terminal, too: pip keeps the output of builds that succeed to itself."""
    print(text, file=sys.stderr, flush=True)
    if not sys.stderr.isatty():
        try:
            with open("/dev/tty", "w") as terminal:
                print(text, file=terminal)
        except OSError:  # there is no terminal
            pass


class CMakeBuild(build_ext):
    """Configures, builds and installs CMakeLists.txt where setuptools wants the module."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        build_dir = Path(self.build_temp).resolve()
        module_dir = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        # --fresh: the last build's cache names tools in pip's isolated environment of that build, which is gone.
        configure = ["cmake", "--fresh", "-G", "Ninja", "-S", SOURCE_DIR, "-B", build_dir]
        definitions = {
            "CMAKE_BUILD_TYPE": "Release",
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
        }
        environment = dict(os.environ)
        reason = "FASTM3AE_CUDA=0"
        if wants_cuda() is not False:
            reason = "no nvcc was found (CUDACXX, CUDA_HOME, PATH, /usr/local/cuda)"
            toolkit_nvcc, wheel_nvcc = find_toolkit_nvcc(), find_wheel_nvcc()
            nvcc = toolkit_nvcc or wheel_nvcc
            if nvcc is None and wants_cuda():
                raise SystemExit(f"FASTM3AE_CUDA=1, but {reason}, nor the wheels {' '.join(NVCC_WHEELS)}")
            if nvcc is not None:
                reason = None
                definitions |= {"FASTM3AE_CUDA": "ON", "CMAKE_CUDA_COMPILER": nvcc}
                if os.environ.get("CMAKE_CUDA_ARCHITECTURES"):
                    definitions["CMAKE_CUDA_ARCHITECTURES"] = os.environ["CMAKE_CUDA_ARCHITECTURES"]
            if nvcc is not None and nvcc == wheel_nvcc:
                # The wheels have their libraries in lib, while this nvcc looks for them in lib64.
                libraries = [str(Path(nvcc).parents[1] / "lib"), os.environ.get("LIBRARY_PATH")]
                environment["LIBRARY_PATH"] = os.pathsep.join(filter(None, libraries))
        jobs = ["--parallel", os.environ["MAX_JOBS"]] if "MAX_JOBS" in os.environ else []
        for command in (
            [*configure, *(f"-D{key}={value}" for key, value in definitions.items())],
            ["cmake", "--build", build_dir, *jobs],
            ["cmake", "--install", build_dir, "--prefix", module_dir],
        ):
            subprocess.run(command, check=True, env=environment)
        if reason:
            announce(WITHOUT_CUDA.format(reason=reason))


setup(
    # kernels/ has no __init__.py: as a top-level package it would answer to the name of Hugging Face's "kernels".
    packages=[*find_packages(include=["fastm3ae", "fastm3ae.*"]), "fastm3ae.kernels"],
    package_dir={"fastm3ae.kernels": "kernels"},
    ext_modules=[Extension("fastm3ae._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
    # pip asks for these before it builds, and installs them for the build alone.
    setup_requires=NVCC_WHEELS if wants_cuda() and not find_toolkit_nvcc() else [],
)
