"""docs/own_data.md: its commands run on files as it describes them, and its sentences are those of the program."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from prepared import write
from radiographs import dicom_bytes
from test_dicom_window import with_fields
from test_prepare_own_images import radiograph
from volumes import volume_bytes

from fastm3ae.cli import main
from fastm3ae.data.describe import describe_arrow

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/own_data.md").read_text()
COMMANDS = [
    line
    for block in re.findall(r"^```\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    for line in block.splitlines()
    if line.startswith("fastm3ae")
]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    rows = []
    for number in range(6):
        name = f"chest/{number}.dcm" if number < 4 else f"head/{number}.nii.gz"
        fields = {"PatientID": str(number // 2), "StudyDescription": "Chest", "BodyPartExamined": "CHEST"}
        pixels = radiograph(number)
        data = with_fields(dicom_bytes(pixels, bits_stored=12), **fields) if number < 4 else volume_bytes(
            np.stack([pixels] * 5, 1).astype(np.int16), packed=True
        )  # fmt: skip
        write(folder / "scans" / name, data)
        write(folder / "scans" / re.sub(r"\..*", ".txt", name), f"Report {number}")
        report = {"findings": f"Findings {number}", "impression": "None"}
        write(folder / "reports" / re.sub(r"\..*", ".json", name), json.dumps(report))
        split = ("train", "val", "test")[number % 3]
        rows.append({"file": f"scans/{name}", "image": name, "caption": "a", "split": split, "patient": "p"} | report)
    table = [",".join(rows[0]), *(",".join(row.values()) for row in rows)]
    write(folder / "table.csv", "\n".join(table) + "\n")
    write(folder / "table.jsonl", "\n".join(map(json.dumps, rows)))
    return folder


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command(command, files, monkeypatch, capsys):
    monkeypatch.chdir(files)
    assert main(shlex.split(command)[1:]) == 0, capsys.readouterr().err
    name = Path(shlex.split(command)[3]).stem
    num_images = sum(describe_arrow(f"arrows/{name}_{split}.arrow").num_images for split in ("train", "val", "test"))
    assert num_images == (8 if "--slice" in command else 6)
    assert Path(f"arrows/{name}.md").is_file() and Path(f"arrows/{name}_samples.png").is_file()


def test_the_page_has_commands_of_every_source():
    assert {command.split()[2] for command in COMMANDS} == {"folder", "csv", "jsonl"} and len(COMMANDS) == 9


def test_sentences_in_the_table_are_those_of_the_program():
    """Numbers and names stand for whatever the sentence names; strings that Python joins count as one."""
    sources = [path.read_text() for path in (ROOT / "fastm3ae/data").rglob("*.py")]
    program = re.sub(r'"\s*\n\s*f?"', "", "\n".join(sources))
    program = re.sub(r"\{[^{}]*\}", "{}", program)
    table = PAGE.split("## When something is wrong")[1]
    sentences = re.findall(r"^\| `(.*?)` \|", table, re.MULTILINE)
    assert len(sentences) > 15
    for sentence in sentences:
        assert re.sub(r"\d+|'.'", "{}", sentence) in program or sentence in program, sentence
