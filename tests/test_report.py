"""The page about a run: it needs nothing else, shows every text as text, and leaves nothing out."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from reports import HOSTILE, hostile_run, picture_bytes
from runs import run, write_corpus

import fastm3ae
from fastm3ae.cli import main
from fastm3ae.errors import UserError
from fastm3ae.training.report import MAX_NONFINITE, write_report

EMPTY = {"meta", "img", "br", "hr", "link", "path", "use", "rect"}


class Page(HTMLParser):
    """What is in a page: elements with their attributes, and the texts."""

    def __init__(self, file):
        super().__init__()
        self.elements, self.texts, self.open = [], [], []
        self.feed(Path(file).read_text(encoding="utf-8"))
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if tag not in EMPTY:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def assert_self_contained(page):
    """No element that runs, loads or sends anything; addresses are within the page or data."""
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "link", "iframe", "object", "embed", "form", "base", "audio", "video", "foreignobject"}
    for tag, attributes in page.elements:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href", "xlink:href", "srcset", "action", "data", "poster"):
                assert value.startswith(("#", "data:image/png;base64,")), (tag, name, value[:80])
            elif not name.startswith("xmlns"):
                assert not re.search(r"url\((?!#)", value or ""), (tag, name)
    styles = "".join(re.findall(r"<style[^>]*>(.*?)</style>", Path(page.file).read_text(), re.DOTALL))
    assert "@import" not in styles and "url(" not in styles and "http" not in styles
    policy = next(meta["content"] for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def read(file):
    Page.file = file
    page = Page(file)
    assert_self_contained(page)
    return page


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pre-training, and what three seeds of a fine-tuning leave behind."""
    folder = tmp_path_factory.mktemp("reported")
    write_corpus(folder)
    assert (
        run(folder, output="pretrained", train={"num_steps": 2, "validate_every_steps": 1, "save_every_steps": 1}) == 0
    )
    for seed, score in ((1, 0.5), (2, 0.25), (10, 0.75)):
        hostile_run(folder / "seeds", f"seed_{seed}", seed, score)
    return folder


