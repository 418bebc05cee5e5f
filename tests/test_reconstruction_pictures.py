"""Pictures of reconstructions at several masking ratios, of given images and texts."""

import dataclasses
import io

import numpy as np
import pytest
import torch
from corpus import TOKENIZER
from given import given, m3ae_folder, mpma_folder
from PIL import Image
from radiographs import dicom_bytes
from test_convert import lightning_checkpoint, official_config

from fastm3ae.cli import main
from fastm3ae.data.given import GivenPairs
from fastm3ae.errors import UserError
from fastm3ae.visualize import GREY, patchify, reconstructions
from fastm3ae.visualize.reconstructions import draw_reconstructions
from fastm3ae.visualize.subject import read_subject
from fastm3ae.weights.convert import to_official
from fastm3ae.weights.pretrained import convert_checkpoint, load_model

TEXTS = ["left lesion of the knee", "acute brain lesion"]


@pytest.fixture
def drawn(monkeypatch):
    """The rows of every sheet."""
    rows = []
    tile_grid = reconstructions.tile_grid
    monkeypatch.setattr(reconstructions, "tile_grid", lambda of, **options: rows.append(of) or tile_grid(of, **options))
    return rows


def tiles_of(drawn):
    names = ("original", "first", "first rebuilt", "second", "second rebuilt")
    return [dict(zip(names, (tile for _, tile in row.tiles), strict=True)) for row in drawn[0]]


@pytest.mark.parametrize("make", [m3ae_folder, mpma_folder])
def test_patches_are_hidden_at_every_ratio(make, drawn):
    """Those hidden at one ratio are hidden at higher ones; what is seen stays, and the model is as it was."""
    folder = make()
    subject = read_subject(folder, given(folder), TEXTS, device="cpu", seed=3)
    before = subject.model.config
    draw_reconstructions(subject, [0.5, 0.8], has_texts=True)
    assert subject.model.config is before and len(drawn[0]) == 2
    for of_pair, image_CHW in zip(tiles_of(drawn), subject.images(), strict=True):
        patches = {name: patchify(tile[None], 16)[0] for name, tile in of_pair.items()}
        assert torch.equal(of_pair["original"], image_CHW)
        hidden = {name: (patches[name] == GREY).all(dim=1) for name in ("first", "second")}
        assert hidden["first"].sum() == 8 and hidden["second"].sum() == 13
        assert hidden["second"][hidden["first"]].all()
        for name, is_hidden in hidden.items():
            assert torch.allclose(patches[f"{name} rebuilt"][~is_hidden], patches["original"][~is_hidden], atol=1e-6)
            assert not torch.allclose(patches[f"{name} rebuilt"][is_hidden], patches["original"][is_hidden], atol=1e-2)


def test_the_loss_is_that_of_the_model(drawn):
    folder = m3ae_folder()
    subject = read_subject(folder, given(folder), TEXTS, device="cpu")
    draw_reconstructions(subject, [0.75], has_texts=False)
    with torch.no_grad():
        pred_BNP, is_hidden_BN = subject.model.mim(subject.batch)
    target_BNP = patchify(subject.batch.image_BCHW, 16)
    variance, mean = torch.var_mean(target_BNP, dim=-1, keepdim=True)
    error_BN = ((pred_BNP - (target_BNP - mean) / (variance + 1e-6).sqrt()) ** 2).mean(dim=-1)
    for row, error_N, is_hidden_N in zip(drawn[0], error_BN, is_hidden_BN, strict=True):
        assert float(row.tiles[2][0].split("loss ")[1]) == pytest.approx(float(error_N[is_hidden_N].mean()), abs=6e-4)
        assert row.tiles[1][0] == "75% hidden\nsees 4 of 16" and "hidden words" not in row.caption


