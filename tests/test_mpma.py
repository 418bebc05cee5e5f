"""The whole model against MPMA written out literally, and what each part may and may not see."""

import dataclasses

import mpma_reference as reference
import pytest
import torch
import torch.nn.functional as F
from models import CountingBackend
from mpma_models import HIDDEN, LENGTHS, MASK, MEMORIES, part_of, small_batch, small_config, small_model

from fastm3ae import objectives
from fastm3ae.config import VisionConfig
from fastm3ae.errors import UserError
from fastm3ae.masking import split_patches
from fastm3ae.model import mpma, packed

FORMS = {
    "slots": {},
    "topk": {"memory": "topk"},
    "none": {"memory": "none"},
    "mean features, learned temperature": {"alignment": {"pool": "mean", "learn_temperature": True}},
    "full view": {"alignment": {"view": "full", "pool": "mean"}},
    "separate": {"masking": "separate"},
    "separate, full view, roberta": {"masking": "separate", "alignment": {"view": "full"}, "text": "roberta"},
    "twice the resolution": {"image": {"target_scale": 2, "normalize_target": False}},
    "images alone": {"objectives": ("image_reconstruction",)},
    "reports alone": {"objectives": ("report_reconstruction",), "masking": "separate"},
    "global alone": {"objectives": ("global_alignment",)},
    "local alone": {"objectives": ("local_alignment",), "alignment": {"view": "full"}},
    "without alignment": {"objectives": ("image_reconstruction", "report_reconstruction")},
}


def values(model, batch):
    return {name: loss.mean for name, loss in objectives.losses(model(batch), batch, model.config).items()}


def gradients(model, losses):
    model.zero_grad()
    sum(losses.values()).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("form", FORMS)
def test_losses_and_gradients_are_the_literal_ones(form):
    model = small_model(**FORMS[form])
    batch = small_batch(model.config)
    got, want = values(model, batch), reference.losses(model, batch)
    assert list(got) == list(model.config.objectives)
    for name in got:
        assert torch.allclose(got[name], want[name], rtol=1e-10, atol=1e-12), name
    got_grads, want_grads = gradients(model, got), gradients(model, want)
    for name, grad in want_grads.items():
        if grad is None:
            assert got_grads[name] is None or not got_grads[name].any(), name
        else:
            assert torch.allclose(got_grads[name], grad, rtol=1e-8, atol=1e-11), name


@pytest.mark.parametrize("form", ["slots", "topk", "full view", "separate"])
def test_padding_and_what_stands_there_change_nothing(form):
    """The slots have no padding mask that could hide them, nor do the reports' lengths reach the other pairs."""
    model = small_model(**FORMS[form]).eval()
    batch = small_batch(model.config)
    longer = dataclasses.replace(
        batch,
        **{
            name: F.pad(getattr(batch, name), (0, 5), value=value)
            for name, value in (
                ("text_ids_BT", 9), ("mlm_ids_BT", 9), ("mlm_labels_BT", -100), ("is_padding_BT", True)
            )
        },
        masked_index_M=None,
    )  # fmt: skip
    for name, value in values(model, batch).items():
        assert torch.equal(values(model, longer)[name], value), name


def of_pairs(model, batch, rows):
    """What does not depend on the other pairs, summed over pairs or tokens."""
    part = part_of(batch, rows)
    found = values(model, part)
    counts = {name: objectives.num_averaged(name, part, model.config) for name in found}
    return {name: found[name] * counts[name] for name in found if name != "global_alignment"}


@pytest.mark.parametrize("form", ["slots", "topk"])
def test_pairs_do_not_see_each_other(form):
    model = small_model(**FORMS[form]).eval()
    batch = small_batch(model.config)
    together = of_pairs(model, batch, range(len(batch)))
    single = [of_pairs(model, batch, [row]) for row in range(len(batch))]
    for name, value in together.items():
        assert torch.allclose(value, sum(part[name] for part in single), rtol=1e-12), name


