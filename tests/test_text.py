"""Tokenizers: every kind of folder, every mistake, and the same tokens as transformers' own call gives."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from transformers import BertTokenizerFast, PreTrainedTokenizerFast

from fastm3ae.data.text import encode, load_tokenizer
from fastm3ae.errors import UserError

TOKENIZERS = Path(__file__).parent / "data" / "golden" / "data" / "tok"
TEXTS = [
    "",
    "no acute abnormality",
    "Axial T2-weighted MRI of the brain, 1.5 cm lesion (arrow);  don't  biopsy.",
    "señora\n中文 \u200b \x07 ultrasound",
    "chest radiograph showing a large left pleural effusion. " * 8,
]


@pytest.fixture(params=["bert-base-uncased", "roberta"])
def bare_folder(request):
    return TOKENIZERS / request.param


def test_bare_and_saved_folders_give_the_same_tokenizer(bare_folder, tmp_path):
    bare = load_tokenizer(bare_folder)
    bare.save_pretrained(tmp_path)
    saved = load_tokenizer(str(tmp_path))
    assert len(saved) == len(bare) and saved.is_fast
    for text in TEXTS:
        assert encode(saved, text, 16).tokens == encode(bare, text, 16).tokens


@pytest.mark.parametrize("max_tokens", [3, 8, 64])
def test_encode_equals_the_call_of_transformers(bare_folder, max_tokens):
    tokenizer = load_tokenizer(bare_folder)
    for text in TEXTS:
        encoding = encode(tokenizer, text, max_tokens)
        assert encoding.ids == tokenizer(text, truncation=True, max_length=max_tokens)["input_ids"]
        # transformers' call leaves its own truncation and padding behind, which must not matter.
        tokenizer(text, truncation=True, max_length=5, padding="max_length")
        assert encode(tokenizer, text, max_tokens).ids == encoding.ids


def words(encoding):
    joined = {}
    for token, word in zip(encoding.tokens, encoding.word_ids, strict=True):
        if word is not None:
            joined.setdefault(word, []).append(token)
    return list(joined.values())


def test_words_of_bert():
    encoding = encode(load_tokenizer(TOKENIZERS / "bert-base-uncased"), "ct radiograph, hypoechoic 1.5", 64)
    expected = [["ct"], ["radio", "##graph"], ["[UNK]"], ["hypo", "##echo", "##ic"], ["1"], ["."], ["5"]]
    assert words(encoding) == expected


def test_words_of_roberta():
    encoding = encode(load_tokenizer(TOKENIZERS / "roberta"), "large brain, right-sided", 64)
    text_of_words = ["".join(tokens) for tokens in words(encoding)]
    assert text_of_words == ["large", "Ġbrain", ",", "Ġright", "-", "sided"]
    assert len(encoding.ids) > len(text_of_words) + 2  # some of them are of several tokens


def test_the_vocabulary_decides_about_capitals(tmp_path):
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    (tmp_path / "vocab.txt").write_text("\n".join([*special, "brain", "Brain"]) + "\n")
    assert encode(load_tokenizer(tmp_path), "Brain brain", 8).tokens[1:-1] == ["Brain", "brain"]
    (tmp_path / "vocab.txt").write_text("\n".join([*special, "brain"]) + "\n")
    assert encode(load_tokenizer(tmp_path), "Brain brain", 8).tokens[1:-1] == ["brain", "brain"]


def test_no_global_state():
    before = dict(os.environ)
    encode(load_tokenizer(TOKENIZERS / "roberta"), TEXTS[2], 16)
    assert dict(os.environ) == before


def saved_roberta(folder):
    load_tokenizer(TOKENIZERS / "roberta").save_pretrained(folder)
    return folder


def test_missing_folder(tmp_path):
    with pytest.raises(UserError, match=r"folder .*/nowhere does not exist; expected a folder with tokenizer.json"):
        load_tokenizer(tmp_path / "nowhere")


def test_folder_without_vocabulary(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"has no vocabulary; expected tokenizer.json, vocab.txt"):
        load_tokenizer(tmp_path)


def test_vocabulary_without_merges(tmp_path):
    shutil.copy(TOKENIZERS / "roberta" / "vocab.json", tmp_path)
    with pytest.raises(UserError, match=r"vocab.json but no merges.txt"):
        load_tokenizer(tmp_path)


def test_tokenizer_json_alone(tmp_path):
    saved_roberta(tmp_path)
    for file in tmp_path.iterdir():
        if file.name != "tokenizer.json":
            file.unlink()
    with pytest.raises(UserError, match=r"tokenizer.json but no tokenizer_config.json"):
        load_tokenizer(tmp_path)


def test_damaged_tokenizer_json(tmp_path):
    file = saved_roberta(tmp_path) / "tokenizer.json"
    file.write_text(file.read_text()[:1000])
    with pytest.raises(UserError, match=r"The tokenizer in .* cannot be read"):
        load_tokenizer(tmp_path)


def test_tokenizer_without_a_mask_token(tmp_path):
    backend = load_tokenizer(TOKENIZERS / "roberta").backend_tokenizer
    PreTrainedTokenizerFast(
        tokenizer_object=backend, cls_token="<s>", sep_token="</s>", pad_token="<pad>"
    ).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text()).get("mask_token") is None
    with pytest.raises(UserError, match=r"has no mask token"):
        load_tokenizer(tmp_path)


def test_tokenizer_without_a_vocabulary(tmp_path):
    BertTokenizerFast().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"has no vocabulary; a local folder needs tokenizer.json"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "environment", [{"HF_HUB_OFFLINE": "1"}, {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}], ids=str
)
def test_unreachable_hub(environment, tmp_path):
    code = "from fastm3ae.data.text import load_tokenizer; load_tokenizer('roberta-base')"
    environment = os.environ | environment | {"HF_HOME": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[1])}
    start = time.monotonic()
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False, timeout=120
    )
    message = result.stderr.splitlines()[-1]
    assert "UserError: The tokenizer 'roberta-base' is no local folder and could not be fetched" in message
    assert message.endswith(
        "a local folder with tokenizer.json, vocab.txt (BERT), or vocab.json and merges.txt (RoBERTa) works too."
    )
    assert "Retrying" not in result.stderr and time.monotonic() - start < 60
