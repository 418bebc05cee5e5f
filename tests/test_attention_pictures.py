"""Pictures of attention and memory: the weights are those with which the layer computed, word by word."""

import numpy as np
import pytest
import torch
from corpus import TOKENIZER
from given import given, m3ae_folder, mpma_folder
from mpma_models import MEMORIES
from PIL import Image

from fastm3ae.cli import main
from fastm3ae.data.text import encode
from fastm3ae.errors import UserError
from fastm3ae.model.fusion_use import FusionUse
from fastm3ae.visualize import GREY, HEAT, MAX_HEAT_FRAC, attention, patchify
from fastm3ae.visualize.attention import draw_attention, word_attention, words_of
from fastm3ae.visualize.memory import draw_memory, memory_use, words_by_slot
from fastm3ae.visualize.subject import read_subject

TEXTS = ["left lesion of the knee", "acute"]


def subject_of(folder, texts=TEXTS):
    return read_subject(folder, given(folder), texts, device="cpu")


@pytest.mark.parametrize("layer", [1, 2, 3])
def test_the_weights_of_m3ae_make_the_output_of_the_layer(layer):
    """The layer with its cross-attention replaced by these weights times its values gives what the layer gives."""
    subject = subject_of(m3ae_folder())
    model, batch, kept = subject.model, subject.batch, {}
    stream = model.fusion.text_layers[layer - 1]
    stream.register_forward_hook(lambda _, args, out: kept.update(other=args[1], out=out))
    stream.self_norm.register_forward_hook(lambda _, args, out: kept.update(x=out))
    found = word_attention(subject, layer)
    with torch.no_grad():
        _, value_BLD = stream.cross_kv(kept["other"]).chunk(2, dim=-1)
        for pair, (patches_HTN, others_HT1) in enumerate(found):
            num_tokens = int(batch.num_tokens_B[pair])
            assert patches_HTN.shape == (4, num_tokens, 16) and others_HT1.shape == (4, num_tokens, 1)
            weights_HTL = torch.cat([others_HT1, patches_HTN], dim=-1)
            context_TD = torch.cat([w_TL @ v for w_TL, v in zip(weights_HTL, value_BLD[pair].chunk(4, dim=-1),
                                                                 strict=True)], dim=-1)  # fmt: skip
            got_TD = stream.add_mlp(stream.add_cross(kept["x"][pair, :num_tokens], context_TD))
            assert torch.allclose(got_TD, kept["out"][pair, :num_tokens], atol=1e-5)
    assert not torch.allclose(found[0].patches_HTN[0], found[0].patches_HTN[1], atol=1e-4)  # else any head would do


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("layer", [1, 3])
def test_the_weights_of_mpma_make_the_output_of_the_layer(memory, layer):
    subject = subject_of(mpma_folder(memory=memory))
    fusion, kept = subject.model.fusion, {}
    stream = fusion.layers[layer - 1]
    stream.cross_kv.register_forward_hook(lambda _, args, out: kept.update(value=out.chunk(2, dim=-1)[1]))
    stream.self_norm.register_forward_hook(lambda _, args, out: kept.update(x=out))
    stream.mlp_norm.register_forward_hook(lambda _, args, out: kept.update(out=out))
    found = word_attention(subject, layer)
    starts, want_SD = np.cumsum([0, *subject.batch.num_tokens_B]), kept["out"]
    with torch.no_grad():
        for pair, (patches_HTN, others_HTM) in enumerate(found):
            assert patches_HTN.shape[-1] == 16 and others_HTM.shape[-1] == (5 if memory == "slots" else 0)
            weights_HTK, rows = torch.cat([others_HTM, patches_HTN], dim=-1), slice(starts[pair], starts[pair + 1])
            value_KHd = kept["value"].unflatten(0, (2, 16))[pair].unflatten(-1, (4, -1))
            if memory == "slots":
                value_KHd = torch.cat([fusion.slots[layer - 1]()[1], value_KHd])
            context_TD = torch.einsum("htk,khd->thd", weights_HTK, value_KHd).flatten(1)
            got_TD = stream.add_mlp(stream.add_cross(kept["x"][rows], context_TD))
            assert torch.allclose(got_TD, want_SD[rows], atol=1e-5)


