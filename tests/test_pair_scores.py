"""Scores of many pairs, each side computed once as far as it goes alone, are those of the model on pair after pair."""

import dataclasses

import numpy as np
import pytest
import torch
from models import VOCAB, small_config

from fastm3ae.data.batch import RetrievalBatch
from fastm3ae.errors import UserError
from fastm3ae.model import pair_scores
from fastm3ae.model.m3ae import M3AE
from fastm3ae.model.pair_scores import PairScorer

LENGTHS = (3, 9, 2, 9, 5, 9, 9, 4)
NUM_IMAGES = 3
ALL = np.repeat(np.arange(NUM_IMAGES), len(LENGTHS)), np.tile(np.arange(len(LENGTHS)), NUM_IMAGES)


def make_model(vision="clip", text="roberta", num_layers=3, dtype=torch.float64, **changes):
    """With weights that are large enough for scores that differ."""
    config = small_config(vision, text, ("retrieval",), init_std=0.1, dropout_frac=0.1)
    config = dataclasses.replace(config, fusion=dataclasses.replace(config.fusion, num_layers=num_layers, **changes))
    torch.manual_seed(0)
    return M3AE(config).to(dtype).eval()


def make_inputs(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    size, dtype = model.config.vision.image_size_px, model.image_proj.weight.dtype
    image_BCHW = torch.randn(NUM_IMAGES, 3, size, size, generator=generator, dtype=torch.float64).to(dtype)
    is_padding_BT = torch.arange(max(LENGTHS)) >= torch.tensor(LENGTHS)[:, None]
    ids_BT = torch.randint(4, VOCAB, is_padding_BT.shape, generator=generator)
    return image_BCHW, ids_BT.masked_fill(is_padding_BT, model.config.text.pad_token_id), is_padding_BT


@torch.no_grad()
def one_at_a_time(model, image_BCHW, ids_BT, is_padding_BT):
    """The literal loop: a batch of one pair for each pair."""
    scores = torch.empty(len(image_BCHW), len(ids_BT), dtype=torch.float64)
    for i in range(len(image_BCHW)):
        for t in range(len(ids_BT)):
            batch = RetrievalBatch(
                image_BCHW=image_BCHW[i : i + 1], text_ids_BT=ids_BT[t : t + 1], is_padding_BT=is_padding_BT[t : t + 1],
                texts=[""], item_ids=[""], bad_samples=[],
                false_text_ids_BRT=ids_BT[:0][None], is_false_text_padding_BRT=is_padding_BT[:0][None],
                false_texts=[[]],
            )  # fmt: skip
            scores[i, t] = model.retrieval(batch).item()
    return scores


def scored(scorer, image_BCHW, ids_BT, image_P=ALL[0], text_P=ALL[1]):
    images, texts = scorer.encode_images(image_BCHW), scorer.encode_texts(ids_BT, np.array(LENGTHS))
    return scorer.scores(images, texts, image_P, text_P)


def difference(model, pairs_per_pass):
    image_BCHW, ids_BT, is_padding_BT = make_inputs(model)
    want = one_at_a_time(model, image_BCHW, ids_BT, is_padding_BT)
    got = scored(PairScorer(model, pairs_per_pass=pairs_per_pass), image_BCHW, ids_BT)
    assert want.std() > 0.05
    return (got.double() - want.flatten()).abs().max().item()


@pytest.mark.parametrize("vision", ["clip", "swin"])
@pytest.mark.parametrize("text", ["roberta", "bert"])
@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_equals_the_model_on_one_pair_at_a_time(vision, text, num_layers):
    # Passes of texts of one length, and such of several, whose last layer has another order of products.
    model = make_model(vision, text, num_layers)
    assert max(difference(model, pairs_per_pass) for pairs_per_pass in (2, 7, 100)) < 1e-10
    assert difference(model.float(), 5) < 1e-5


MUTATIONS = {
    "keys of the stream's own layer": (
        "_side",
        lambda f: lambda x, layout, layer, other_layer: f(x, layout, layer, layer),
    ),
    "queries before self-attention": (
        "_side",
        lambda f: (
            lambda x, *more: dataclasses.replace(
                f(x, *more), q_SHd=pair_scores.heads(more[1], more[1].cross_q(x), 1)[0]
            )
        ),
    ),
    "another pair's other side": (
        "_cross",
        lambda f: lambda layer, own, other, stream: f(layer, own, tuple(x.roll(1, 0) for x in other), stream),
    ),
    "no bias of the values": (
        "_attend_one",
        lambda f: lambda q, y, k_weight, v_weight, v_bias: f(q, y, k_weight, v_weight, 0 * v_bias),
    ),
}


@pytest.mark.parametrize(("name", "mutate"), MUTATIONS.values(), ids=MUTATIONS.keys())
def test_the_comparison_sees_a_fault(name, mutate, monkeypatch):
    model = make_model()
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("bias"):  # they start at 0
            torch.nn.init.normal_(parameter, std=0.1)
    assert difference(model, 2) < 1e-10
    monkeypatch.setattr(pair_scores, name, mutate(getattr(pair_scores, name)))
    assert difference(model, 2) > 1e-6


def test_any_pairs_in_any_order():
    model = make_model()
    image_BCHW, ids_BT, _ = make_inputs(model)
    scorer, counts = PairScorer(model, pairs_per_pass=4), []
    whole = scored(scorer, image_BCHW, ids_BT).view(NUM_IMAGES, -1)
    image_P, text_P = np.array([2, 0, 1, 1, 2, 0, 2]), np.array([7, 1, 0, 0, 3, 2, 7])
    images, texts = scorer.encode_images(image_BCHW), scorer.encode_texts(ids_BT, np.array(LENGTHS))
    some = scorer.scores(images, texts, image_P, text_P, counts.append)
    assert (some - whole[image_P, text_P]).abs().max() < 1e-12 and counts == [4, 3]
    assert scorer.scores(images, texts, image_P[:0], text_P[:0]).shape == (0,)


def test_each_side_is_encoded_once_and_padding_never():
    model = make_model()
    image_BCHW, ids_BT, _ = make_inputs(model)
    num_rows = {"vision.patch_embed": 0, "text.embeddings": 0, "fusion.text_layers.0.self_qkv": 0}
    for name in num_rows:

        def count(module, inputs, output, name=name):
            num_rows[name] += output.shape[:-1].numel()

        model.get_submodule(name).register_forward_hook(count)
    scored(PairScorer(model), image_BCHW, ids_BT)
    patches = NUM_IMAGES * model.config.vision.num_patches
    assert list(num_rows.values()) == [patches, sum(LENGTHS), sum(LENGTHS)]


def test_low_precision_does_not_round_the_scores():
    model = make_model(dtype=torch.float32)
    image_BCHW, ids_BT, _ = make_inputs(model)
    full = scored(PairScorer(model), image_BCHW, ids_BT)
    low = scored(PairScorer(model, lambda: torch.autocast("cpu", torch.bfloat16)), image_BCHW, ids_BT)
    assert 0 < (low - full).abs().max() < 0.1 * full.std() + 0.02
    assert low.dtype == torch.float32 and (low != low.bfloat16()).float().mean() > 0.8


def test_refusals():
    with pytest.raises(UserError, match=r'model.objectives must have "retrieval" for scores of pairs, got itm\.'):
        PairScorer(M3AE(small_config(objectives=("itm",))).eval())
    with pytest.raises(ValueError, match="model must be in evaluation mode"):
        PairScorer(make_model().train())


@pytest.mark.gpu
def test_equals_the_cpu_on_a_gpu():
    config = small_config(objectives=("retrieval",), init_std=0.1)
    text = dataclasses.replace(config.text, width=64, num_heads=2)  # heads of 32, which the kernel takes
    fusion = dataclasses.replace(config.fusion, width=64, num_heads=2)
    torch.manual_seed(0)
    model = M3AE(dataclasses.replace(config, text=text, fusion=fusion)).eval()
    image_BCHW, ids_BT, _ = make_inputs(model)
    want = scored(PairScorer(model), image_BCHW, ids_BT)
    got = scored(PairScorer(model.cuda(), pairs_per_pass=5), image_BCHW.cuda(), ids_BT.cuda())
    assert (got.cpu() - want).abs().max() < 1e-3
