"""examples/own_data.sh: all that it has a stranger do runs, with fewer files and a small model."""

import json
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
from readers_folder import small_presets

from fastm3ae.cli import main
from fastm3ae.weights.header import read_safetensors

EXAMPLE = Path(__file__).parents[1] / "examples" / "own_data.sh"
SHORT = {'"$steps"': "2", '"$((steps / 2))"': "1", '"$here': '"' + str(EXAMPLE.parent)}


def commands():
    """The script's commands, as words."""
    text = EXAMPLE.read_text().replace("\\\n", " ")
    for long, short in SHORT.items():
        text = text.replace(long, short)
    return [shlex.split(line) for line in text.splitlines() if line.startswith(("python", "fastm3ae"))]


def test_from_a_hospitals_files_to_towers(tmp_path, monkeypatch, capsys):
    pytest.importorskip("pydicom")
    monkeypatch.chdir(tmp_path)
    small_presets(monkeypatch)
    for program, *words in commands():
        if program == "python":
            monkeypatch.setattr(sys, "argv", [*words, "--num", "40"])
            runpy.run_path(words[0], run_name="__main__")
        else:
            assert main(words) == 0, capsys.readouterr()
    card = Path("arrows/mine.md").read_text()
    images = re.findall(r"^\| (train|val|test) \| (\d+) \|", card, re.M)
    assert [split for split, _ in images] == ["train", "val", "test"] and sum(int(num) for _, num in images) == 40
    assert Path("arrows/mine_samples.png").is_file()
    evaluation = json.loads(Path("runs/retrieval/evaluation/metrics.json").read_text())
    assert evaluation["metrics"]["image_to_text_recall_at_1"]["num_items"] == 4
    for run in ("mine", "retrieval"):
        assert f"<h1>{run}</h1>" in Path(f"runs/{run}/report.html").read_text()
    assert Path("pictures/reconstructions.png").is_file()
    for tower in ("vision", "text"):
        assert read_safetensors(Path(f"towers/{tower}/model.safetensors"))[0]
