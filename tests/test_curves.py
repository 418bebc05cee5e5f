"""Training curves: every metric once, controls beside what they control, several runs in one figure."""

import json
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from PIL import Image

from fastm3ae.cli import main
from fastm3ae.errors import UserError
from fastm3ae.visualize.curves import COLOURS, control_of, curves_figure, panel_svg, panels, run_names
from fastm3ae.visualize.figures import svg_text

TRAIN = [{"step": step, "split": "train", "mim_loss": 1 / step, "loss": 2 / step, "samples_per_s": 5.0,
          "learning_rate": 0.1} for step in (1, 2, 3)]  # fmt: skip
VAL = [{"step": 3, "split": "val", "mim_loss": 0.5, "mim_loss_patch_mean": 1.0, "open_accuracy": 0.2,
        "open_majority_accuracy": 0.3, "open_gain": -0.1, "score": 0.7}]  # fmt: skip


def write_run(folder, lines):
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("seed: 0\n")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_panels_have_every_metric_once():
    found = {panel.title: panel.curves for panel in panels({"a": TRAIN + VAL, "b": TRAIN})}
    assert list(found) == ["loss", "mim loss", "open accuracy", "open gain", "score", "learning rate"]
    drawn = {title: [(curve.run, curve.kind, curve.metric) for curve in curves] for title, curves in found.items()}
    assert drawn["mim loss"] == [
        ("a", "train", "mim_loss"), ("a", "validation", "mim_loss"), ("a", "control", "mim_loss_patch_mean"),
        ("b", "train", "mim_loss"),
    ]  # fmt: skip
    assert drawn["open accuracy"] == [
        ("a", "validation", "open_accuracy"), ("a", "control", "open_majority_accuracy")
    ]  # fmt: skip
    assert found["mim loss"][0].steps == [1, 2, 3] and found["mim loss"][0].values == [1, 1 / 2, 1 / 3]


def test_controls():
    names = ["loss", "loss_scale_of", "mlm_accuracy", "mlm_accuracy_shuffled_image", "mlm"]
    assert control_of("mlm_accuracy_shuffled_image", names) == "mlm_accuracy"
    assert control_of("mlm_accuracy", ["loss", "mlm_accuracy"]) is None
    assert control_of("loss_scale_of", names) is None  # the whole loss has none
    assert control_of("closed_majority_accuracy", names) == "closed_accuracy"


def test_a_figure_has_a_colour_for_each_run_and_a_name_for_each_line():
    figure = curves_figure(panels({"_a": TRAIN + VAL, "$b$": TRAIN}))  # matplotlib takes such names for its own ends
    lines = figure.axes[1].lines
    assert [line.get_color() for line in lines] == [COLOURS[0]] * 3 + [COLOURS[1]]
    assert np.array_equal(lines[3].get_xydata(), [[1, 1], [2, 1 / 2], [3, 1 / 3]])
    (legend,) = figure.legends
    names = {text.get_text() for text in legend.get_texts()}
    assert names == {"train, _a", "validation, _a", "control, _a", "train, $b$"}
    assert all(not text.get_parse_math() for text in legend.get_texts())
    again = curves_figure(panels({"_a": TRAIN + VAL, "$b$": TRAIN}))
    assert (svg := svg_text(figure)) == svg_text(again) and "train, $b$" in svg


def test_an_inline_panel_takes_the_colour_of_the_page():
    panel = panels({"<b>": [{"step": 1, "split": "val", "<script>_loss": 1.0}]})[0]
    svg = panel_svg(panel, ["<b>"])
    assert svg.startswith("<svg") and "currentColor" in svg and COLOURS[0] in svg and "metadata" not in svg
    assert "&lt;script&gt; loss" in svg and "<script" not in svg
    assert ElementTree.fromstring(svg).tag.endswith("svg")


def test_the_command(tmp_path, capsys):
    runs = [write_run(tmp_path / where / "run", TRAIN + VAL) for where in ("a", "b")]
    assert run_names(runs) == [str(run) for run in runs] and run_names(runs[:1]) == ["run"]
    out = tmp_path / "out"
    assert main(["visualize", "curves", *map(str, runs), "--output", str(out)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said == [f"wrote {out / f'curves.{suffix}'}" for suffix in ("png", "pdf", "svg")]
    assert Image.open(out / "curves.png").width == 2040 and (out / "curves.pdf").read_bytes().startswith(b"%PDF")
    assert f"train, {runs[1]}" in (out / "curves.svg").read_text()


def test_mistakes_are_said_in_a_sentence(tmp_path, capsys):
    run, empty = write_run(tmp_path / "run", TRAIN), write_run(tmp_path / "empty", [])
    for folders, sentence in {
        (run, run): "A run is given twice: ",
        (run, tmp_path): f"{tmp_path} is no run folder: it has no config.yaml.",
        (empty,): "empty: nothing was logged yet, so that there are no curves.",
    }.items():
        assert main(["visualize", "curves", *map(str, folders), "--output", str(tmp_path / "out")]) == 2
        assert f"error: {sentence}" in capsys.readouterr().err
    with pytest.raises(UserError, match="nothing was logged yet"):
        panels({})
