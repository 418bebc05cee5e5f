"""A fine-tuned model asked by hand says what its evaluation says, and what it cannot do in one sentence."""

import csv
import io
import json
import shutil

import pytest
import torch
from bombs import png_header
from corpus import png
from PIL import Image
from runs import run, write_corpus
from safetensors.torch import load_file
from tasks_data import ANSWERS, CLASSES, vqa_rows, write_classes, write_vqa
from test_finetune import finetune

from fastm3ae.cli import main
from fastm3ae.data.arrow import ArrowTable
from fastm3ae.errors import UserError
from fastm3ae.tasks.predict import Predictor
from fastm3ae.weights.pretrained import WEIGHTS_FILE, read_about, save_weights

QUESTIONS = ("is the image dark", "which side is the lesion")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Runs of both tasks, each with its test."""
    folder = tmp_path_factory.mktemp("predict")
    write_corpus(folder)
    write_vqa(folder)
    write_classes(folder)
    train = {"num_steps": 12, "validate_every_steps": 12, "save_every_steps": 12}
    assert run(folder, output="pretrained", train={"num_steps": 1}) == 0
    for task in ("vqa", "classification"):
        assert finetune(folder, task, train=train) == 0
    (folder / "x.png").write_bytes(png(40))
    (folder / "y.png").write_bytes(png(220))
    return folder


@pytest.fixture(scope="module")
def answers(folder):
    return Predictor.load(folder / "vqa" / "checkpoints" / "best", "cpu")


@pytest.fixture(scope="module")
def classes(folder):
    return Predictor.load(str(folder / "classification" / "checkpoints" / "best" / WEIGHTS_FILE), device="cpu")


def predictions(folder, task):
    return list(csv.DictReader((folder / task / "test" / "predictions.csv").open(newline="")))


def assert_close(got, want):
    assert [label for label, _ in got] == [label for label, _ in want]
    assert [p for _, p in got] == pytest.approx([p for _, p in want], abs=1e-6)


def test_answers_are_those_of_the_evaluation(folder, answers, monkeypatch):
    """In batches of any size, and one after another."""
    rows, items = predictions(folder, "vqa"), list(vqa_rows(8, 200))
    pairs = [(item["image"], question) for item in items for question in item["questions"]]
    monkeypatch.setattr(answers, "batch_size", 5)
    found = answers.answer_all(pairs)
    assert len(rows) == len(found) == 16 and answers.labels == tuple(ANSWERS)
    for (image, question), choices, row in zip(pairs, found, rows, strict=True):
        assert question == row["text"]
        assert_close(choices[:1], [(row["predicted"], float(row["probability"]))])
        assert_close(answers.answer(image, question), choices)
        assert [p for _, p in choices] == sorted((p for _, p in choices), reverse=True)
        assert {answer for answer, _ in choices} == set(ANSWERS)
    assert len({row["probability"] for row in rows}) > 2  # else any pair's would do


def test_classes_are_those_of_the_evaluation(folder, classes):
    rows, table = predictions(folder, "classification"), ArrowTable([folder / "cls_made_test.arrow"])
    pairs = [
        (bytes(table.image_bytes(number)), text)
        for number, texts in enumerate(table.column("caption"))
        for text in texts
    ]
    found = classes.classify_all(pairs)
    for choices, row in zip(found, rows, strict=True):
        assert_close(choices[:1], [(row["predicted"], float(row["probability"]))])
        assert sum(p for _, p in choices) == pytest.approx(1)  # a softmax, unlike the answers' probabilities
        assert {name for name, _ in choices} == set(CLASSES["i_meth"])
    assert_close(classes.classify(*pairs[3], top=1), found[3][:1])


def test_an_image_is_a_path_bytes_or_of_pillow(folder, answers):
    path = folder / "x.png"
    want = answers.answer(path, QUESTIONS[1])
    assert_close(answers.answer(str(path), QUESTIONS[1]), want)
    assert_close(answers.answer(path.read_bytes(), QUESTIONS[1]), want)
    with Image.open(path) as image:
        assert_close(answers.answer(image, QUESTIONS[1]), want)
    assert abs(dict(answers.answer(folder / "y.png", QUESTIONS[1]))["left"] - dict(want)["left"]) > 1e-6


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "I;16", "CMYK", "1"])
def test_an_image_of_any_mode_is_as_its_file(answers, mode):
    levels = Image.linear_gradient("L").resize((40, 30))
    if mode == "RGBA":
        image = Image.merge("RGBA", (levels, levels, levels.rotate(180), levels.rotate(90, expand=False)))
    else:
        image = levels.convert("I").convert("I;16") if mode == "I;16" else levels.convert(mode)
    stream = io.BytesIO()
    image.save(stream, "TIFF")
    assert_close(answers.answer(image, QUESTIONS[0]), answers.answer(stream.getvalue(), QUESTIONS[0]))


def test_top_and_nothing(answers):
    assert len(answers.answer(png(3), QUESTIONS[0], top=2)) == 2 and len(answers.answer(png(3), "x", top=99)) == 4
    assert answers.answer_all([]) == []


def test_equal_probabilities_keep_the_order_of_the_logits(answers):
    chosen = answers.task.choices(torch.tensor([[120.0, 130.0, -5.0, 130.0]]), 3)
    assert chosen.labels.tolist() == [[1, 3, 0]] and chosen.probabilities.tolist() == [[1.0, 1.0, 1.0]]


def test_a_long_question_is_known(answers):
    assert not answers.is_cut("chest " * 22) and answers.is_cut("chest " * 23)


def test_without_a_question_or_an_image(folder, answers, classes, tmp_path):
    (tmp_path / "text.png").write_text("no image")
    image = folder / "x.png"
    for call, message in (
        (lambda: answers.answer(image, " \n"), "^The question is empty.$"),
        (lambda: answers.answer_all([(image, "a"), (image, "")]), "^The question number 2 is empty.$"),
        (
            lambda: answers.answer(tmp_path / "none.png", "a"),
            r"The image .*none.png cannot be read: No such file or di",
        ),
        (lambda: answers.answer(tmp_path, "a"), r"The image .* cannot be read: Is a directory.$"),
        (lambda: answers.answer(tmp_path / "text.png", "a"), r"text.png cannot be used: the image cannot be decoded: "),
        (lambda: answers.answer_all([(image, "a"), (png(1)[:40], "a")]), "The image number 2 cannot be used: the ima"),
        (lambda: answers.answer(png_header(30_000, 30_000), "a"), r"exceeds limit of \d+ pixels"),
        (lambda: answers.answer(image, "a", top=0), "top must be at least 1, got 0"),
        (lambda: answers.classify(image, "a"), "best was fine-tuned for vqa, not for classification: ask it by fastm3"),
        (lambda: classes.answer(image, "a"), "for classification, not for vqa: .* predict classification, .* classify"),
    ):
        with pytest.raises(UserError, match=message):
            call()
    assert len(classes.classify(image, "")) == 2  # an image may come without words


def test_checkpoints_that_cannot_be_asked(folder, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"none/?.*: there is no such checkpoint file"):
        Predictor.load(tmp_path / "none")
    with pytest.raises(UserError, match=r"best was not fine-tuned for a task: fastm3ae finetune makes such"):
        Predictor.load(folder / "pretrained" / "checkpoints" / "best")
    with pytest.raises(UserError, match="The device must be auto, cpu, cuda or cuda:N, got 'tpu'"):
        Predictor.load(folder / "vqa" / "checkpoints" / "best", "tpu")
    best = folder / "vqa" / "checkpoints" / "best"
    config, about = read_about(best)
    state = load_file(best / WEIGHTS_FILE)
    about["config"]["task"]["kind"] = "retrieval"
    save_weights(state, config, tmp_path, about)
    with pytest.raises(UserError, match="was fine-tuned for retrieval; expected one of vqa, classification"):
        Predictor.load(tmp_path)
    about["config"]["task"]["kind"] = "vqa"
    save_weights({name: x for name, x in state.items() if not name.startswith("vqa_head")}, config, tmp_path, about)
    with pytest.raises(UserError, match="lacks vqa_head, which vqa needs"):
        Predictor.load(tmp_path)
    state["vqa_head.3.bias"][1] = float("nan")
    save_weights(state, config, tmp_path, about)
    with pytest.raises(UserError, match="gives probabilities that are not finite"):
        Predictor.load(tmp_path).answer(folder / "x.png", "a")


def test_a_checkpoint_alone_is_enough(folder, tmp_path):
    """Neither the data nor the run nor the tokenizer that it was trained with are read."""
    shutil.copytree(folder / "vqa" / "checkpoints" / "best", tmp_path / "best")
    config, about = read_about(tmp_path / "best")
    about["config"]["data"] |= {"root": "/nowhere", "tokenizer": "/nowhere"}
    save_weights(load_file(tmp_path / "best" / WEIGHTS_FILE), config, tmp_path / "best", about)
    again = Predictor.load(tmp_path / "best", "cpu")
    image = folder / "x.png"
    assert_close(again.answer(image, QUESTIONS[0]), Predictor.load(
        folder / "vqa" / "checkpoints" / "best", "cpu").answer(image, QUESTIONS[0]))  # fmt: skip


def command(folder, task, *arguments, checkpoint=None):
    checkpoint = checkpoint or folder / task / "checkpoints" / "best"
    return main(["predict", task, "--checkpoint", str(checkpoint), "--device", "cpu", *arguments])


def test_the_command(folder, answers, classes, capsys):
    images = [str(folder / name) for name in ("x.png", "y.png")]
    assert command(folder, "vqa", "--image", *images, "--question", QUESTIONS[0], "--top", "2") == 0
    want = [answers.answer(image, QUESTIONS[0], top=2) for image in images]
    assert capsys.readouterr().out.splitlines() == [
        line for image, choices in zip(images, want, strict=True)
        for line in (image, *(f"  {p:.3f}  {answer}" for answer, p in choices))
    ]  # fmt: skip
    assert command(folder, "classification", "--image", images[1], "--text", "axial brain", "--json") == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["image"] == images[1] and found["text"] == "axial brain"
    assert_close(
        [(one["class"], one["probability"]) for one in found["predictions"]], classes.classify(images[1], "axial brain")
    )
    assert command(folder, "vqa", "--image", images[0], "--question", "chest " * 30) == 0
    assert "warning: the question is longer than the 24 tokens that the model reads" in capsys.readouterr().err


def test_mistakes_end_the_command_with_one_sentence(folder, capsys):
    image = str(folder / "x.png")
    for task, arguments, message in (
        ("vqa", ["--image", image, "none.png", "--question", "a"], "The image none.png cannot be read"),
        ("vqa", ["--image", image, "--question", ""], "error: The question is empty."),
        ("retrieval", ["--image", image], "'retrieval' is not one of vqa, classification"),
    ):
        assert command(folder, task, *arguments) == 2
        captured = capsys.readouterr()
        assert message in captured.err and captured.err.count("\n") == 1 and captured.out == ""
    checkpoint = folder / "classification" / "checkpoints" / "best"
    assert command(folder, "vqa", "--image", image, "--question", "a", checkpoint=checkpoint) == 2
    assert "was fine-tuned for classification, not for vqa" in capsys.readouterr().err