def test_the_weights_of_topk_are_those_of_its_heads():
    subject = subject_of(mpma_folder(memory="topk"))
    topk, kept = subject.model.fusion.topk, []
    topk.q.register_forward_hook(lambda _, args, out: kept.append(out))
    use = memory_use(subject)
    with torch.no_grad():
        keys_MD = topk.kv(topk.matrix).chunk(2, dim=-1)[0]
    tokens = iter(kept[0])
    for by_place in words_by_slot(subject, use):
        (weights_TM,) = by_place.values()
        for got_M in weights_TM:
            want_M, q_D = torch.zeros(11), next(tokens)
            for q_d, k_Md in zip(q_D.chunk(4), keys_MD.chunk(4, dim=1), strict=True):
                score_M = k_Md @ q_d / 12**0.5
                best = score_M.argsort(descending=True)[:3]
                want_M[best] += score_M[best].softmax(0) / 4
            assert torch.allclose(got_M, want_M, atol=1e-6)
    assert next(tokens, None) is None


def test_words_have_all_their_tokens():
    text = "Hyperintense  lesion, (left) zzzz."
    encoding = encode(TOKENIZER, text, 32)
    found = words_of(encoding, text)
    assert [word for word, _ in found] == ["Hyperintense", "lesion", "left", "zzzz"]
    tokens = [token for _, of_word in found for token in of_word]
    punctuation = [i for i, (start, end) in enumerate(encoding.offsets) if text[start:end] in tuple(",().")]
    assert sorted([*tokens, *punctuation, 0, len(encoding.ids) - 1]) == list(range(len(encoding.ids)))
    assert (
        words_of(encode(TOKENIZER, text, 4), text)[-1][0] in text and len(words_of(encode(TOKENIZER, "", 4), "")) == 0
    )


def test_the_attended_patch_is_red(monkeypatch):
    """A layer whose words all attend to the image's fifth patch: it alone is coloured, under every word."""
    subject, drawn = subject_of(m3ae_folder()), []
    stream = subject.model.fusion.text_layers[1]

    def to_the_fifth(_, args, out):
        keys = torch.full_like(out, -40.0)
        keys[:, 1 + 5] = 40.0
        return keys

    stream.cross_kv.register_forward_hook(to_the_fifth)
    stream.cross_q.register_forward_hook(lambda _, args, out: torch.full_like(out, 40.0))
    tile_grid = attention.tile_grid
    monkeypatch.setattr(
        attention, "tile_grid", lambda rows, **options: drawn.append(rows) or tile_grid(rows, **options)
    )
    assert len(draw_attention(subject, 2)) == 2
    (original, *tiles) = [tile for row in drawn[0] for tile in row.tiles]
    assert [title.split("\n")[0] for title, _ in tiles] == ["left", "lesion", "of", "the", "knee"]
    patches = patchify(original[1][None], 16)[0]
    for title, overlay in tiles:
        assert title.endswith("most 100.0%, CLS 0%")
        for n, patch in enumerate(patchify(overlay[None], 16)[0]):
            heat = (1 - MAX_HEAT_FRAC) * patches[n].unflatten(0, (-1, 3)) + MAX_HEAT_FRAC * torch.tensor(HEAT)
            assert torch.allclose(patch, heat.flatten() if n == 5 else patches[n], atol=1e-6)
    assert GREY not in patches  # nothing is hidden


def test_heads_are_drawn_one_by_one(monkeypatch):
    subject, drawn = subject_of(m3ae_folder()), []
    tile_grid = attention.tile_grid
    monkeypatch.setattr(
        attention, "tile_grid", lambda rows, **options: drawn.append(rows) or tile_grid(rows, **options)
    )
    draw_attention(subject, 3, "all")
    captions = [row.caption for row in drawn[0]]
    assert len(captions) == 4 and all(f"head {n} of 4" in caption for n, caption in enumerate(captions, 1))
    weights_HTN = word_attention(subject, 3)[0].patches_HTN
    most = [[float(title.split("most ")[1].split("%")[0]) for title, _ in row.tiles[1:]] for row in drawn[0]]
    words = words_of(subject.encodings[0], TEXTS[0])
    want = [[100 * float(of_head[tokens].mean(dim=0).max()) for _, tokens in words] for of_head in weights_HTN]
    assert np.allclose(most, want, atol=0.051)
    with pytest.raises(UserError, match=r"numbered from 1 to 4, got 5\."):
        draw_attention(subject, 3, [1, 5])


