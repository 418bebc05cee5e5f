"""MPMA fine-tuned for questions and classes: against itself written out literally, and as runs of the command."""

import csv
import dataclasses
import json

import mpma_reference as reference
import pytest
import torch
import torch.nn.functional as F
import yaml
from models import ANSWERS, CLASSES, CountingBackend
from models import small_batch as task_batch
from mpma_models import MEMORIES, small_config, small_model
from runs import TRAIN, write_corpus
from safetensors.torch import load_file
from tasks_data import ANSWERS as ANSWER_NAMES
from tasks_data import vqa_rows, write_classes, write_vqa
from test_mpma_training import command as pretraining

from fastm3ae import objectives
from fastm3ae.cli import main
from fastm3ae.config import MPMAConfig, OptimConfig
from fastm3ae.errors import UserError
from fastm3ae.model import mpma, packed
from fastm3ae.model.mpma import MPMA
from fastm3ae.tasks.predict import Predictor
from fastm3ae.training.optim import parameter_groups
from fastm3ae.weights.pretrained import init_model, load_model, read_about, save_model

TASKS = ("vqa", "classification")
FORMS = {
    **{f"{task}, {memory}": (task, {"memory": memory}) for task in TASKS for memory in MEMORIES},
    "one layer": ("vqa", {"fusion": dataclasses.replace(small_config().fusion, num_layers=1)}),
    "roberta": ("vqa", {"text": "roberta"}),
    "twice the resolution": ("classification", {"image": {"target_scale": 2}}),
    "separate, full view": ("vqa", {"masking": "separate", "alignment": {"view": "full"}}),
}


def model_and_batch(task="vqa", changes=None, dtype=torch.float64, num=6, seed=0, **more):
    sizes = {"objectives": (task,), "num_answers": ANSWERS, "num_classes": CLASSES}
    model = small_model(dtype=dtype, **sizes | (changes or {}) | more)
    batch = task_batch(model, task, num=num, seed=seed)
    if model.config.image.target_scale > 1:
        batch = dataclasses.replace(batch, image_BCHW=batch.image_BCHW.repeat(1, 1, 2, 2).mul_(1.5).sin_())
    return model, batch


def loss_and_gradients(model, batch, **options):
    model.zero_grad()
    (loss,) = objectives.losses(model(batch, **options), batch, model.config).values()
    loss.mean.backward()
    return loss.mean.detach(), {name: p.grad for name, p in trained(model)}


def trained(model):
    """Not BERT's own pooler, which nothing reads."""
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


@pytest.mark.parametrize("form", FORMS)
def test_logits_losses_and_gradients_are_the_literal_ones(form):
    task, changes = FORMS[form]
    model, batch = model_and_batch(task, changes)
    loss, gradients = loss_and_gradients(model, batch)
    model.zero_grad()
    logits = reference.logits(model, batch)
    want = getattr(reference, f"{task}_loss")(logits, batch)
    want.backward()
    assert torch.allclose(model(batch)[task], logits, rtol=1e-10, atol=1e-12)
    assert loss == pytest.approx(want.item(), rel=1e-10)
    for name, parameter in trained(model):
        assert torch.allclose(gradients[name], parameter.grad, rtol=1e-8, atol=1e-11), name
        if not name.endswith("key.bias"):  # which softmax does not see
            assert parameter.grad.any(), name


@pytest.mark.parametrize("form", FORMS)
def test_nothing_is_left_alone(form):
    model, batch = model_and_batch(*FORMS[form])
    _, gradients = loss_and_gradients(model, batch)
    assert not model.leaves_some_alone and all(gradient is not None for gradient in gradients.values())


@pytest.mark.parametrize("memory", MEMORIES)
def test_padding_and_what_stands_there_change_nothing(memory):
    model, batch = model_and_batch(memory=memory)
    longer = dataclasses.replace(
        batch,
        text_ids_BT=F.pad(batch.text_ids_BT.masked_fill(batch.is_padding_BT, 11), (0, 5), value=9),
        is_padding_BT=F.pad(batch.is_padding_BT, (0, 5), value=True),
    )
    assert torch.equal(model(longer)["vqa"], model(batch)["vqa"])


@pytest.mark.parametrize("memory", MEMORIES)
def test_pairs_do_not_see_each_other_and_images_matter(memory):
    model, batch = model_and_batch(memory=memory)
    other = dataclasses.replace(batch, image_BCHW=torch.cat([batch.image_BCHW[:-1], batch.image_BCHW[:1]]))
    before, after = (model(b)["vqa"] for b in (batch, other))
    assert torch.equal(before[:-1], after[:-1]) and not torch.allclose(before[-1], after[-1])