def test_what_is_hidden_is_not_seen():
    model = small_model().eval()
    batch = small_batch(model.config)
    _, _, is_hidden_BN = split_patches(batch.patch_noise_BN, 0.75)
    pixels = is_hidden_BN.view(-1, 4, 4).repeat_interleave(16, 1).repeat_interleave(16, 2)[:, None]
    other = dataclasses.replace(
        batch,
        image_BCHW=batch.image_BCHW + pixels * torch.randn_like(batch.image_BCHW),
        text_ids_BT=batch.text_ids_BT.where(batch.mlm_labels_BT == -100, 7),
    )
    before, after = values(model, batch), values(model, other)
    for name in ("report_reconstruction", "global_alignment", "local_alignment"):
        assert torch.equal(before[name], after[name]), name
    assert before["image_reconstruction"] != after["image_reconstruction"]  # its targets are other ones


def test_a_hidden_token_is_no_word_even_if_it_stayed_as_it_was():
    model = small_model(objectives=("local_alignment",)).eval()
    batch = small_batch(model.config)
    other = dataclasses.replace(batch, mlm_ids_BT=batch.text_ids_BT)
    words = [small.words for small in reference_pairs(model, other)]
    assert words == [list(set(range(1, n - 1)) - set(h)) for n, h in zip(LENGTHS, HIDDEN, strict=True)]
    assert torch.allclose(*(f(model, other)["local_alignment"] for f in (values, reference.losses)), rtol=1e-10)


def reference_pairs(model, batch):
    return [reference._Pair(model, batch, b) for b in range(len(batch))]


def test_separate_masking_rebuilds_the_report_beside_the_whole_image():
    paired, separate = (small_model(masking=masking).eval() for masking in ("paired", "separate"))
    batch = small_batch(paired.config)
    other = dataclasses.replace(batch, patch_noise_BN=1 - batch.patch_noise_BN)
    for model, sees_other_patches in ((paired, True), (separate, False)):
        before, after = (values(model, b)["report_reconstruction"] for b in (batch, other))
        assert (before != after) == sees_other_patches


@pytest.mark.parametrize("hidden", [((),) * 6, tuple(tuple(range(1, n - 1)) for n in LENGTHS)])
def test_nothing_or_everything_masked(hidden):
    """Of an objective without anything to average the loss is 0, and every parameter still has a gradient."""
    model = small_model()
    batch = small_batch(model.config, hidden=hidden)
    found = values(model, batch)
    zero = "report_reconstruction" if not any(hidden) else "local_alignment"
    assert found[zero] == 0
    grads = gradients(model, found)
    assert all(grad is not None and grad.isfinite().all() for grad in grads.values())


def test_a_single_pair():
    model = small_model()
    batch = part_of(small_batch(model.config), [3])
    found = values(model, batch)
    assert found["global_alignment"] == 0 and found["local_alignment"] > 0
    assert all(grad.isfinite().all() for grad in gradients(model, found).values())


@pytest.mark.parametrize("form", FORMS)
def test_what_is_left_alone(form):
    """What decides whether the processes look for parameters without a gradient in each step."""
    model = small_model(**FORMS[form])
    batch = small_batch(model.config)
    grads = gradients(model, values(model, batch))
    left_alone = [name for name, grad in grads.items() if grad is None]
    assert bool(left_alone) == model.leaves_some_alone, left_alone


def test_only_some_heads_draw_the_same_dropout():
    """What the alignment's features are in a pass for them alone, they are in the whole pass."""
    model = small_model(dropout_frac=0.3, alignment={"view": "full"})
    batch = small_batch(model.config)
    features = []
    for only in (None, ("global_alignment",)):
        torch.manual_seed(5)
        features.append(model(batch, only=only)["global_alignment"].stacked())
    assert torch.equal(*features)
    assert not torch.equal(model(batch)["global_alignment"].stacked(), features[0])


