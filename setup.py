"""Builds fastm3ae._C from csrc/ with CMake and ninja, without torch; pyproject.toml holds everything else."""

import os
import subprocess
import sys
from pathlib import Path

import pybind11
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

SOURCE_DIR = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    """Configures, builds and installs CMakeLists.txt where setuptools wants the module. MAX_JOBS limits the jobs."""

    def build_extension(self, ext: Extension) -> None:
        build_dir = Path(self.build_temp).resolve()
        module_dir = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        # --fresh: the last build's cache names tools in pip's isolated environment of that build, which is gone.
        configure = ["cmake", "--fresh", "-G", "Ninja", "-S", SOURCE_DIR, "-B", build_dir]
        definitions = {
            "CMAKE_BUILD_TYPE": "Release",
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
        }
        jobs = ["--parallel", os.environ["MAX_JOBS"]] if "MAX_JOBS" in os.environ else []
        subprocess.run([*configure, *(f"-D{key}={value}" for key, value in definitions.items())], check=True)
        subprocess.run(["cmake", "--build", build_dir, *jobs], check=True)
        subprocess.run(["cmake", "--install", build_dir, "--prefix", module_dir], check=True)


setup(
    # kernels/ has no __init__.py: as a top-level package it would answer to the name of Hugging Face's "kernels".
    packages=[*find_packages(include=["fastm3ae", "fastm3ae.*"]), "fastm3ae.kernels"],
    package_dir={"fastm3ae.kernels": "kernels"},
    ext_modules=[Extension("fastm3ae._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