@pytest.mark.parametrize("memory", ["slots", "topk"])
def test_the_memory_is_mapped(memory):
    subject = subject_of(mpma_folder(memory=memory))
    use = memory_use(subject)
    maps, usage = draw_memory(subject)
    assert len(maps) == 2 and usage.width > 100
    for figure, by_place, pair in zip(maps, words_by_slot(subject, use), range(2), strict=True):
        words = words_of(subject.encodings[pair], TEXTS[pair])
        panels = [axes for axes in figure.axes if axes.images]
        assert len(panels) == len(by_place) == (3 if memory == "slots" else 1)
        for axes, weights_TM in zip(panels, by_place.values(), strict=True):
            assert [label.get_text() for label in axes.get_yticklabels()] == [word for word, _ in words]
            want = np.stack([weights_TM[tokens].mean(dim=0) for _, tokens in words])
            assert np.allclose(axes.images[0].get_array(), want, atol=1e-6)


def test_the_whole_pass_sees_the_whole_pair():
    """Masks change nothing, and every token is asked about."""
    folder = mpma_folder()
    one, other = (read_subject(folder, given(folder), TEXTS, device="cpu", seed=seed) for seed in (0, 1))
    assert not torch.equal(one.batch.patch_noise_BN, other.batch.patch_noise_BN)
    for left, right in zip(word_attention(one, 2), word_attention(other, 2), strict=True):
        assert torch.equal(left.patches_HTN, right.patches_HTN)
    with torch.no_grad(), FusionUse(one.model, one.batch, is_whole=True) as use:
        fused_SD = one.model.fuse_whole(one.batch)
    assert len(fused_SD) == one.batch.num_tokens_B.sum() == sum(len(weights) for weights in use.slot_weights()[:1])


REFUSED = {
    "attention --layer 4": "error: The layer must be from 1 to 3, got 4.",
    "attention --layer 0": "error: The layer must be from 1 to 3, got 0.",
    "attention --heads 0": "error: The heads are numbered from 1 to 4, got 0.",
    "attention --heads mean 2": "error: --heads must be mean, all, or numbers of heads, got mean 2.",
    "attention --texts a b c": "error: There are 2 images and 3 texts; expected one text for each image, one for "
    "all of them, or several for one image.",
    "attention --texts ...": "error: Text 1 has no word that could look at an image, got '...'.",
    "attention --device gpu": "error: The device must be auto, cpu, cuda or cuda:N, got 'gpu'.",
    "memory": "m3ae is a model of M3AE, which has no memory; MPMA has.",
}


@pytest.mark.parametrize("line", REFUSED)
def test_mistakes_are_said_in_a_sentence(line, tmp_path, capsys):
    folder = m3ae_folder()
    kind, *options = line.split()
    texts = [] if "--texts" in options else ["--texts", *TEXTS]
    images = ["--images", *map(str, given(folder))]
    arguments = ["visualize", kind, str(folder), *images, *texts, *options, "--output", str(tmp_path / "out")]
    assert main(arguments) == 2
    assert capsys.readouterr().err.strip().endswith(REFUSED[line]) and not (tmp_path / "out").exists()


def test_models_without_a_fusion_or_a_memory(tmp_path, capsys):
    for kind, options, line in (
        ("attention", {"objectives": ("global_alignment",)}, "has no fusion, in which words would look at patches."),
        ("memory", {"memory": "none"}, "is an MPMA without a memory (model.memory none, or no fusion)."),
    ):
        folder = mpma_folder(**options)
        images = ["--images", *map(str, given(folder)), "--texts", "knee", "--output", str(tmp_path / "out")]
        assert main(["visualize", kind, str(folder), *images]) == 2
        assert capsys.readouterr().err.strip().endswith(line)


def test_the_command_writes_a_sheet_for_each_pair(tmp_path, capsys):
    folder, out = mpma_folder(), tmp_path / "out"
    common = [str(folder), "--images", str(given(folder)[0]), "--texts", *TEXTS, "--output", str(out)]
    assert main(["visualize", "attention", *common, "--heads", "2", "1"]) == 0
    assert main(["visualize", "memory", *common]) == 0
    names = [f"attention_layer_3_pair_{pair}.png" for pair in (1, 2)] + ["slot_usage.png"]
    names += [f"memory_pair_{pair}.{suffix}" for pair in (1, 2) for suffix in ("png", "pdf", "svg")]
    assert sorted(path.name for path in out.iterdir()) == sorted(names)
    assert capsys.readouterr().out.count("wrote") == len(names)
    assert Image.open(out / "attention_layer_3_pair_1.png").width > 5 * 144


def test_a_swin_has_no_cls():
    folder = m3ae_folder(vision="swin", objectives=("mlm", "itm"))
    found = word_attention(subject_of(folder), 1)
    assert all(patches_HTN.shape[-1] == 64 and others_HT0.shape[-1] == 0 for patches_HTN, others_HT0 in found)
