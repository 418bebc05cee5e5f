"""What setup.py decides: with CUDA or without, by which nvcc, for which GPUs."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest

from fastm3ae import _C

ROOT = Path(__file__).parents[1]

pytestmark = [
    pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs a checkout"),
    pytest.mark.skipif(os.name == "nt", reason="shell scripts stand for nvcc"),
]
VARIABLES = ("CUDACXX", "CUDA_HOME", "CUDA_PATH", "FASTM3AE_CUDA", "CMAKE_CUDA_ARCHITECTURES", "MAX_JOBS")


def load(path):
    spec = importlib.util.spec_from_file_location(f"loaded_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def bare_machine(monkeypatch, tmp_path):
    """A machine without nvcc: nothing on PATH, nothing in the usual folder, no wheels, no variables."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "nvidia" else find_spec(name))
    which = shutil.which
    monkeypatch.setattr(shutil, "which", lambda name: None if name.startswith("/usr/local/cuda") else which(name))
    monkeypatch.setitem(sys.modules, "pybind11", types.SimpleNamespace(get_cmake_dir=lambda: "pybind11_cmake"))


@pytest.fixture
def setup_py(monkeypatch, bare_machine):
    """Runs setup.py with the environment of that moment; returns it as a module, with what it gave to setup()."""

    def run():
        given = {}
        monkeypatch.setattr("setuptools.setup", lambda **keywords: given.update(keywords))
        module = load(ROOT / "setup.py")
        monkeypatch.setattr(module, "announce", lambda text: module.announced.append(text))
        module.given, module.announced = given, []
        return module

    return run


@pytest.fixture
def nvcc(tmp_path):
    """Writes a program that looks like nvcc to a folder."""

    def install(folder):
        program = tmp_path / folder / "nvcc"
        program.parent.mkdir(parents=True)
        program.write_text("#!/bin/sh\n")
        program.chmod(0o755)
        return str(program)

    return install


def commands_of_build(module, monkeypatch, tmp_path):
    """The command lines that build_ext would run, and the environment of the first."""
    from setuptools import Distribution, Extension

    commands, environments = [], []

    def run(command, check, env):
        commands.append(" ".join(map(str, command)))
        environments.append(env)

    monkeypatch.setattr(subprocess, "run", run)
    build = module.CMakeBuild(Distribution())
    build.build_temp, build.build_lib = str(tmp_path / "temp"), str(tmp_path / "lib")
    build.build_extension(Extension("fastm3ae._C", sources=[]))
    return commands, environments[0]


def test_nvcc_is_the_first_of_cudacxx_cuda_home_and_path(setup_py, nvcc, monkeypatch, tmp_path):
    assert setup_py().find_toolkit_nvcc() is None
    on_path, at_home, chosen = nvcc("somewhere"), nvcc("home/bin"), nvcc("chosen")
    monkeypatch.setenv("PATH", str(tmp_path / "somewhere"))
    assert setup_py().find_toolkit_nvcc() == on_path
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    assert setup_py().find_toolkit_nvcc() == at_home
    monkeypatch.setenv("CUDACXX", chosen)
    assert setup_py().find_toolkit_nvcc() == chosen
    monkeypatch.setenv("CUDACXX", str(tmp_path / "nothing"))
    with pytest.raises(SystemExit, match="CUDACXX must be a program, got .*nothing"):
        setup_py().find_toolkit_nvcc()


def test_with_an_nvcc_cuda_is_built(setup_py, nvcc, monkeypatch, tmp_path):
    monkeypatch.setenv("CUDACXX", nvcc("chosen"))
    monkeypatch.setenv("CMAKE_CUDA_ARCHITECTURES", "75;90a-real")
    monkeypatch.setenv("MAX_JOBS", "3")
    module = setup_py()
    (configure, build, install), environment = commands_of_build(module, monkeypatch, tmp_path)
    assert f"-DFASTM3AE_CUDA=ON -DCMAKE_CUDA_COMPILER={tmp_path}/chosen/nvcc" in configure
    assert "-DCMAKE_CUDA_ARCHITECTURES=75;90a-real" in configure
    assert build.endswith("--parallel 3") and install.endswith(f"--prefix {tmp_path}/lib/fastm3ae")
    assert "LIBRARY_PATH" not in environment.keys() - os.environ.keys()
    assert module.announced == [] and module.given["setup_requires"] == []


def test_without_an_nvcc_the_build_says_so(setup_py, monkeypatch, tmp_path):
    module = setup_py()
    (configure, *_), _ = commands_of_build(module, monkeypatch, tmp_path)
    assert "CUDA" not in configure
    (text,) = module.announced
    assert "WITHOUT its CUDA kernels: no nvcc was found" in text and "FASTM3AE_CUDA=1" in text
    assert module.given["setup_requires"] == []


def test_cuda_can_be_left_out(setup_py, nvcc, monkeypatch, tmp_path):
    monkeypatch.setenv("CUDACXX", nvcc("chosen"))
    monkeypatch.setenv("FASTM3AE_CUDA", "0")
    module = setup_py()
    (configure, *_), _ = commands_of_build(module, monkeypatch, tmp_path)
    assert "CUDA" not in configure and "WITHOUT its CUDA kernels: FASTM3AE_CUDA=0" in module.announced[0]