def test_only_the_first_token_leaves_the_fusion():
    model, batch = model_and_batch()
    rows = []
    handles = [layer.mlp_in.register_forward_hook(lambda *call: rows.append(len(call[2]))) for layer in
               model.fusion.layers]  # fmt: skip
    model(batch)
    num_tokens = int(batch.num_tokens_B.sum())
    assert rows == [num_tokens, num_tokens, len(batch)]
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("form", ["vqa, slots", "classification, topk"])
def test_checkpointed_activations_change_nothing(form):
    task, changes = FORMS[form]
    model, batch = model_and_batch(task, changes, dropout_frac=0.1)
    found = []
    for is_checkpointed in (False, True):
        torch.manual_seed(0)
        found.append(loss_and_gradients(model, batch, checkpoint_activations=is_checkpointed))
    (want, want_gradients), (got, got_gradients) = found
    assert got == want and all(torch.equal(got_gradients[name], want_gradients[name]) for name in want_gradients)


@pytest.mark.parametrize("form", ["vqa, slots", "classification, topk"])
def test_one_graph_for_batches_of_any_shape(form):
    task, changes = FORMS[form]
    backend = CountingBackend()
    compiled = torch.compile(mpma.compute, fullgraph=True, backend=backend)
    model, _ = model_and_batch(task, changes, torch.float32, dropout_frac=0.1)
    for seed in range(6):
        batch = task_batch(model, task, num=4, num_tokens=6 + seed % 3, seed=seed)
        plan = mpma.MPMAPlan(batch, model.config)
        plan.send(torch.device("cpu"))
        logits = []
        for function in (compiled, mpma.compute):
            torch.manual_seed(seed)
            logits.append(function(model, batch, plan, (task,), packed.call)[task])
        assert torch.equal(*logits)
    assert backend.num_graphs <= 4


