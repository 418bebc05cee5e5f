"""The documentation: its commands run, its names exist, its pages say what the package has, and the site builds."""

import contextlib
import importlib.util
import io
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from readers_folder import small_presets, write_folder
from torch.distributed.run import get_args_parser

from fastm3ae.cli import main

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
# Elsewhere than in a reader's folder: what installs, what CI does, and what only a cluster has.
RUN_BY_OTHERS = re.compile(
    r"python3 -m venv|\.venv/bin/pip|pip (install|download|wheel)|git |export |sbatch |python -m build|FASTM3AE_CUDA="
)


def site_pages():
    """The pages in the site's order."""

    def flat(entries):
        for entry in entries:
            for place in entry.values():
                yield from [place] if isinstance(place, str) else flat(place)

    text = (ROOT / "mkdocs.yml").read_text()
    return list(flat(yaml.safe_load(text)["nav"]))


def doings(page):
    """What a page has its reader do: the commands of its shell blocks, and its blocks of Python as a whole."""
    for language, text in re.findall(r"^ *```(\w*)[^\n]*\n(.*?)^ *```$", page.read_text(), re.M | re.S):
        if language == "python":
            yield language, text
        elif language in ("", "bash", "sh"):
            lines = text.replace("\\\n", " ").splitlines()
            yield from (("", line) for line in lines if line.strip() and not line.lstrip().startswith("#"))


def of_fastm3ae(command):
    """The arguments of the command ``fastm3ae``, however it is started; None for other commands."""
    words = shlex.split(command.split(" && ")[-1], comments=True)
    if words[0] == "torchrun":
        options = get_args_parser().parse_args(words[1:])  # exits, if torchrun has no such options
        words = ["python", "-m", options.training_script, *options.training_script_args]
    if words[:3] == ["python", "-m", "fastm3ae"]:
        return words[3:]
    return words[1:] if words[0].endswith("fastm3ae") else None


def run(arguments, folder):
    """What a command said, if it did not end well."""
    arguments = [word.replace("/shared/", f"{folder}/shared/") for word in arguments]
    arguments += MORE.get(" ".join(arguments[:2]), MORE.get(arguments[0], []))
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            status = main(arguments)
        except SystemExit as error:  # of the parser: there is no such option
            status = error.code
    return None if status == 0 else f"{shlex.join(arguments)}: exit status {status}: {said.getvalue()[-600:]}"


# What cannot be small in a folder or in a preset.
MORE = {
    "prepare chexpert": ["--num-val", "20"],
    "with": shlex.split(
        "max_steps=2 batch_size=2 per_gpu_batchsize=2 num_gpus=1 num_workers=0 model.vision.weights=random "
        "model.text.weights=random model.vision.width=64 model.vision.num_blocks=2 "
        "model.text.width=48 model.text.num_heads=2 model.text.num_layers=2 model.text.mlp_width=96 "
        "model.fusion.width=48 model.fusion.num_heads=2 model.mim.decoder_width=48 model.mim.decoder_num_layers=1 "
        "model.mim.decoder_num_heads=2 train.device=cpu"
    ),
}
# What these pages have their reader do, one after the other in one folder; other pages have tests of their own.
WAYS = {
    "quickstart": ["index.md"],
    "public data": ["data.md", "pretraining.md", "several_gpus.md", "clusters.md", "finetuning.md", "original.md"],
    "pictures": ["pictures.md"],
}
OTHERS = {
    "wheels.md": "test_ecosystem_docs",
    "ecosystem.md": "test_ecosystem_docs",
    "kernels.md": "test_kernels_page",
    "own_data.md": "test_own_data_docs",
}


@pytest.mark.parametrize("way", WAYS)
def test_a_readers_way(way, tmp_path, monkeypatch):
    write_folder(tmp_path)
    monkeypatch.chdir(tmp_path)
    small_presets(monkeypatch)
    failures = []
    for page in WAYS[way]:
        for language, text in doings(DOCS / page):
            if language == "python":
                exec(compile(text, page, "exec"), {})
            elif arguments := of_fastm3ae(text):
                failures += filter(None, [run(arguments, tmp_path)])
    if failures:
        pytest.fail("\n".join(failures), pytrace=False)