@pytest.mark.parametrize("make", [m3ae_folder, mpma_folder])
def test_words_stand_above_the_pictures(make, drawn):
    """Of M3AE once, since it sees the whole image; of MPMA at every ratio."""
    folder = make()
    subject = read_subject(folder, given(folder), TEXTS, device="cpu", token_frac=0.5)
    draw_reconstructions(subject, [0.5, 0.75], has_texts=True)
    true_M = [TOKENIZER.decode([label]).strip() for label in subject.batch.masked_labels_M.tolist()]
    with torch.no_grad():
        predicted_M = [
            TOKENIZER.decode([i]).strip() for i in subject.model.mlm_logits(subject.batch).argmax(-1).tolist()
        ]
    lines = [line for row in drawn[0] for line in row.caption.split("\n") if line.startswith("hidden words")]
    assert len(lines) == (2 if make is m3ae_folder else 4)
    at_75 = [line for line in lines if "75%" in line or "whole image" in line]  # 75 % is what the models are made with
    words = [word for line in at_75 for word in line.split(": ", 1)[1].split("; ")]
    assert words == [f"{a} -> {b}" for a, b in zip(true_M, predicted_M, strict=True)] and len(words) > 3
    assert drawn[0][0].caption.startswith("0.png: left lesion of the knee\n")


def test_images_without_texts(tmp_path, drawn, capsys):
    folder, out = m3ae_folder(), tmp_path / "deep" / "out"
    assert (
        main(["visualize", "reconstruct", str(folder), "--images", *map(str, given(folder)), "--output", str(out)]) == 0
    )
    assert [row.caption for row in drawn[0]] == ["0.png", "1.png"]
    assert [title.split("%")[0] for title, _ in drawn[0][0].tiles[1::2]] == ["50", "75", "90"]
    assert capsys.readouterr().out.splitlines() == ["seed 0", f"wrote {out / 'reconstructions.png'}"]
    assert Image.open(out / "reconstructions.png").size[0] == 7 * (192 + 6)


def test_texts_and_images_are_paired():
    folder = m3ae_folder()
    first, second = given(folder)

    def pairs(images, texts):
        batch = read_subject(folder, images, texts, device="cpu").batch
        return list(zip(batch.item_ids, batch.texts, strict=True))

    assert pairs([first, second], ["a"]) == [(str(first), "a"), (str(second), "a")]
    assert pairs([first], ["a", "b"]) == [(str(first), "a"), (str(first), "b")]
    assert pairs([first, second], []) == [(str(first), ""), (str(second), "")]
    assert pairs([first, second], ["a", "b"]) == [(str(first), "a"), (str(second), "b")]


def test_long_texts_are_cut_and_that_is_said(tmp_path, capsys):
    folder = m3ae_folder()
    arguments = ["--images", str(given(folder)[0]), "--texts", "knee " * 40, "--output", str(tmp_path / "out")]
    assert main(["visualize", "reconstruct", str(folder), *arguments]) == 0
    assert "warning: Text 1 is longer than the 24 tokens that the model reads" in capsys.readouterr().err


def test_a_dicom_file_is_an_image(tmp_path):
    levels = np.arange(64, dtype=np.uint16).reshape(8, 8) * 60
    (tmp_path / "a.dcm").write_bytes(dicom_bytes(levels))
    png = io.BytesIO()
    Image.fromarray(levels).save(png, "PNG")
    given_pairs = GivenPairs([(tmp_path / "a.dcm", ""), (dicom_bytes(levels), ""), (png.getvalue(), "")], "composite")
    images = [np.array(given_pairs.image(pair)) for pair in range(3)]
    assert np.array_equal(images[0], images[1]) and np.array_equal(images[0], images[2])
    with pytest.raises(UserError, match=r"a\.dcm cannot be used: the DICOM file cannot be decoded"):
        (tmp_path / "a.dcm").write_bytes(dicom_bytes(levels)[:200])
        given_pairs.image(0)


def test_an_official_checkpoint(tmp_path, capsys):
    """As it stands: it has no tokenizer; and one that does not say of what model it is."""
    folder = m3ae_folder()
    model = load_model(folder)
    torch.save({"state_dict": to_official(model.state_dict(), model)}, tmp_path / "official.ckpt")
    arguments = ["--images", str(given(folder)[0]), "--output", str(tmp_path / "out")]
    assert main(["visualize", "reconstruct", str(tmp_path / "official.ckpt"), *arguments]) == 2
    assert "does not say which tokenizer its model reads with: give --tokenizer." in capsys.readouterr().err
    assert (
        main(["visualize", "reconstruct", str(tmp_path / "official.ckpt"), *arguments, "--tokenizer", str(folder)]) == 2
    )
    assert "does not hold its configuration" in capsys.readouterr().err


