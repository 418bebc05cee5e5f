"""Pictures at validation: which there are, and that they show what the model saw and gave."""

import dataclasses
from contextlib import nullcontext

import models
import numpy as np
import pytest
import torch
from corpus import TOKENIZER
from mpma_models import MEMORIES, small_batch, small_model
from PIL import Image
from runs import write_corpus
from test_mpma_training import run

from fastm3ae.training import pictures
from fastm3ae.training.pictures import MAX_WORDS, draw_pictures
from fastm3ae.visualize import GREY, HEAT, MAX_HEAT_FRAC, TileRow, Usage, lay_over, patchify, tile_grid, usage_chart

MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]


def draw(model, batch, num_pictures=6):
    return draw_pictures(model, batch, TOKENIZER, num_pictures, MEAN, STD, nullcontext)


@pytest.fixture
def drawn(monkeypatch):
    """What the drawing functions are given, by their names."""
    given = {}

    def spy_on(name, function):
        def draws(rows):
            given[name] = rows
            return function(rows)

        monkeypatch.setattr(pictures, name, draws)

    for name in ("reconstruction_grid", "tile_grid", "usage_chart"):
        spy_on(name, getattr(pictures, name))
    return given


def seen_patches(batch, num_kept=4):
    """The visible patches of each image in the order in which they are kept, literally."""
    return [
        sorted(range(len(noise)), key=lambda n: (noise[n], n))[:num_kept] for noise in batch.patch_noise_BN.tolist()
    ]


def unit_range(image_BCHW):
    return (image_BCHW.float() * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]).clamp(0, 1)


OBJECTIVES = {
    "image_reconstruction": {"reconstructions"},
    "report_reconstruction": {"word_attention", "slot_usage"},
    "image_reconstruction report_reconstruction": {"reconstructions", "word_attention", "slot_usage"},
    "global_alignment local_alignment": set(),
}


@pytest.mark.parametrize("objectives", OBJECTIVES)
def test_what_the_objectives_of_mpma_allow(objectives):
    model = small_model(objectives=tuple(objectives.split()))
    model.train()
    assert draw(model, small_batch(model.config)).keys() == OBJECTIVES[objectives] and model.training


def test_what_the_objectives_of_m3ae_allow(drawn):
    model = models.small_model(text="bert")
    batch = models.small_batch(model, "mlm")
    assert draw(model, batch, 3).keys() == {"reconstructions"}
    predicted = TOKENIZER.convert_ids_to_tokens(model.eval().mlm_logits(batch).argmax(-1).tolist())
    true = TOKENIZER.convert_ids_to_tokens(batch.masked_labels_M.tolist())
    first, second, _ = (row.caption[-1] for row in drawn["reconstruction_grid"])
    assert first == f"masked: {true[0]} -> {predicted[0]}; {true[1]} -> {predicted[1]}"
    assert second == f"masked: {true[2]} -> {predicted[2]}"
    assert draw(models.small_model(text="bert", objectives=("mlm", "itm")), batch) == {}
    draw(models.small_model(text="bert", objectives=("mim",)), batch)
    assert drawn["reconstruction_grid"][0].caption == [""]


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("masking", ["paired", "separate"])
def test_every_memory_is_drawn(memory, masking, drawn):
    model = small_model(memory=memory, masking=masking)
    sheets = draw(model, small_batch(model.config))
    assert ("slot_usage" in sheets) == (memory != "none")
    if memory == "slots":
        assert [len(row.values_M) for row in drawn["usage_chart"]] == [5, 5, 5]
        even = f"{5 / (5 + (4 if masking == 'paired' else 16)):.1%}"
        assert all(f"to 5 slots ({even} if" in row.title for row in drawn["usage_chart"])
    if memory == "topk":
        assert [len(row.values_M) for row in drawn["usage_chart"]] == [11, 11]
    titles = [title for row in drawn["tile_grid"] for title, _ in row.tiles[1:]]
    assert all((", slots " in title) == (memory == "slots") for title in titles)


