"""timm's Swin against a second, literal forward pass, written from the original's description of each step."""

import pytest
import torch
import torch.nn.functional as F

from fastm3ae.config import VisionConfig
from fastm3ae.model.vision import build_vision, encode_pixels


def norm(x, module):
    return F.layer_norm(x, x.shape[-1:], module.weight, module.bias, 1e-5)


def windows(x, size):
    """(B, G, G, C) -> (B * windows, size^2, C), windows in row-major order."""
    batch, grid, _, width = x.shape
    num = grid // size
    return x.view(batch, num, size, num, size, width).transpose(2, 3).reshape(-1, size * size, width)


def shift_mask(grid, size, shift):
    """-100 between tokens that the cyclic shift brought together from different regions of the image."""
    region = torch.zeros(1, grid, grid, 1)
    parts = (slice(0, -size), slice(-size, -shift), slice(-shift, None))
    for number, (rows, columns) in enumerate((r, c) for r in parts for c in parts):
        region[:, rows, columns] = number
    region = windows(region, size)[..., 0]
    return torch.where(region[:, None] != region[:, :, None], -100.0, 0.0).double()


def window_attention(x, attn, size, heads, mask):
    num, tokens, width = x.shape
    q, k, v = attn.qkv(x).view(num, tokens, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
    scores = q * (width // heads) ** -0.5 @ k.transpose(-1, -2)
    at = torch.stack(torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")).flatten(1)
    offset = (at[:, :, None] - at[:, None]) + size - 1
    bias = attn.relative_position_bias_table[offset[0] * (2 * size - 1) + offset[1]]
    scores = scores + bias.permute(2, 0, 1)
    if mask is not None:
        scores = (scores.view(-1, len(mask), heads, tokens, tokens) + mask[:, None]).flatten(0, 1)
    return attn.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(num, tokens, width))


def literal_swin(swin, image, config):
    x = norm(swin.patch_embed.proj(image).permute(0, 2, 3, 1), swin.patch_embed.norm)
    for stage, layer in enumerate(swin.layers):
        if stage:
            quarters = [x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
            x = layer.downsample.reduction(norm(torch.cat(quarters, -1), layer.downsample.norm))
        batch, grid, _, width = x.shape
        for number, block in enumerate(layer.blocks):
            size = config.image_size_px // 32
            shift = size // 2 if number % 2 else 0
            if grid <= size:
                size, shift = grid, 0
            y = torch.roll(norm(x, block.norm1), (-shift, -shift), (1, 2))
            mask = shift_mask(grid, size, shift) if shift else None
            y = window_attention(windows(y, size), block.attn, size, config.swin_num_heads[stage], mask)
            num = grid // size
            y = y.view(batch, num, num, size, size, width).transpose(2, 3).reshape(batch, grid, grid, width)
            x = x + torch.roll(y, (shift, shift), (1, 2))
            x = x + block.mlp.fc2(F.gelu(block.mlp.fc1(norm(x, block.norm2))))
    return norm(x, swin.norm).flatten(1, 2)


@pytest.mark.parametrize(
    ("size", "blocks", "heads"), [(96, (2, 2), (2, 4)), (64, (2, 2, 2), (1, 2, 4)), (96, (1, 2, 2, 2), (1, 2, 2, 4))]
)
def test_swin_is_the_originals(size, blocks, heads):
    torch.manual_seed(0)
    config = VisionConfig(
        kind="swin", image_size_px=size, patch_size_px=4, width=16, swin_num_blocks=blocks, swin_num_heads=heads
    )
    swin = build_vision(config).double().eval()
    for parameter in swin.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    image = torch.randn(2, 3, size, size, dtype=torch.float64)
    with torch.no_grad():
        expected = literal_swin(swin, image, config)
        assert torch.allclose(encode_pixels(swin, image), expected, atol=1e-10, rtol=0)
    assert expected.std() > 0.1