def test_an_official_checkpoint_with_its_configuration(tmp_path):
    """It draws what one of ours that is converted from it does."""
    folder = m3ae_folder()
    model = load_model(folder)
    path = tmp_path / "official.ckpt"
    lightning_checkpoint(path, to_official(model.state_dict(), model), official_config(model))
    convert_checkpoint(path, tmp_path / "ours")
    ours, official = (
        read_subject(checkpoint, given(folder), TEXTS, device="cpu", tokenizer=str(folder))
        for checkpoint in (tmp_path / "ours", path)
    )
    sheets = [np.array(draw_reconstructions(subject, [0.5], has_texts=True)) for subject in (ours, official)]
    assert np.array_equal(*sheets)


REFUSED = {
    "--mask-ratios 0.5 1": "A mask ratio must hide some of the 16 patches and not all, got 1.",
    "--mask-ratios 0.99": "A mask ratio must hide some of the 16 patches and not all, got 0.99.",
    "--mask-ratios nan": "A mask ratio must hide some of the 16 patches and not all, got nan.",
    "--token-frac 2": "masking.token_frac must lie between 0 and 1, got 2.0.",
    "--tokenizer /nowhere": "The tokenizer folder /nowhere does not exist",
}


@pytest.mark.parametrize("options", REFUSED)
def test_mistakes_are_said_in_a_sentence(options, tmp_path, capsys):
    folder = m3ae_folder()
    arguments = ["--images", str(given(folder)[0]), "--output", str(tmp_path / "out"), *options.split()]
    assert main(["visualize", "reconstruct", str(folder), *arguments]) == 2
    assert REFUSED[options] in capsys.readouterr().err


def test_what_cannot_be_drawn_is_said(tmp_path, capsys):
    folder = m3ae_folder(objectives=("mlm", "itm"))
    image, text = str(given(folder)[0]), ["--texts", "knee"]
    assert main(["visualize", "reconstruct", str(folder), "--images", image]) == 2
    assert "m3ae has no decoder of images (its objectives are itm, mlm); take a checkpoint" in capsys.readouterr().err
    other = mpma_folder(objectives=("image_reconstruction",))
    assert main(["visualize", "reconstruct", str(other), "--images", image, *text]) == 2
    assert (
        "predicts no hidden words (its objectives are image_reconstruction); leave out --texts"
        in capsys.readouterr().err
    )
    assert main(["visualize", "reconstruct", str(folder), "--images", str(tmp_path / "none.png"), *text]) == 2
    assert "none.png cannot be read: No such file or directory." in capsys.readouterr().err
    (tmp_path / "broken.png").write_bytes(b"no image")
    assert main(["visualize", "reconstruct", str(folder), "--images", str(tmp_path / "broken.png")]) == 2
    assert "broken.png cannot be used: the image cannot be decoded" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert (
        main(["visualize", "reconstruct", str(other), "--images", image, "--output", str(tmp_path / "file" / "x")]) == 2
    )
    assert "cannot be written: Not a directory." in capsys.readouterr().err


def test_a_model_of_images_alone(tmp_path, capsys):
    from image_models import small_config

    from fastm3ae.model.build import build_model
    from fastm3ae.weights.pretrained import save_weights

    config = small_config()
    save_weights(build_model(config).state_dict(), config, tmp_path)
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    assert main(["visualize", "reconstruct", str(tmp_path), "--images", str(tmp_path / "a.png")]) == 2
    assert "is a model of images without texts; these pictures are of M3AE and MPMA." in capsys.readouterr().err


def test_a_tokenizer_of_another_model(tmp_path):
    folder = m3ae_folder()
    with pytest.raises(UserError, match="use the tokenizer that belongs to it"):
        read_subject(folder, given(folder), ["a"], tokenizer=str(_larger(tmp_path / "larger")))


def _larger(folder):
    from transformers import BertTokenizerFast

    folder.mkdir()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(len(TOKENIZER)))]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast.from_pretrained(folder).save_pretrained(folder)
    return folder


def test_separate_masking_shows_words_the_whole_image(drawn):
    folder = mpma_folder(masking="separate")
    subject = read_subject(folder, given(folder), TEXTS, device="cpu")
    draw_reconstructions(subject, [0.5, 0.75], has_texts=True)
    assert all(row.caption.count("hidden words, beside the whole image: ") == 1 for row in drawn[0])
    assert dataclasses.asdict(subject.model.config) == dataclasses.asdict(load_model(folder).config)
