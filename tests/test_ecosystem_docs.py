"""Every command and every snippet of docs/ecosystem.md runs, in their order, where the page says they do."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest
from corpus import caption_rows, png
from fake_hub import fake_hub
from runs import write_config, write_corpus
from whole_checkpoints import write_checkpoint

from fastm3ae.cli import main
from fastm3ae.data.arrow import write_pairs

DOCS = Path(__file__).parents[1] / "docs"
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
ELSEWHERE = ("pip install",)  # what is no command of ours


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The files that the page names."""
    monkeypatch.chdir(tmp_path)
    for name in ("m3ae", "mpma"):
        best = tmp_path / "runs" / name / "checkpoints" / "best"
        best.parent.mkdir(parents=True)
        write_checkpoint(best, name, step=10, validated_step=10, validation={"score": 0.5})
    (tmp_path / "arrows").mkdir()
    write_pairs(tmp_path / "arrows" / "roco_test.arrow", caption_rows(3))
    (tmp_path / "x.png").write_bytes(png(40, 50))
    fake_hub(tmp_path / "hub", monkeypatch)
    monkeypatch.setenv("WANDB_MODE", "offline")
    return tmp_path


def tiny(folder):
    """Options that make a run of a moment of the page's."""
    write_corpus(folder)
    config = write_config(folder, train={"num_steps": 1, "num_workers": 0, "device": "cpu", "tensorboard": False})
    random = ["--model.vision.weights", "random", "--model.text.weights", "random"]
    return ["--config", str(config), "--data.no-draw-demo", "--train.batch-size", "4", *random]


def test_the_page_runs(folder, capsys):
    names, num = {}, {"python": 0, "": 0}
    for language, block in BLOCK.findall((DOCS / "ecosystem.md").read_text()):
        num[language] += 1
        if language == "python":
            exec(compile(block, "ecosystem.md", "exec"), names)
            continue
        for line in block.splitlines():
            if line.startswith(ELSEWHERE):
                continue
            program, *words = shlex.split(line)
            assert program == "fastm3ae"
            if words[0] == "pretrain":
                if importlib.util.find_spec("wandb") is None:
                    continue
                words += tiny(folder)
            assert main(words) == 0, line
    assert num == {"python": 7, "": 5}
    assert names["image_BD"].shape == (2, 64) and names["fused_BD"].shape == (3, 96) and names["again"].about
    assert names["tokens"].shape == (1, 17, 64) and names["hidden"].shape[0] == 2


def test_the_page_of_wheels_names_what_the_build_reads():
    page = (DOCS / "wheels.md").read_text()
    setup = (DOCS.parent / "setup.py").read_text()
    variables = re.findall(r"^\| `(\w+)", page, re.MULTILINE)
    assert len(set(variables)) == 3 and all(f'"{name}"' in setup for name in variables)
    assert "python -m build" in (DOCS.parent / ".ci" / "run").read_text().replace("$python", "python")
