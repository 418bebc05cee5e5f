"""The weights of the fusion's attention, made again, are those with which the model computed."""

import math
from contextlib import nullcontext
from functools import partial

import mpma_reference as reference
import numpy as np
import pytest
import torch
from mpma_models import HIDDEN, MEMORIES, small_batch, small_model

from fastm3ae.model.fusion_use import FusionUse
from fastm3ae.training.distributed import Processes
from fastm3ae.training.validation import validate

NUM_HIDDEN = [len(positions) for positions in HIDDEN]


def used(model, batch, autocast=nullcontext):
    with torch.no_grad(), autocast(), FusionUse(model.eval(), batch) as use:
        model.mlm_logits(batch)
    return use


def set_keys(model, query, key):
    """Gives every query the same number, the slots' keys another, and the patches' keys 0."""
    for layer, slots in zip(model.fusion.layers, model.fusion.slots, strict=True):
        for linear in (layer.cross_q, layer.cross_kv):
            torch.nn.init.zeros_(linear.weight)
        torch.nn.init.constant_(layer.cross_q.bias, query)
        torch.nn.init.constant_(slots.keys, key)


@pytest.mark.parametrize("masking", ["paired", "separate"])
@pytest.mark.parametrize("memory", MEMORIES)
def test_weights_times_values_are_what_the_layers_gather(memory, masking):
    model = small_model(memory=memory, masking=masking)
    batch, fusion = small_batch(model.config), model.fusion
    contexts, values = [], []
    handles = [layer.cross_out.register_forward_pre_hook(lambda _, args: contexts.append(args[0])) for layer in
               fusion.layers]  # fmt: skip
    handles += [layer.cross_kv.register_forward_hook(lambda _, args, out: values.append(out.chunk(2, dim=-1)[1])) for
                layer in fusion.layers]  # fmt: skip
    weights = used(model, batch).cross_weights()
    for handle in handles:
        handle.remove()
    starts = np.cumsum([0, *batch.num_tokens_B[:-1]])
    rows = [int(start) + position for start, positions in zip(starts, HIDDEN, strict=True) for position in positions]
    num_seen = 4 if masking == "paired" else 16
    num_slots = 5 if memory == "slots" else 0
    assert len(weights) == len(contexts) == 3
    for number, (of_pairs, context_SD, value_SD) in enumerate(zip(weights, contexts, values, strict=True)):
        assert [tuple(w.shape) for w in of_pairs] == [(4, num, num_slots + num_seen) for num in NUM_HIDDEN]
        gathered = []
        for weights_HQK, value_KD in zip(of_pairs, value_SD.split(num_seen), strict=True):
            if memory == "slots":
                value_KD = torch.cat([math.sqrt(5) * fusion.slots[number].values, value_KD])
            heads = [w @ v for w, v in zip(weights_HQK, value_KD.chunk(4, dim=-1), strict=True)]
            gathered.append(torch.cat(heads, dim=-1))
        want = context_SD if number == 2 else context_SD[rows]
        assert torch.allclose(torch.cat(gathered), want, rtol=1e-11, atol=1e-13)


def test_slots_that_weigh_as_patches_get_their_share_and_large_ones_get_all():
    model = small_model()
    batches = [small_batch(model.config, seed=seed) for seed in range(2)]
    for query, key, want in ((1.0, 0.0, 5 / 9), (40.0, 40.0, 1.0), (40.0, -40.0, 0.0)):
        set_keys(model, query, key)
        of_layers = used(model, batches[0]).slot_weights()
        assert [tuple(weights_QM.shape) for weights_QM in of_layers] == [(sum(NUM_HIDDEN), 5)] * 3
        assert all(torch.allclose(w, torch.full_like(w, want / 5), atol=1e-12) for w in of_layers)
        metrics = validate(model, batches, nullcontext, Processes("cpu"))
        assert metrics["memory_frac"] == pytest.approx(want, abs=1e-9)


@pytest.mark.parametrize("changes", [{"memory": "none"}, {"memory": "topk"}, {"objectives": ("global_alignment",)}])
def test_without_slots_there_is_no_share_of_them(changes):
    model = small_model(**changes)
    metrics = validate(model, [small_batch(model.config)], nullcontext, Processes("cpu"))
    assert "memory_frac" not in metrics and "global_alignment_loss" in metrics


