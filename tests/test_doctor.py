import os
import sys

import pytest

import fastm3ae
from fastm3ae import cli, doctor, kernels

H200 = ("NVIDIA H200", (9, 0), 141 << 30)
TURING = ("Tesla T4", (7, 5), 16 << 30)


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(doctor, "_gpus", lambda: [])
    monkeypatch.setattr(doctor, "_nvidia_smi", lambda: [])


@pytest.fixture
def fake_gpu(monkeypatch, no_gpu):
    """Makes the doctor believe in a GPU on which every kernel that is compiled works."""

    def plug_in(gpu, architectures=("sm_80", "sm_90", "compute_90")):
        monkeypatch.setattr(doctor, "_gpus", lambda: [gpu])
        monkeypatch.setattr(doctor, "_try", lambda kernels, device: [])
        monkeypatch.setattr(kernels, "CUDA_ARCHITECTURES", architectures)

    return plug_in


@pytest.mark.parametrize(
    ("architectures", "capability", "fitting"),
    [
        (("sm_80",), (8, 0), True),
        (("sm_80",), (8, 9), True),
        (("sm_86",), (8, 0), False),
        (("sm_80", "sm_90"), (7, 5), False),
        (("sm_80", "sm_90"), (12, 0), False),
        (("sm_80", "sm_90", "compute_90"), (12, 0), True),
        (("compute_90",), (8, 0), False),
        (("sm_120",), (12, 1), True),
        (("sm_90a",), (9, 0), True),
        (("sm_100f", "compute_100f"), (12, 0), False),
        (("native",), (8, 6), True),
        ((), (9, 0), False),
    ],
)
def test_which_gpus_an_architecture_fits(architectures, capability, fitting):
    assert doctor.fits(architectures, capability) == fitting


def test_the_command_names_versions_and_every_op(no_gpu, capsys):
    assert cli.main(["doctor"]) == 0
    said = capsys.readouterr().out
    lines = dict(line.split(maxsplit=1) for line in said.splitlines())
    for name in ("python", "torch", "triton", "transformers", "timm"):
        assert lines[name][0].isdigit(), name
    files = {getattr(kernels, name).__module__.rpartition(".")[2] for name in kernels.__all__}
    assert files - lines.keys() == {"memory_attention"}  # it is packed_attention
    assert lines["masked_pixel_loss"].startswith("CPU: C++")
    assert lines["random_patch_order"].split() == ["CPU:", "PyTorch", "CUDA:", "Triton"]
    assert lines["resize_crop"].endswith("CUDA: refused, it runs on the CPU only")
    assert said.splitlines()[-1] == "everything that is here works"


def test_without_gpu_missing_kernels_are_advice(no_gpu, monkeypatch):
    monkeypatch.setattr(kernels, "CUDA_ARCHITECTURES", ())
    found = doctor.diagnose()
    assert not found.broken and "FASTM3AE_CUDA=1" in found.advice[0]
    assert dict(found.facts)["masked_pixel_loss"].endswith("refused, the CUDA kernels are not built")


def test_a_gpu_that_everything_fits(fake_gpu):
    fake_gpu(H200)
    found = doctor.diagnose()
    assert not found.broken
    assert dict(found.facts)["cuda:0"] == "NVIDIA H200, compute capability 9.0, 141 GiB"


def test_a_gpu_without_kernels_is_broken(fake_gpu, capsys):
    fake_gpu(H200, architectures=())
    assert cli.main(["doctor"]) == 1
    said = capsys.readouterr().out
    assert "broken: The CUDA kernels are not built" in said and said.splitlines()[-1] == "broken"


def test_a_gpu_of_another_architecture_is_broken(fake_gpu):
    fake_gpu(TURING)
    (line,) = doctor.diagnose().broken
    assert "runs on cuda:0, Tesla T4" in line and "CMAKE_CUDA_ARCHITECTURES=75" in line


@pytest.mark.parametrize("package", ["triton", "timm", "transformers"])
def test_a_missing_package(package, no_gpu, monkeypatch):
    version = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: None if name == package else version(name))
    found = doctor.diagnose()
    lines = found.advice if package == "triton" else found.broken
    assert any(f"{package} is missing" in line.lower() and "pip install" in line for line in lines)
    assert dict(found.facts)[package] == "missing"
    on_gpus = dict(found.facts)["random_patch_order"]
    assert on_gpus.endswith("refused, Triton is missing" if package == "triton" else "Triton")


@pytest.mark.skipif(os.name == "nt", reason="a shell script stands for nvidia-smi")
def test_a_gpu_that_only_the_driver_sees_is_broken(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "_gpus", lambda: [])
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'NVIDIA A100-SXM4-80GB, 535.104.05, 8.0'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    found = doctor.diagnose()
    assert dict(found.facts)["driver"] == "535.104.05 for NVIDIA A100-SXM4-80GB"
    assert "NVIDIA A100-SXM4-80GB, torch does not" in found.broken[0]
    program.write_text("#!/bin/sh\necho 'No devices were found'\nexit 6\n")
    assert not doctor.diagnose().broken


def test_a_wrong_number_and_a_failing_kernel_are_broken(no_gpu, monkeypatch):
    monkeypatch.setattr(kernels, "masked_pixel_loss", lambda pred, *inputs, **options: pred.mean())
    assert doctor.diagnose().broken == ["masked_pixel_loss on cpu gives 1.0 instead of 0.5"]

    def fail(*inputs, **options):
        raise RuntimeError("cudaGetDevice: cudaErrorInsufficientDriver: ...")

    monkeypatch.setattr(kernels, "masked_pixel_loss", fail)
    assert "cudaErrorInsufficientDriver" in doctor.diagnose().broken[0]


def test_an_unbuilt_package_is_broken(no_gpu, monkeypatch):
    monkeypatch.delattr(fastm3ae, "_C")
    monkeypatch.delattr(fastm3ae, "kernels")
    monkeypatch.setitem(sys.modules, "fastm3ae._C", None)
    monkeypatch.delitem(sys.modules, "fastm3ae.kernels")
    (line,) = doctor.diagnose().broken
    assert "kernels are not built" in line and "pip install" in line


@pytest.mark.gpu
def test_this_gpu():
    found = doctor.diagnose()
    assert not found.broken and "cuda:0" in dict(found.facts)