@pytest.mark.parametrize("target_scale", [1, 2])
def test_reconstructions_show_what_was_seen_and_what_was_predicted(target_scale, drawn):
    model = small_model(image={"target_scale": target_scale, "normalize_target": False})
    torch.nn.init.zeros_(model.mim_decoder.pixels.weight)
    torch.nn.init.constant_(model.mim_decoder.pixels.bias, 0.1)
    batch = small_batch(model.config)
    sheet = draw(model, batch, 3)["reconstructions"]
    assert len(drawn["reconstruction_grid"]) == 3 and sheet.size[0] > 400
    size = 16 * target_scale
    want = unit_range(torch.full((1, 3, 1, 1), 0.1))
    for row, seen, image_BCHW in zip(
        drawn["reconstruction_grid"], seen_patches(batch), batch.image_BCHW.split(1), strict=False
    ):
        original, masked, rebuilt = (patchify(x[None], size)[0] for x in row[:3])
        assert row.original.shape == (3, 64 * target_scale, 64 * target_scale)
        assert torch.allclose(row.original, unit_range(image_BCHW)[0])
        for n in range(16):
            if n in seen:
                assert torch.equal(masked[n], original[n]) and torch.allclose(rebuilt[n], original[n])
            else:
                assert (masked[n] == GREY).all()
                assert torch.allclose(rebuilt[n].unflatten(0, (-1, 3)), want.flatten(), atol=1e-6)


@pytest.mark.parametrize("target_scale", [1, 2])
def test_attention_lies_on_the_patch_that_is_attended_to(target_scale, drawn):
    """Every word of the last layer attends to the third visible patch alone, the slots get nothing."""
    model = small_model(image={"target_scale": target_scale})
    batch = small_batch(model.config)

    def to_the_third(_, args, out):
        keys_BKD = torch.full_like(out, -40.0).unflatten(0, (6, 4))
        keys_BKD[:, 2] = 40.0
        return keys_BKD.flatten(0, 1)

    layer = model.fusion.layers[2]
    layer.cross_kv.register_forward_hook(to_the_third)
    layer.cross_q.register_forward_hook(lambda _, args, out: torch.full_like(out, 40.0))
    draw(model, batch)
    rows, seen = drawn["tile_grid"], seen_patches(batch)
    assert [len(row.tiles) for row in rows] == [2, 4, 3, 5]  # the pairs of which something is hidden
    for row, pair in zip(rows, (1, 3, 4, 5), strict=True):
        (first, original), *tiles = row.tiles
        assert first.startswith("original") and torch.allclose(original, unit_range(batch.image_BCHW[pair]))
        patches = patchify(original[None], 16 * target_scale)[0]
        for title, overlay in tiles:
            assert title.endswith("reddest patch 100%, slots 0%")
            for n, patch in enumerate(patchify(overlay[None], 16 * target_scale)[0]):
                if n == seen[pair][2]:
                    heat = (1 - MAX_HEAT_FRAC) * patches[n].unflatten(0, (-1, 3)) + MAX_HEAT_FRAC * torch.tensor(HEAT)
                    assert torch.allclose(patch, heat.flatten(), atol=1e-6)
                else:
                    assert torch.equal(patch, patches[n] if n in seen[pair] else torch.full_like(patch, GREY))


def test_titles_say_the_word_and_what_was_predicted(drawn):
    model = small_model().eval()
    lengths, hidden = (9, 3, 9), (tuple(range(1, 9)), (), (2, 5))
    batch = small_batch(model.config, lengths, hidden)
    batch = dataclasses.replace(batch, texts=["first", "second", "third"])
    draw(model, batch)
    tokens = TOKENIZER.convert_ids_to_tokens(model.mlm_logits(batch).argmax(-1).tolist())
    true = TOKENIZER.convert_ids_to_tokens(batch.masked_labels_M.tolist())
    words = [f"{a} -> {b}" for a, b in zip(true, tokens, strict=True)]
    got = {row.caption: [title.split("\n")[0] for title, _ in row.tiles[1:]] for row in drawn["tile_grid"]}
    assert got == {"first": words[:MAX_WORDS], "third": words[8:]}


def test_slots_that_take_everything(drawn):
    model = small_model()
    for layer, slots in zip(model.fusion.layers, model.fusion.slots, strict=True):
        torch.nn.init.zeros_(layer.cross_kv.weight)
        torch.nn.init.zeros_(layer.cross_q.weight)
        torch.nn.init.constant_(layer.cross_q.bias, 40.0)
        torch.nn.init.constant_(slots.keys, 40.0)
        torch.nn.init.constant_(slots.keys[1:], -40.0)  # the first alone
    batch = small_batch(model.config)
    draw(model, batch)
    for row in drawn["usage_chart"]:
        assert torch.equal(row.values_M, torch.tensor([1.0, 0, 0, 0, 0], dtype=torch.float64))
        assert "hidden words give 100.0% to 5 slots" in row.title
    for row, pair in zip(drawn["tile_grid"], (1, 3, 4, 5), strict=True):
        seen = seen_patches(batch)[pair]
        patches = patchify(row.tiles[0][1][None], 16)[0]
        patches[[n for n in range(16) if n not in seen]] = GREY
        for title, overlay in row.tiles[1:]:
            assert title.endswith("slots 100%") and torch.equal(patchify(overlay[None], 16)[0], patches)