def test_the_share_is_the_mean_over_layers_and_words_of_all_batches():
    """Also of batches with different numbers of hidden words."""
    model = small_model()
    batches = [small_batch(model.config), small_batch(model.config, hidden=((), (1,), (), (1,), (1,), (1,)), seed=1)]
    words = []
    for batch in batches:
        of_layers = used(model, batch).cross_weights()
        for pair in range(6):
            for word in range(of_layers[0][pair].shape[1]):
                words.append(np.mean([float(layer[pair][:, word, :5].sum(-1).mean()) for layer in of_layers]))
    metrics = validate(model, batches, nullcontext, Processes("cpu"))
    assert len(words) == sum(NUM_HIDDEN) + 4 and np.std(words) > 1e-6
    assert metrics["memory_frac"] == pytest.approx(np.mean(words), rel=1e-12)


@torch.no_grad()
def test_kept_rows_are_counted():
    model = small_model(memory="topk")
    batch, memory = small_batch(model.config), model.fusion.topk
    seen = []
    with memory.register_forward_pre_hook(lambda _, args: seen.append(args[0])):
        got = used(model, batch).kept_rows()
    keys_MD = memory.kv(memory.matrix).chunk(2, dim=-1)[0]
    assert [len(x_SD) for x_SD in seen] == [int(batch.num_tokens_B.sum()), 6 * 4]
    for frac_M, x_SD in zip(got, seen, strict=True):
        counts = torch.zeros(11)
        for q_SX, k_MX in zip(memory.q(x_SD).chunk(4, dim=-1), keys_MD.chunk(4, dim=-1), strict=True):
            for q_X in q_SX:
                for best in sorted(range(11), key=lambda m: -float(k_MX[m] @ q_X))[:3]:  # noqa: B023
                    counts[best] += 1
        assert torch.equal(frac_M, counts / (4 * len(x_SD))) and frac_M.sum().item() == pytest.approx(3)


def test_the_model_is_left_as_it_was():
    model = small_model()
    batch = small_batch(model.config)
    with pytest.raises(KeyError), FusionUse(model, batch):
        raise KeyError
    use = used(model, batch)
    before = [w.clone() for w in use.cross_weights()[0]]
    model.mlm_logits(small_batch(model.config, seed=1))  # nothing listens any more
    assert all(torch.equal(left, right) for left, right in zip(before, use.cross_weights()[0], strict=True))


def test_logits_are_those_of_the_loss():
    model = small_model().eval()
    batch = small_batch(model.config)
    logits_MV = model.mlm_logits(batch)
    outputs = model(batch)["report_reconstruction"]
    assert torch.allclose(torch.nn.functional.cross_entropy(logits_MV, batch.masked_labels_M), outputs.loss, rtol=1e-10)
    assert (logits_MV.argmax(-1) == batch.masked_labels_M).sum() == outputs.num_correct
    literal = torch.stack(list(reference._token_losses(reference._Pair(model, batch, 3))))
    got = -logits_MV.log_softmax(-1).gather(1, batch.masked_labels_M[:, None])[:, 0]
    assert torch.allclose(got[1:4], literal, rtol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    model = small_model(dtype=torch.float32)
    batch = small_batch(model.config, dtype=torch.float32)
    exact = used(model, batch).cross_weights()
    rounded = used(model, batch, partial(torch.autocast, "cpu", dtype=dtype)).cross_weights()
    for left, right in zip((w for layer in rounded for w in layer), (w for layer in exact for w in layer), strict=True):
        assert left.dtype == torch.float32 and torch.allclose(left.sum(-1), torch.ones(()), atol=1e-5)
        assert torch.allclose(left, right, atol=0.05)


def test_reports_of_which_nothing_is_hidden():
    model = small_model()
    use = used(model, small_batch(model.config, hidden=((),) * 6))
    assert all(tuple(weights.shape) == (4, 0, 9) for layer in use.cross_weights() for weights in layer)
    assert all(tuple(weights_QM.shape) == (0, 5) for weights_QM in use.slot_weights())