def test_a_pre_training(folder, capsys):
    assert main(["report", str(folder / "pretrained")]) == 0
    file = folder / "pretrained" / "report.html"
    assert capsys.readouterr().out == f"wrote {file}\n"
    page = read(file)
    metrics = [json.loads(line) for line in (folder / "pretrained" / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in metrics if line["split"] == "val"][-1]
    for name in ("mlm_loss", "mlm_accuracy", "mim_loss", "score"):
        assert f"{name.replace('_', ' ')} {last[name]:.4g}" in page.text
    row = f"mim loss {last['mim_loss']:.4g} .* {last['mim_loss_patch_mean']:.4g} each patch as its mean"
    assert re.search(row, page.text) and "with another pair's image" in page.text
    config = yaml.safe_load(page.texts[next(i for i, text in enumerate(page.texts) if text.startswith("output:"))])
    assert config == yaml.safe_load((folder / "pretrained" / "config.yaml").read_text())
    environment = json.loads((folder / "pretrained" / "environment.json").read_text())
    assert environment["device"] in page.text and f"torch {environment['libraries']['torch']}" in page.text
    assert "made_train.arrow" in page.text and "Pre-training of M3AE · complete, 2 of 2 steps" in page.text
    for name in ("step_000001", "step_000002", "best"):
        assert name in page.text
    (image,) = page.all("img")
    picture = folder / "pretrained" / "pictures" / "reconstructions_000002.png"
    assert picture_bytes(image["src"]) == picture.read_bytes() and image["alt"] == "reconstructions, step 2"
    titles = {"loss", "mlm loss", "mim loss", "itm loss", "mlm accuracy", "itm accuracy", "score", "learning rate"}
    assert len(page.all("svg")) == len(titles) <= sum(text.strip() in titles for text in page.texts)


def test_seeds(folder):
    page = read(write_report(folder / "seeds"))
    assert page.text.count("50.0 ± 25.0 50.0 25.0 75.0") == len(HOSTILE)
    assert "seed 1, % seed 2, % seed 10, %" in page.text and "■ seed_1 ■ seed_2 ■ seed_10" in page.text
    assert "Pre-training of M3AE, 3 runs" in page.text and page.text.count("config.yaml") == 3
    assert [f"seed_{seed}/test; checkpoint" in page.text for seed in (1, 2, 10)] == [True] * 3
    confusion = (folder / "seeds" / "seed_1" / "test" / "confusion.png").read_bytes()
    assert confusion in [picture_bytes(image["src"]) for image in page.all("img")]


def test_one_seed_and_an_evaluation_elsewhere(folder, tmp_path):
    seed_2 = folder / "seeds" / "seed_2"
    page = read(write_report(seed_2, tmp_path / "x" / "page.html", [folder / "seeds" / "seed_1" / "test"]))
    assert " test; checkpoint" in page.text and f"{folder / 'seeds' / 'seed_1' / 'test'}; checkpoint" in page.text
    assert "Over the seeds" not in page.text and not (seed_2 / "report.html").exists()


def test_hostile_texts_are_shown_as_text(tmp_path):
    """Wherever they stand: in names, metrics, items, data, versions, notes and the configuration."""
    page = read(write_report(hostile_run(tmp_path, HOSTILE[0].replace("/", "-"))))
    joined = "\n".join(page.texts)
    for text in HOSTILE:
        assert joined.count(text) > 5, text
    assert HOSTILE[2] in next(text for text in page.texts if text == HOSTILE[2])  # of the stalled process, alone
    assert page.text.startswith(HOSTILE[0].replace("/", "-")) and "49" not in page.all("title")
    images = [picture_bytes(image["src"])[:4] for image in page.all("img")]
    assert images == [b"\x89PNG"] * 2  # the confusion and the last of the two pictures


def test_what_went_wrong_is_said(tmp_path):
    text = read(write_report(hostile_run(tmp_path))).text
    assert "60 steps were left out and changed nothing." in text
    assert f"And {60 - MAX_NONFINITE} more lines in nonfinite.jsonl." in text and "stall_process_0.txt" in text
    assert "hardware from step 2" in text and "1.5 minutes" in text and "1,234,567" in text


def test_a_run_that_has_just_begun(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("train: {num_steps: 7}\nmodel: {kind: mpma}\n")
    text = read(write_report(tmp_path / "run")).text
    assert "Pre-training of MPMA · not complete, 0 of 7 steps" in text
    assert "Nothing was logged yet." in text and "There was none yet." in text and "There is none." in text


def test_mistakes_are_said_in_a_sentence(folder, tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 2
    assert f"error: {tmp_path} is no run folder: it has no config.yaml." in capsys.readouterr().err
    assert main(["report", str(folder / "pretrained"), "--evaluations", str(tmp_path)]) == 2
    assert f"There is no metrics.json in {tmp_path} or below it" in capsys.readouterr().err
    assert main(["report", str(folder / "pretrained"), "--output", str(folder / "pretrained" / "data.json" / "x")]) == 2
    assert "x cannot be written: " in capsys.readouterr().err
    broken = hostile_run(tmp_path)
    (broken / "summary.json").write_text("{")
    with pytest.raises(UserError, match=r"summary\.json is not JSON: "):
        write_report(broken)
    (broken / "metrics.jsonl").write_text('{"loss": 1}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl is damaged in line 1: it has no step and split\."):
        write_report(broken)


def test_the_template_is_installed():
    """Files that are no modules are part of an installed package only if they are declared."""
    root = Path(fastm3ae.__file__).parents[1]
    assert '"fastm3ae.training" = ["report.html"]' in (root / "pyproject.toml").read_text()
    assert [path.name for path in (root / "fastm3ae").rglob("*.html")] == ["report.html"]