def test_a_batch_of_which_no_word_is_hidden():
    model = small_model()
    assert draw(model, small_batch(model.config, hidden=((),) * 6)).keys() == {"reconstructions"}


def test_drawn_pairs_of_which_no_word_is_hidden():
    model = small_model()
    assert draw(model, small_batch(model.config), 1).keys() == {"reconstructions", "slot_usage"}


def test_lay_over():
    image_BCHW = torch.rand(2, 3, 8, 8)
    weights_BN = torch.tensor([[0.0, 0.2, 0.4, 0.1], [0.0, 0.0, 0.0, 0.0]])
    got = lay_over(image_BCHW, weights_BN, 4)
    assert torch.equal(got[1], image_BCHW[1]) and torch.equal(got[0, :, :4, :4], image_BCHW[0, :, :4, :4])
    for n, (rows, columns) in enumerate([(slice(0, 4), slice(4, 8)), (slice(4, 8), slice(0, 4))], 1):
        share, before = MAX_HEAT_FRAC * weights_BN[0, n] / 0.4, image_BCHW[0, :, rows, columns]
        want = (1 - share) * before + share * torch.tensor(HEAT)[:, None, None]
        assert torch.allclose(got[0, :, rows, columns], want, atol=1e-6)


def test_tiles_stand_in_rows():
    """Red in the first row's second column, blue in the second row's first, and white where there is none."""
    red, blue, black = (torch.tensor(colour)[:, None, None].expand(3, 8, 8) for colour in
                        ((1.0, 0, 0), (0, 0, 1.0), (0.0, 0, 0)))  # fmt: skip
    first, second = TileRow("a caption " * 60, [("a", black), ("b", red)]), TileRow("", [("c", blue)])
    pixels = np.array(tile_grid([first, second], min_tile_px=160))
    places = {}
    for name, colour in (("red", (255, 0, 0)), ("blue", (0, 0, 255))):
        rows, columns = np.nonzero((pixels == colour).all(axis=-1))
        assert len(rows) == 160 * 160
        places[name] = rows.min(), columns.min()
    assert places["red"][1] == 166 and places["blue"][1] == 0 and places["blue"][0] > places["red"][0] + 160
    assert (pixels[places["blue"][0] :, 166:] == 255).all()


def test_cells_are_coloured_by_their_share_of_the_largest():
    rows = [Usage("one", torch.tensor([0.0, 0.5, 1.0])), Usage("two", torch.full((70,), 0.5))]
    pixels = np.array(usage_chart(rows, num_columns=64, cell_px=10))
    one, two = 20 + 20 + 5, 20 + 20 + 10 + 6 + 20 + 5
    dark, half = (8, 48, 107), (132, 152, 181)
    assert [tuple(pixels[one, 10 * m + 5]) for m in range(3)] == [(255, 255, 255), half, dark]
    assert all(tuple(pixels[two, 10 * m + 5]) == half for m in range(64))
    assert [tuple(pixels[two + 10, 10 * m + 5]) for m in range(7)] == [half] * 6 + [(255, 255, 255)]
    usage_chart([Usage("nothing is used", torch.zeros(4))])


def test_a_run_leaves_them_behind(tmp_path):
    write_corpus(tmp_path)
    assert run(tmp_path, "--train.tensorboard", num_steps=2, validate_every_steps=1) == 0
    names = [
        f"{name}_{step:06d}.png" for name in ("reconstructions", "slot_usage", "word_attention") for step in (1, 2)
    ]
    folder = tmp_path / "run" / "pictures"
    assert sorted(path.name for path in folder.iterdir()) == names
    sizes = [Image.open(folder / name).size for name in names]
    assert all(width >= 300 for width, _ in sizes) and all(height > 2 * 144 for _, height in (sizes[0], sizes[-1]))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert sorted(board.Tags()["images"]) == ["reconstructions", "slot_usage", "word_attention"]
    assert "val/memory_frac" in board.Tags()["scalars"]


@pytest.mark.parametrize(
    "arguments",
    [["--train.num-pictures", "0"], ["--model.objectives", "global_alignment", "local_alignment"]],
    ids=["no pictures are asked for", "alignment alone"],
)
def test_a_run_without_pictures(tmp_path, arguments):
    write_corpus(tmp_path)
    assert run(tmp_path, *arguments, num_steps=1) == 0
    assert list((tmp_path / "run" / "pictures").iterdir()) == []