def test_cuda_can_be_insisted_on(setup_py, nvcc, monkeypatch, tmp_path):
    monkeypatch.setenv("FASTM3AE_CUDA", "1")
    module = setup_py()
    names = {requirement.partition("==")[0] for requirement in module.given["setup_requires"]}
    assert names == {
        "nvidia-cuda-nvcc", "nvidia-cuda-crt", "nvidia-nvvm", "nvidia-cuda-runtime", "nvidia-cuda-cccl"
    }  # fmt: skip
    with pytest.raises(SystemExit, match="FASTM3AE_CUDA=1, but no nvcc was found"):
        commands_of_build(module, monkeypatch, tmp_path)

    wheel_nvcc = nvcc("site/nvidia/cu13/bin")
    wheels = types.SimpleNamespace(submodule_search_locations=[str(tmp_path / "site" / "nvidia")])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: wheels)
    (configure, *_), environment = commands_of_build(module, monkeypatch, tmp_path)
    assert f"-DCMAKE_CUDA_COMPILER={wheel_nvcc}" in configure
    assert environment["LIBRARY_PATH"].split(os.pathsep)[0] == f"{tmp_path}/site/nvidia/cu13/lib"


def test_other_answers_are_refused(setup_py, monkeypatch):
    monkeypatch.setenv("FASTM3AE_CUDA", "yes")
    with pytest.raises(SystemExit, match="FASTM3AE_CUDA must be 0 or 1, got 'yes'"):
        setup_py()


def test_an_announcement_is_printed_where_there_is_no_terminal(monkeypatch, bare_machine, capsys):
    monkeypatch.setattr("setuptools.setup", lambda **keywords: None)
    module = load(ROOT / "setup.py")
    monkeypatch.setattr(module, "open", lambda *arguments: (_ for _ in ()).throw(OSError()), raising=False)
    module.announce("no CUDA")
    assert capsys.readouterr().err == "no CUDA\n"


def test_the_module_says_what_is_in_it():
    assert bool(_C.cuda_architectures) == bool(_C.cuda_version) == hasattr(_C, "masked_pixel_loss_cuda")
    assert all(isinstance(name, str) for name in _C.cuda_architectures)


@pytest.mark.skipif(shutil.which("ldd") is None, reason="needs ldd")
def test_the_module_needs_no_library_of_cuda():
    """Neither torch's CUDA runtime nor another: the module loads on a machine without any."""
    needed = subprocess.run(["ldd", _C.__file__], capture_output=True, text=True, check=True).stdout
    assert "libc.so" in needed and "cuda" not in needed and "torch" not in needed


SPILLING = """
__global__ void __launch_bounds__(1024, 2) spills(float* x) {
  float values[64];
  for (int i = 0; i < 64; ++i) values[i] = x[i * 1024 + threadIdx.x];
  __syncthreads();
  for (int i = 0; i < 64; ++i) x[i * 1024 + threadIdx.x] = values[63 - i] * values[i];
}
__global__ void __launch_bounds__(96) fits(float* x) { x[threadIdx.x] *= 2; }
"""


@pytest.fixture
def resource_usage():
    return load(ROOT / "benchmarks" / "resource_usage.py")


@pytest.mark.skipif(not any(map(shutil.which, ("nvcc", "/usr/local/cuda/bin/nvcc"))), reason="needs nvcc")
def test_a_kernel_that_spills_is_found(resource_usage, tmp_path):
    (tmp_path / "planted.cu").write_text(SPILLING)
    rows = {row.kernel: row for row in resource_usage.cuda_rows([tmp_path / "planted.cu"], 90)}
    assert rows["spills"].spills > 0 and rows["spills"].threads == 1024
    assert rows["fits"].spills == 0 and rows["fits"].threads == 96


def test_every_triton_kernel_is_compiled(resource_usage):
    pytest.importorskip("triton", reason="Triton has no build for this system")
    launched = {variant.kernel.__name__ for variant in resource_usage.triton_variants()}
    sources = "".join(path.read_text() for path in (ROOT / "kernels").glob("*_triton.py"))
    assert launched == set(re.findall(r"^def (\w+_kernel)\(", sources, flags=re.MULTILINE))


def test_occupancy(resource_usage):
    def occupancy(**changes):
        row = resource_usage.Row(kernel="", arch=90, registers=32, spills=0, shared_bytes=0, threads=256)
        return resource_usage.occupancy(row._replace(**changes))

    assert occupancy() == 1
    assert occupancy(registers=33) == 0.75  # 40 registers are given out, for 51 warps, of which 6 blocks take 48
    assert occupancy(registers=69) == 0.375
    assert occupancy(threads=32) == 0.5  # 32 blocks at most
    assert occupancy(shared_bytes=48 << 10) == 0.5
    assert occupancy(shared_bytes=48 << 10, arch=80) == 0.375