def test_autocast():
    model, batch = model_and_batch(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, gradients = loss_and_gradients(model, batch)
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    assert torch.allclose(loss, loss_and_gradients(model, batch)[0], rtol=0.1)


def test_groups_of_the_optimiser():
    """Heads learn the fastest, the poolers as fast as the fusion; no norm decays, that of the head included."""
    model, _ = model_and_batch(dtype=torch.float32)
    groups = parameter_groups(model, OptimConfig(learning_rate=1.0, end_learning_rate=0.0, head_lr_multiplier=50.0))
    rates = {name: (group["lr"], group["weight_decay"] > 0) for group in groups for name in group["names"]}
    assert sorted(rates) == sorted(name for name, _ in trained(model))
    want = {"vqa_head.0.weight": (50, True), "vqa_head.1.weight": (50, False), "image_pooler.dense.weight": (5, True),
            "text_pooler.dense.bias": (5, False), "fusion.slots.0.keys": (5, True), "image_proj.weight": (5, True),
            "vision.blocks.0.norm1.weight": (1, False)}  # fmt: skip
    assert {name: rates[name] for name in want} == want
    (head,) = {name.split(".")[0] for name, (rate, _) in rates.items() if rate == 50}
    assert head == "vqa_head"


def test_what_the_weights_start_from(tmp_path):
    """Everything but poolers and head of a whole pre-training; the towers alone of one that only aligned."""
    task = model_and_batch(dtype=torch.float32)[0]
    whole = small_model(seed=1, dtype=torch.float32)
    aligned = small_model(seed=2, dtype=torch.float32, objectives=("global_alignment",))
    save_model(whole, tmp_path)
    report = init_model(task, tmp_path)
    assert report.new == ["image_pooler", "text_pooler", "vqa_head"]
    assert {name.split(".")[0] for name in report.ignored} == {"mlm_head", "mim_decoder", "global_head", "local_head"}
    state, want = task.state_dict(), whole.state_dict()
    kept = [name for name in state if name.split(".")[0] not in report.new]
    assert all(torch.equal(state[name], want[name]) for name in kept) and "fusion.slots.2.values" in kept
    save_model(aligned, tmp_path)
    assert init_model(task, tmp_path).new == ["fusion", "image_pooler", "image_proj", "text_pooler", "text_proj",
                                              "vqa_head"]  # fmt: skip
    save_model(small_model(dtype=torch.float32, memory="none"), tmp_path)
    with pytest.raises(UserError, match="of another architecture: fusion.slots.0.keys is missing"):
        init_model(task, tmp_path)


MISTAKES = {
    "no answers": ({"objectives": ("vqa",)}, "model.num_answers must be positive for the objective vqa, got 0"),
    "no classes": ({"objectives": ("classification",)}, "model.num_classes must be positive for the objective classi"),
    "two at once": (
        {"objectives": ("vqa", "local_alignment"), "num_answers": 2},
        r"MPMA is trained for vqa alone, got model.objectives \('vqa', 'local_alignment'\)",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_named(name):
    changes, message = MISTAKES[name]
    with pytest.raises(UserError, match=message):
        small_config(**changes)


# Whole runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pre-trained MPMA, questions and classes."""
    folder = tmp_path_factory.mktemp("tasks")
    write_corpus(folder)
    assert main([*pretraining(folder), "--data.train-transform", "imagenet", "--data.val-transform", "imagenet"]) == 0
    write_vqa(folder)
    write_classes(folder)
    return folder


def finetune(folder, task, data_set, *arguments, **train):
    config = {
        "data": {"root": str(folder), "datasets": [data_set], "max_text_tokens": 24},
        "train": TRAIN | {"validate_every_epochs": None} | train,
        "optim": {"learning_rate": 1e-3, "head_lr_multiplier": 5.0},
    }
    path = folder / f"{task}.yaml"
    path.write_text(yaml.safe_dump(config))
    start = ["--init-from", str(folder / "run" / "checkpoints" / "best"), "--model.vision.image-size-px", "32"]
    return main(["finetune", task, "--config", str(path), "--output", str(folder / task), *start, *arguments])


def test_questions_after_pre_training(folder, capsys):
    assert finetune(folder, "vqa", "vqa_made", num_steps=120, validate_every_steps=20) == 0
    summary = json.loads((folder / "vqa" / "summary.json").read_text())
    assert summary["closed_accuracy"] > 0.9 > summary["closed_majority_accuracy"]
    config, about = read_about(folder / "vqa" / "checkpoints" / "best")
    assert isinstance(config, MPMAConfig) and config.objectives == ("vqa",) and about["labels"] == ANSWER_NAMES
    assert about["config"]["data"]["val_transform"] == "imagenet"  # as pre-trained, not as the preset has it
    with (folder / "vqa" / "test" / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    scores = [row["predicted"] == row["expected"] for row in rows if row["type"] == "closed"]
    assert sum(scores) / len(scores) > 0.9 and len(rows) == 16
    items = list(vqa_rows(8, 200))
    predictor = Predictor.load(folder / "vqa" / "checkpoints" / "best", "cpu")
    found = predictor.answer_all([(item["image"], question) for item in items for question in item["questions"]], top=1)
    for ((answer, probability),), row in zip(found, rows, strict=True):
        assert answer == row["predicted"] and probability == pytest.approx(float(row["probability"]), abs=1e-6)
    assert isinstance(load_model(folder / "vqa" / "checkpoints" / "best"), MPMA)
    assert "new: image_pooler, text_pooler, vqa_head" in capsys.readouterr().out


def test_classes_with_frozen_towers(folder):
    options = ["--task.label-column", "i_meth", "--task.freeze-towers", "--train.checkpoint-activations"]
    assert finetune(folder, "classification", "cls_made", *options, num_steps=3) == 0
    before, after = (load_file(folder / name / "checkpoints" / "best" / "model.safetensors")
                     for name in ("run", "classification"))  # fmt: skip
    same = {part: {torch.equal(tensor, before[name]) for name, tensor in after.items() if name.startswith(f"{part}.")}
            for part in ("vision", "text", "fusion")}  # fmt: skip
    assert same["vision"] == same["text"] == {True} and False in same["fusion"]


def test_retrieval_is_refused_with_what_to_do_instead(folder, capsys):
    assert finetune(folder, "retrieval", "made") == 2
    assert "evaluate CHECKPOINT --task retrieval, or train it on by fastm3ae pretrain" in capsys.readouterr().err
    assert not (folder / "retrieval").exists()


def test_a_task_is_no_objective_of_pre_training(folder, capsys):
    arguments = ["--model.objectives", "vqa", "--model.num-answers", "3"]
    assert main(pretraining(folder, *arguments, output="mistake")) == 2
    assert "model.objectives names 'vqa', which is no objective of pre-training" in capsys.readouterr().err
