"""Replays a folder of data pipeline goldens: arrow files, tokenizers, whole-word masking, batches, transforms."""

import json
import random
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from parity_common import Check, compare, compare_values
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from fastm3ae.config import MaskingConfig
from fastm3ae.data.answers import normalize_answer
from fastm3ae.data.arrow import ArrowTable
from fastm3ae.data.collate import BatchRequest
from fastm3ae.data.collate_pairs import ClassificationBatches, PretrainBatches, RetrievalBatches, VqaBatches
from fastm3ae.data.datasets import ClassificationDataset, PairDataset, VqaDataset
from fastm3ae.data.decode import decode_image
from fastm3ae.data.images import make_transform, normalization, normalize
from fastm3ae.data.text import encode, load_tokenizer
from fastm3ae.masking import corrupt, select_words_official

LABEL_COLUMN = "i_meth_label"  # of MELINDA's two label columns the one that the original's configuration names
TOKEN_FRAC = 0.15


def check_data_goldens(folder: Path) -> list[Check]:
    """Every recorded value that the stored files allow to compare, and one entry that lists what they do not."""
    return DataGoldens(Path(folder)).checks()


class DataGoldens:
    """A folder with data_pipeline.json, data_pipeline.safetensors, the files that they name, and tok/NAME."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.meta: dict[str, Any] = json.loads((folder / "data_pipeline.json").read_text())
        self.tensors = load_file(folder / "data_pipeline.safetensors")
        self.not_checked: list[str] = []
        self.tokenizers = {path.name: load_tokenizer(path) for path in sorted((folder / "tok").iterdir())}

    def checks(self) -> list[Check]:
        checks: list[Check] = []
        for key, recorded in self.meta.items():
            kind, _, name = key.partition("/")
            check = {
                "arrow": partial(self.arrow_files, recorded),
                "tokenizer": partial(self.tokenizer, name, recorded),
                "wwm": partial(self.word_masking, name, recorded),
                "collate": partial(self.batch, name, recorded),
                "normalize_word": partial(self.answers, recorded),
            }.get(kind)
            if check:
                checks += [Check(f"{key}/{c.name}", c.max_error, c.ok, c.detail) for c in check()]
            elif key != "versions":
                self.not_checked.append(key)
        for key, recorded in self.tensors.items():
            if key.startswith("transform/"):
                checks += self.transform(key, recorded)
        return [*checks, Check("not checked", 0.0, True, f"{len(self.not_checked)}: {', '.join(self.not_checked)}")]

    def arrow_files(self, recorded: dict[str, Any]) -> Iterator[Check]:
        """Number of rows, types and content of each stored file."""
        for name, want in recorded.items():
            if not (self.folder / name).is_file():
                self.not_checked.append(name)
                continue
            table = ArrowTable.open(
                [self.folder / name], {column: kind_of(dtype) for column, dtype in want["schema"].items()}
            )
            yield compare_values(f"{name}/rows", len(table), want["rows"])
            for column, values in want["content"].items():
                yield compare_values(f"{name}/{column}", table.column(column), values)

    def tokenizer(self, name: str, recorded: dict[str, int]) -> Iterator[Check]:
        """Size of the vocabulary, and ids of special tokens."""
        tokenizer = self.tokenizers[name]
        for key, want in recorded.items():
            known = {"len": len(tokenizer), "vocab_size": tokenizer.vocab_size}
            yield compare_values(key, known[key] if key in known else getattr(tokenizer, f"{key}_token_id"), want)

    def word_masking(self, name: str, recorded: dict[str, Any]) -> Iterator[Check]:
        """Selected words from the recorded seed, and the corrupted text from the recorded draws."""
        tokenizer, length = self.tokenizers[name], recorded["max_length"]
        want = {key.rsplit("/", 1)[1]: value for key, value in self.tensors.items() if key.startswith(f"wwm/{name}/")}
        encodings = [encode(tokenizer, text, length) for text in recorded["texts"]]
        tokens = [encoding.tokens + [tokenizer.pad_token] * (length - len(encoding)) for encoding in encodings]
        yield compare_values("tokens", tokens, recorded["tokens"])

        ids_BT = padded([encoding.ids for encoding in encodings], length, tokenizer.pad_token_id)
        yield compare("input_ids", ids_BT, want["input_ids"])
        rng = random.Random(recorded["python_random_seed"])
        is_selected_BT = torch.from_numpy(np.array([select_words_official(row, TOKEN_FRAC, rng) for row in tokens]))
        yield compare("mask_labels_before_special", is_selected_BT, want["mask_labels_before_special"])
        budget = max(is_selected_BT.sum(1).tolist())
        yield compare_values("num_to_predict", budget, recorded["num_to_predict"])

        is_selected_BT &= ~torch.isin(ids_BT, torch.tensor(tokenizer.all_special_ids))
        yield compare_values("masked_per_row", is_selected_BT.sum(1).tolist(), recorded["masked_per_row"])
        mlm_ids_BT, labels_BT = corrupt(
            ids_BT,
            is_selected_BT,
            want["bernoulli_replace_0.8"].bool(),
            want["bernoulli_random_0.5"].bool(),
            want["random_words"],
            tokenizer.mask_token_id,
        )
        yield compare("out_input_ids", mlm_ids_BT, want["out_input_ids"])
        yield compare("out_labels", labels_BT, want["out_labels"])
        self.not_checked.append(f"wwm/{name}/rates_400_batches (statistics)")

    def answers(self, recorded: dict[str, str]) -> Iterator[Check]:
        """Answers of the VQA sets, in the form in which they are labels."""
        for answer, want in recorded.items():
            yield compare_values(repr(answer), normalize_answer(answer), want)

    def batch(self, name: str, recorded: dict[str, Any]) -> Iterator[Check]:
        """A batch of the original's data sets: what stands in the JSON, and the stored tensors."""
        stem = name.removesuffix("_false_texts")
        stored = [file for file in sorted(self.folder.glob("*.arrow")) if f"_{file.stem}".endswith(f"_{stem}")]
        file = min(stored, key=lambda file: len(file.stem), default=None)
        if file is None:
            self.not_checked.append(f"collate/{name} (no arrow file)")
            return
        want = {key.rsplit("/", 1)[1]: v for key, v in self.tensors.items() if key.startswith(f"collate/{name}/")}
        entries = recorded["batch"]
        size = int(re.search(r"\[(\d+), 3, (\d+), \2\]", entries["image"])[2])
        tokenizer = next(t for t in self.tokenizers.values() if t.cls_token_id == want["text_ids"][0, 0])
        shared = {"tokenizer": tokenizer, "transform": make_transform("clip", size)}
        shared["max_text_tokens"] = num_tokens = want["text_ids"].shape[1]
        false_texts = [key for key in entries if re.fullmatch(r"false_text_\d+", key)]
        if "vqa_labels" in entries:
            batches = VqaBatches(VqaDataset([file]), **shared)
        elif "cls_labels" in entries:
            batches = ClassificationBatches(ClassificationDataset([file], LABEL_COLUMN), **shared)
        elif false_texts:
            batches = RetrievalBatches(PairDataset([file]), num_false_texts=len(false_texts), **shared)
        else:
            masking = MaskingConfig(words="official")
            batches = PretrainBatches(PairDataset([file]), masking=masking, num_patches=0, **shared)

        data = batches.dataset
        yield compare_values("len", len(data), recorded["len"])
        pairs = {str(i): [int(r), int(p)] for i, (r, p) in enumerate(zip(data.row, data.position, strict=True))}
        yield compare_values("index_mapper", pairs, recorded["index_mapper"])
        visited = entries.get("raw_index", list(range(len(want["text_ids"]))))
        got = batches[BatchRequest(epoch=0, batch=0, pairs=visited)]
        values = {
            "text": got.texts,
            "raw_index": visited,
            "img_index": data.row[visited].tolist(),
            "cap_index": data.position[visited].tolist(),
            "replica": (data.position[visited] > 0).tolist(),
        }
        if isinstance(batches, VqaBatches):
            is_answer_BA = got.answer_ids_BA >= 0
            values |= {
                "qid": got.question_ids,
                "answer_types": got.is_open_B.int().tolist(),
                "vqa_answer": got.answers,
                "vqa_labels": [row[keep].tolist() for row, keep in zip(got.answer_ids_BA, is_answer_BA, strict=True)],
                "vqa_scores": [
                    row[keep].tolist() for row, keep in zip(got.answer_scores_BA, is_answer_BA, strict=True)
                ],
            }
        for key, value in values.items():
            if key in entries:
                yield compare_values(key, value, entries[key])
        for key in false_texts:  # drawn from an unknown seed: only the pool can be compared
            pool = {data.text(i) for i in data.same_dataset(0)}
            yield compare_values(f"{key} (its pool)", [text in pool for text in entries[key]], [True] * len(visited))
            if f"{key}_ids" in want:
                ids = [encode(tokenizer, text, num_tokens).ids for text in entries[key]]
                yield compare(f"{key}_ids", padded(ids, num_tokens, tokenizer.pad_token_id), want[f"{key}_ids"])
        for key, draws in recorded.items():
            if key.startswith("false_image_index_draws_random_randint_seed"):
                rng = random.Random(int(key.rpartition("seed")[2]))
                yield compare_values("false_image_index", [rng.choice(data.same_dataset(i)) for i in visited], draws)

        text_ids_BT = padded(got.text_ids_BT.tolist(), num_tokens, tokenizer.pad_token_id)
        is_padding_BT = padded(got.is_padding_BT.tolist(), num_tokens, True).bool()
        yield compare("text_ids", text_ids_BT, want["text_ids"])
        yield compare("text_masks", ~is_padding_BT, want["text_masks"])
        nothing = torch.zeros_like(is_padding_BT)
        yield compare("text_labels", corrupt(text_ids_BT, *[nothing] * 3, text_ids_BT, 0)[1], want["text_labels"])
        if "cls_labels" in entries:
            content = self.meta["arrow"][file.name]["content"][LABEL_COLUMN]
            labels = torch.tensor(
                [content[row][position] for row, position in zip(data.row, data.position, strict=True)]
            )
            yield compare("cls_labels", got.label_B, want.get("cls_labels", labels[visited]))
        checked = {
            "text_ids",
            "text_masks",
            "text_labels",
            "cls_labels",
            "image",
            *(f"{key}_ids" for key in false_texts),
        }
        self.not_checked += [f"collate/{name}/{key}" for key in want if key not in checked]
        if "image" in want:
            rows = recorded.get("image rows stored", list(range(len(want["image"]))))
            yield from self.images(batches, got.image_BCHW, rows, visited, want["image"])

    def images(
        self, batches: Any, image_BCHW: Tensor, rows: list[int], visited: list[int], recorded: Tensor
    ) -> Iterator[Check]:
        """The images as the original decodes them; opaque ones also as the batch holds them."""
        for row, want in zip(rows, recorded, strict=True):
            data = batches.dataset.table.image_bytes(int(batches.dataset.row[visited[row]]))
            image = decode_image(data, alpha="official")
            yield compare(f"image/{row}", normalized(batches.transform(image)), want)
            if image.mode != "RGBA":
                yield compare(f"image/{row} (in the batch)", normalized(image_BCHW[row]), want)

    def transform(self, key: str, recorded: Tensor) -> Iterator[Check]:
        """One image file, opened as RGBA (as the original does) or as RGB, and transformed."""
        _, source, kind = key.split("/")
        mode, extension, name = source.split("_")
        file = self.folder / f"{mode}_{name}.{extension}"
        if kind not in ("clip", "imagenet", "if_rgb_first") or not file.is_file():
            self.not_checked.append(key)
            return
        if kind == "if_rgb_first":
            image, kind = Image.open(file).convert("RGB"), "clip"
        else:
            image = decode_image(file.read_bytes(), alpha="official")
        yield compare(key, normalized(make_transform(kind, recorded.shape[-1])(image), kind), recorded)


def kind_of(dtype: str) -> str:
    """The kind of column that Arrow spells as "list<item: list<item: int64>>"."""
    return re.sub(r"item: |large_|\d+", "", dtype).replace("double", "float")


def padded(rows: list[list[Any]], length: int, value: Any) -> Tensor:
    return torch.tensor([row + [value] * (length - len(row)) for row in rows])


def normalized(image_CHW: Tensor, name: str = "clip") -> Tensor:
    return normalize(image_CHW[None], *normalization(name))[0]