def test_features_for_retrieval_are_those_of_everything():
    model, full = small_model(), small_model(alignment={"view": "full"})
    full.load_state_dict(model.state_dict())
    batch = small_batch(model.config)
    want = full.eval()(batch)["global_alignment"].stacked()
    assert torch.allclose(model.eval().embed(batch).stacked(), want, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("form", ["slots", "topk", "separate, full view, roberta"])
def test_checkpointed_activations_change_nothing(form):
    model = small_model(**FORMS[form], dropout_frac=0.1)
    batch = small_batch(model.config)
    found = []
    for is_checkpointed in (False, True):
        torch.manual_seed(0)
        outputs = model(batch, checkpoint_activations=is_checkpointed)
        losses = {name: loss.mean for name, loss in objectives.losses(outputs, batch, model.config).items()}
        found.append((losses, gradients(model, losses)))
    (want, want_grads), (got, got_grads) = found
    assert got == want
    for name, grad in want_grads.items():
        assert (grad is None and got_grads[name] is None) or torch.equal(grad, got_grads[name]), name


@pytest.mark.parametrize("form", ["slots", "topk", "mean features, learned temperature"])
def test_one_graph_for_batches_of_any_shape(form):
    """``torch.compile`` takes the whole step without a break, and stops compiling when it has seen a few shapes."""
    model = small_model(**FORMS[form], dropout_frac=0.1, dtype=torch.float32)
    backend = CountingBackend()
    compiled = torch.compile(mpma.compute, fullgraph=True, backend=backend)
    for seed in range(6):
        lengths = (9, 4 + seed % 5, 5, 7)
        hidden = ((1, 2), (1, 2)[: 1 + seed % 2], (2,), (1, 3, 5)[: 1 + seed % 3])
        batch = small_batch(model.config, lengths, hidden, seed=seed, dtype=torch.float32)
        plan = mpma.MPMAPlan(batch, model.config)
        plan.send(torch.device("cpu"))
        losses = []
        for function in (compiled, mpma.compute):
            torch.manual_seed(seed)
            outputs = function(model, batch, plan, model.config.objectives, packed.call)
            losses.append(objectives.total(objectives.losses(outputs, batch, model.config)))
        assert torch.equal(*losses)
    assert backend.num_graphs <= 4


def test_corrupted_words_are_read():
    model = small_model().eval()
    batch = small_batch(model.config)
    assert (batch.mlm_ids_BT == MASK).sum() == batch.masked_index_M.numel()
    kept = dataclasses.replace(batch, mlm_ids_BT=batch.text_ids_BT)
    before, after = (values(model, b)["report_reconstruction"] for b in (batch, kept))
    assert before != after


MISTAKES = {
    "swin": ({"vision": VisionConfig(kind="swin", image_size_px=64, patch_size_px=4)}, "Swin cannot be masked"),
    "no slots": ({"num_slots": 0}, "model.num_slots must be at least 1, got 0"),
    "too many kept": ({"memory": "topk", "num_topk_kept": 12}, "got 12 of 11"),
    "all patches": ({"image": {"patch_frac": 1.0}}, "model.image.patch_frac must lie between 0 and 1"),
    "no visible patch": ({"image": {"patch_frac": 0.95}}, "0.95 leaves none of the 16 patches visible"),
    "temperature": ({"alignment": {"temperature": 0.0}}, "model.alignment.temperature must be positive"),
    "objectives": ({"objectives": ()}, "must name at least one objective"),
    "heads": ({"image": {"decoder_num_heads": 3}}, "model.image.decoder: the width must be a multiple"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_named(name):
    changes, message = MISTAKES[name]
    with pytest.raises(UserError, match=message):
        small_config(**changes)


@pytest.mark.parametrize("form", ["slots", "topk", "full view", "mean features, learned temperature"])
def test_autocast(form):
    model = small_model(**FORMS[form], dtype=torch.float32)
    batch = small_batch(model.config, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = values(model, batch)
    assert all(grad.isfinite().all() for grad in gradients(model, found).values())
    for name, value in values(model, batch).items():
        assert torch.allclose(found[name], value, rtol=0.1), name


def test_every_memory_form_has_its_parameters():
    names = {form: {n for n, _ in small_model(memory=form).fusion.named_parameters()} for form in MEMORIES}
    assert names["slots"] - names["none"] == {f"slots.{i}.{part}" for i in range(3) for part in ("keys", "values")}
    assert {name.split(".")[0] for name in names["topk"] - names["none"]} == {"topk"}
