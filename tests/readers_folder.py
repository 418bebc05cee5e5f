"""What somebody who reads the documentation has: releases of data sets, checkpoints, and small models in the presets.

The documented commands run as they are written; only what the presets' names stand for is small.
"""

import dataclasses
import json
import shutil
from functools import partial

import image_models
import mpma_models
import vqa_trees
from models import small_config
from prepared import image_bytes, write
from runs import TOKENIZER
from test_convert import lightning_checkpoint, official_config
from test_prepare import write_medicat, write_roco
from test_prepare_chexpert_nih import COMPETITION, FINDINGS, write_chexpert, write_nih
from test_prepare_melinda import write_melinda
from test_prepare_openi import write_report
from test_prepare_reports import write_mimic
from test_prepare_rsna_siim import BOXES, OUTLINES, write_rsna, write_siim

from fastm3ae.config.presets import FINETUNE_PRESETS, PRESETS
from fastm3ae.data.demo import write_demo_corpus
from fastm3ae.data.prepare import nih
from fastm3ae.model.m3ae import M3AE
from fastm3ae.weights.convert import to_official

TRAIN = {"num_steps": 2, "num_workers": 0, "num_pictures": 1, "device": "cpu", "log_every_steps": 1,
         "validate_every_steps": 2, "save_every_steps": 2, "validate_every_epochs": None, "num_epochs": None,
         "tensorboard": False}  # fmt: skip
MODELS = {"m3ae": small_config, "mpma": mpma_models.small_config, "image": image_models.small_config}


def shrink(make):
    """A preset with a small model of the same kind, which trains for two steps."""
    config = make()
    small = MODELS[config.model.kind]
    model = small(objective=config.model.objectives[0]) if config.model.kind == "image" else small(text="bert")
    if config.model.has_texts:
        text = dataclasses.replace(model.text, vocab_size=None, pad_token_id=None)
        model = dataclasses.replace(model, text=text)
    tokenizer = config.data.tokenizer if config.data.draw_demo else str(TOKENIZER)
    return dataclasses.replace(
        config,
        model=dataclasses.replace(model, objectives=config.model.objectives),
        data=dataclasses.replace(config.data, tokenizer=tokenizer, max_text_tokens=24),
        train=dataclasses.replace(config.train, **TRAIN, batch_size=2 if config.model.has_texts else 1),
    )


def small_presets(monkeypatch):
    for presets in (PRESETS, *FINETUNE_PRESETS.values()):
        for name, make in presets.items():
            monkeypatch.setitem(presets, name, partial(shrink, make))
    small_corpus = partial(write_demo_corpus, num_train=16, num_val=16, num_test=8)
    monkeypatch.setattr("fastm3ae.data.demo.ensure_demo_corpus", small_corpus)


def write_folder(root):
    """The files that the documentation names, but for what its own commands make."""
    data = root / "path" / "to"
    write_roco(data / "pretrain_data")
    write_medicat(data / "medicat", 20)
    write_mimic(data / "mimic-cxr-jpg", reports="../mimic-cxr-reports")
    for number in range(1, 21):
        write_report(data / "openi", number)
    lines = ["uid,filename,projection", *(f"{n},{n}_IM-01-1001.dcm.png,Frontal" for n in range(1, 21))]
    write(root / "indiana_projections.csv", "\n".join(lines) + "\n")
    vqa_trees.write_rad(data / "vqa_rad", vqa_trees.rad_splits())
    vqa_trees.write_slake(data / "slake")
    vqa_trees.write_official(data / "medvqa_2019", vqa_trees.medvqa_lines())
    write_melinda(data / "melinda")
    chexpert = write_chexpert(data / "CheXpert-v1.0-small", 40) / "train.csv"
    lines = chexpert.read_text().splitlines()
    found = ",".join(["1.0"] * len(FINDINGS))  # by every other image, so that each split has some
    lines[1::2] = [line[: -len(FINDINGS)] + "," + found for line in lines[1::2]]
    write(chexpert, "\n".join(lines) + "\n")
    table = write_nih(data / "chestxray14") / "Data_Entry_2017.csv"
    lines = table.read_text().splitlines()
    lines[1::2] = [line.replace("No Finding", "|".join(nih.CLASSES)) for line in lines[1::2]]
    write(table, "\n".join(lines) + "\n")
    write_rsna(data / "rsna_pneumonia", BOXES)
    write_siim(data / "siim_acr", OUTLINES)
    for place in (data, root / "downloaded"):
        shutil.copytree(TOKENIZER.parent / "roberta", place / "roberta-base")
    model = M3AE(small_config(text="bert"))
    lightning_checkpoint(root / "m3ae.ckpt", to_official(model.state_dict(), model), official_config(model))
    rows = ["file,patient,findings,impression"]
    for number in range(40):
        write(root / f"images/{number}.png", image_bytes(number))
        rows.append(f"images/{number}.png,p{number},The heart is normal in {number}.,No acute disease.")
    write(root / "reports.csv", "\n".join(rows) + "\n")
    write(root / "prompts.yaml", json.dumps({name: [f"{name.lower()} is seen"] for name in COMPETITION}))
    for name in ("x.png", "y.png"):
        write(root / name, image_bytes(len(name)))
    return root