def test_every_page_is_read_by_a_test():
    read = {page for pages in WAYS.values() for page in pages}
    for page in DOCS.glob("*.md"):
        has_doings = any(language or of_fastm3ae(text) for language, text in doings(page))
        if has_doings and page.name not in read:
            assert page.name in (ROOT / "tests" / f"{OTHERS[page.name]}.py").read_text()


PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS.glob("*.md")])


def scripts(page):
    """The scripts that a page runs, in its blocks or in its text, with their options."""
    text = page.read_text().replace("\\\n", " ")
    for words in re.findall(
        r"(?:python|bash|sh) ((?:[\w.-]+/)+[\w.-]+(?:\.py|\.sh)[^`\n|]*)", " ".join(text.split("\n"))
    ):
        script, *rest = words.split()
        yield script, [word for word in rest if word.startswith("--")]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_scripts_and_their_options_exist(page):
    for script, options in scripts(page):
        assert (ROOT / script).is_file(), script
        folders = {(ROOT / script).parent, ROOT / "benchmarks"}  # examples lend theirs from there
        shared = [ROOT / script, *(path for folder in folders for path in folder.glob("*.py"))]
        source = "".join(path.read_text() for path in shared)
        for option in options:
            assert f'"{option}"' in source, f"{script} has no {option}"


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_what_is_named_exists(page):
    """Modules, classes and functions by their full names, and fields as options."""
    text = page.read_text()
    for name in set(re.findall(r"`(fastm3ae(?:\.\w+)+)`", text)):
        assert resolves(name), name
    fields = set(re.findall(r"^\| `([\w.]+)` \|", reference(), re.M))
    for option in set(re.findall(r"--((?:data|masking|model|optim|task|train)\.[\w.-]+)", text)):
        name = option.replace("-", "_").replace(".no_", ".").rstrip(".")
        assert name in fields, option


def resolves(name):
    """Whether a dotted name is a module, or a name in one, or a name in that."""
    parts = name.split(".")
    for number in range(len(parts), 0, -1):
        with contextlib.suppress(ModuleNotFoundError):
            found = importlib.import_module(".".join(parts[:number]))
            for part in parts[number:]:
                found = getattr(found, part, None)
            return found is not None
    return False


def reference():
    spec = importlib.util.spec_from_file_location("site_hook", DOCS / "site.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.reference()


def test_every_dependency_is_explained():
    """In docs/dependencies.md, and none that is not there."""
    tomllib = pytest.importorskip("tomllib")  # of Python 3.11
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    name = re.compile(r"[\w-]+")
    page = (DOCS / "dependencies.md").read_text()
    always = page.split("| --- | --- |")[1].split("\n\n")[0]
    assert re.findall(r"^\| ([\w-]+) \|", always, re.M) == [name.match(line)[0] for line in project["dependencies"]]
    extras = {key: set(name.findall(found)) for key, found in re.findall(r"^\| `(\w+)` \| ([^|]+) \|", page, re.M)}
    assert extras == {
        key: {name.match(line)[0] for line in lines} for key, lines in project["optional-dependencies"].items()
    }


def test_every_page_is_in_the_site():
    assert sorted(site_pages()) == sorted(path.name for path in DOCS.glob("*.md"))


def test_the_site_builds_without_a_warning(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stderr.strip()) == (0, "")
    page = (tmp_path / "configuration" / "index.html").read_text()
    assert "train.batch_size" in page and "model.num_slots" in page and "mpma-demo" in page
    assert list((tmp_path / "measured").glob("*_faults.txt"))
    fetched = re.findall(
        r'<(?:script|link|img|iframe)[^>]*(?:src|href)="(https?:[^"]*)', (tmp_path / "index.html").read_text()
    )
    assert fetched == []  # it is read in hospitals without a network
