"""Models from folders and from a hub that stands in a folder, and back: the same weights, tokenizer and words."""

import pytest
import torch
import yaml
from fake_hub import fake_hub
from huggingface_hub import ModelCard
from runs import TOKENIZER
from whole_checkpoints import write_checkpoint

from fastm3ae import hub
from fastm3ae.cli import main
from fastm3ae.data.text import fingerprint, load_tokenizer
from fastm3ae.errors import UserError
from fastm3ae.weights.pretrained import load_model, read_about

ABOUT = {"step": 20, "validated_step": 10, "validation": {"score": 0.25, "mlm_loss": 2.5}}
CLASSES = {"m3ae-roberta": hub.M3AE, "swin": hub.M3AE, "mpma": hub.MPMA, "image": hub.ImageModel}


@pytest.mark.parametrize("name", CLASSES)
def test_a_saved_folder_is_a_checkpoint(name, tmp_path, capsys):
    expected = write_checkpoint(tmp_path / name, name, **ABOUT)
    model = CLASSES[name].from_pretrained(tmp_path / name)
    assert isinstance(model, type(expected)) and not model.training
    with torch.no_grad():
        next(model.parameters()).add_(1)  # what is saved is the model, not the file it came from
    model.save_pretrained(tmp_path / "saved")
    again = load_model(tmp_path / "saved")
    assert type(again) is type(expected)  # the plain one, which a run trains
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[key]), key
    assert read_about(tmp_path / "saved") == read_about(tmp_path / name)
    if name != "image":
        tokenizer = CLASSES[name].from_pretrained(tmp_path / "saved").tokenizer
        assert fingerprint(tokenizer) == fingerprint(load_tokenizer(TOKENIZER))
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "saved")]) == 0
    assert f"kind: {expected.config.kind}" in capsys.readouterr().out


def test_to_the_hub_and_back(tmp_path, monkeypatch):
    made = fake_hub(tmp_path / "hub", monkeypatch)
    write_checkpoint(tmp_path / "mpma", "mpma", **ABOUT)
    model = hub.MPMA.from_pretrained(tmp_path / "mpma")
    address = model.push_to_hub("ward/mpma", private=True, token="secret", commit_message="first")
    assert address == "https://hub/ward/mpma/commit/first" and made == [("ward/mpma", True, "secret")]
    again = hub.MPMA.from_pretrained("ward/mpma")
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[key]), key
    assert again.about == model.about and fingerprint(again.tokenizer) == fingerprint(model.tokenizer)


def test_the_card_says_what_the_run_says(tmp_path):
    write_checkpoint(tmp_path / "mpma", "mpma", transform="imagenet", **ABOUT)
    hub.MPMA.from_pretrained(tmp_path / "mpma").save_pretrained(tmp_path / "saved")
    text = (tmp_path / "saved" / "README.md").read_text()
    data = yaml.safe_load(text.split("---")[1])
    assert data["library_name"] == "fastm3ae" and "license" not in data and "mpma" in data["tags"]
    for line in (
        "| score | 0.25 |", "| steps | 20 |", "Of the validation split, after step 10:", "| data sets | made |",
        "| images | 64 x 64 px, normalised as `imagenet` |", "| texts | up to 24 tokens |", "no medical advice",
        "model = MPMA.from_pretrained(", "| all weights started at random | yes |",
    ):  # fmt: skip
        assert line in text, line
    (tmp_path / "saved" / "README.md").write_text("mine")
    hub.MPMA.from_pretrained(tmp_path / "saved").save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "README.md").read_text() == "mine"


def test_a_model_without_a_run_has_a_card(tmp_path):
    write_checkpoint(tmp_path / "image", "image")
    config = hub.ImageModel.from_pretrained(tmp_path / "image").config
    hub.ImageModel(config).save_pretrained(tmp_path / "saved")
    assert ModelCard.load(tmp_path / "saved" / "README.md").data.library_name == "fastm3ae"
    text = (tmp_path / "saved" / "README.md").read_text()
    assert "Nothing is known of its training." in text and "None were recorded with the weights." in text


def test_what_cannot_be_loaded_is_said(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_checkpoint(tmp_path / "mpma", "mpma")
    with pytest.raises(UserError, match=r"^mpma is a checkpoint of mpma; fastm3ae.hub.M3AE loads one of m3ae\.$"):
        hub.M3AE.from_pretrained("mpma")
    with pytest.raises(UserError, match="^there/is/none: there is no such checkpoint file"):
        hub.M3AE.from_pretrained("there/is/none")
    with pytest.raises(UserError, match=r"^MPMA.from_pretrained takes no config, strict\.$"):
        hub.MPMA.from_pretrained("mpma", config={}, strict=False)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):  # as in all tests
        hub.M3AE.from_pretrained("ward/other")
