"""The folder ``kernels`` is importable as ``fastm3ae.kernels`` from every layout, and never as ``kernels``."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fastm3ae.kernels
from fastm3ae import _C

INSTALLED = Path(fastm3ae.kernels.__file__).parent
KERNELS = Path(fastm3ae.kernels.__path__[0])

USE_THE_OP = """
import sys, torch
from fastm3ae.kernels import masked_pixel_loss
loss = masked_pixel_loss(torch.ones(1, 1, 3), torch.zeros(1, 3, 1, 1), torch.ones(1, 1, dtype=torch.bool),
                         patch_size_px=1, normalize_target=False)
assert loss == 1, loss
assert [name for name in sys.modules if name.endswith("masked_pixel_loss")] == ["fastm3ae.kernels.masked_pixel_loss"]
print(sys.modules["fastm3ae.kernels.masked_pixel_loss"].__file__)
"""

IMPORT_BY_THE_OTHER_NAME = """
import sys
try:
    import kernels
except ModuleNotFoundError:
    sys.exit()
assert getattr(kernels, "__file__", None) is None and "torch" not in sys.modules, kernels
"""


def python(program, cwd, path=(), options=()):
    """Runs a program as `python -c` does, the working directory first on sys.path; returns the completed process."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path))}
    return subprocess.run([sys.executable, *options, "-c", program], cwd=cwd, env=env, capture_output=True, text=True)


def copy_package(target, kernels, with_module=True):
    """Copies the package to ``target`` and the kernels to the folder ``kernels``."""
    target.mkdir(parents=True)
    for name in ("__init__.py", "kernels.py"):
        shutil.copy(INSTALLED / name, target)
    if with_module:
        shutil.copy(_C.__file__, target)
    shutil.copytree(KERNELS, kernels, ignore=shutil.ignore_patterns("__pycache__"))


@pytest.fixture
def checkout(tmp_path):
    copy_package(tmp_path / "repo" / "fastm3ae", tmp_path / "repo" / "kernels")
    return tmp_path / "repo"


@pytest.fixture
def site_packages(tmp_path):
    copy_package(tmp_path / "site" / "fastm3ae", tmp_path / "site" / "fastm3ae" / "kernels")
    return tmp_path / "site"


def test_checkout_from_inside_and_outside(checkout, tmp_path):
    for process in (python(USE_THE_OP, cwd=checkout), python(USE_THE_OP, cwd=tmp_path, path=[checkout])):
        assert process.returncode == 0, process.stderr
        assert Path(process.stdout.strip()) == checkout / "kernels" / "masked_pixel_loss.py"


def test_installed_package_from_inside_and_outside_a_checkout(checkout, site_packages, tmp_path):
    (checkout / "notebooks").mkdir()
    for cwd in (tmp_path, checkout / "notebooks"):
        process = python(USE_THE_OP, cwd=cwd, path=[site_packages])
        assert process.returncode == 0, process.stderr
        assert Path(process.stdout.strip()) == site_packages / "fastm3ae" / "kernels" / "masked_pixel_loss.py"


def test_the_other_name_is_never_ours(checkout, site_packages):
    for process in (
        python(IMPORT_BY_THE_OTHER_NAME, cwd=checkout),
        python(IMPORT_BY_THE_OTHER_NAME, cwd="/", path=[site_packages]),
        python(IMPORT_BY_THE_OTHER_NAME, cwd="/"),
    ):
        assert process.returncode == 0, process.stderr


def test_another_package_of_that_name_wins_over_the_folder(checkout, tmp_path):
    (tmp_path / "other" / "kernels").mkdir(parents=True)
    (tmp_path / "other" / "kernels" / "__init__.py").write_text("WHOSE = 'theirs'\n")
    program = "import kernels; assert kernels.WHOSE == 'theirs'" + USE_THE_OP
    process = python(program, cwd=checkout, path=[tmp_path / "other"])
    assert process.returncode == 0, process.stderr


def test_transformers_does_not_take_the_folder_for_that_package(checkout):
    program = "from transformers.utils import is_kernels_available; print(is_kernels_available())"
    inside, outside = python(program, cwd=checkout), python(program, cwd="/")
    assert inside.returncode == 0, inside.stderr
    assert inside.stdout == outside.stdout


def test_an_unbuilt_checkout_says_how_to_build(tmp_path):
    copy_package(tmp_path / "repo" / "fastm3ae", tmp_path / "repo" / "kernels", with_module=False)
    # -S: without the installed packages, among which an editable installation would offer its built module.
    process = python("import fastm3ae.kernels", cwd=tmp_path / "repo", options=["-S"])
    assert process.returncode == 1
    last_line = process.stderr.strip().splitlines()[-1]
    assert last_line.startswith("ImportError: fastm3ae's C++ kernels are not built in") and "pip install" in last_line


def test_importing_the_kernels_imports_no_triton():
    process = python("import sys, fastm3ae.kernels; assert 'triton' not in sys.modules", cwd="/")
    assert process.returncode == 0, process.stderr
