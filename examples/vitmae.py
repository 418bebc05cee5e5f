"""Makes transformers' ViTMAEForPreTraining faster: masking, unshuffle, patchify and loss become ops of fastm3ae.

    from vitmae import accelerate    # or copy this file

    model = accelerate(ViTMAEForPreTraining.from_pretrained("facebook/vit-mae-base"))
    loss = model(pixel_values).loss

The parameters and their names, the arguments, the outputs and, with the same noise or seed, the numbers are the same.

    python examples/vitmae.py            # loss, gradients, times and memory beside those of transformers
    python examples/vitmae.py --check    # and exit with 1 if one misses its target; --help says what else
"""

import sys
from pathlib import Path
from types import MethodType

import torch
import torch.nn.functional as F
from transformers import ViTMAEForPreTraining
from transformers.models.vit_mae.modeling_vit_mae import ViTMAEDecoderOutput, ViTMAEForPreTrainingOutput
from transformers.utils import can_return_tuple

from fastm3ae.kernels import gather_image_patches, masked_pixel_loss, random_patch_order, restore_patches


def accelerate(model: ViTMAEForPreTraining) -> ViTMAEForPreTraining:
    """Replaces the forward passes of the model, its embeddings and its decoder by those below; returns the model."""
    if not isinstance(model, ViTMAEForPreTraining) or model.config.num_channels != 3:
        raise ValueError(f"model must be a ViTMAEForPreTraining of 3 channels, got {type(model).__name__}")
    model.forward = MethodType(reconstruct, model)
    model.decoder.forward = MethodType(decode, model.decoder)
    model.vit.embeddings.forward = MethodType(embed_visible, model.vit.embeddings)
    return model


def cut_visible(self, pixel_values, noise=None):
    """Draws which patches are visible. Returns their pixels, and what random_patch_order returns."""
    num_patches = self.position_embeddings.shape[1] - 1
    if noise is None:
        noise = torch.rand(len(pixel_values), num_patches, device=pixel_values.device)
    order = random_patch_order(noise, int(num_patches * (1 - self.config.mask_ratio)))
    options = {"patch_size_px": self.config.patch_size, "dtype": pixel_values.dtype}
    return gather_image_patches(pixel_values, order[0], **options), order


def add_positions(self, patches_BKD, keep_BK):
    """Returns CLS and the visible patches, each at its position."""
    positions_LD = self.position_embeddings[0]
    cls_B1D = (self.cls_token + positions_LD[:1]).expand(len(keep_BK), -1, -1)
    return torch.cat((cls_B1D, patches_BKD + F.embedding(keep_BK + 1, positions_LD)), dim=1)


def embed_visible(self, pixel_values, noise=None, interpolate_pos_encoding=False):
    """Embeds the visible patches alone, so that the projection is a quarter of the whole image's."""
    if interpolate_pos_encoding or tuple(pixel_values.shape[2:]) != tuple(self.image_size):
        return type(self).forward(self, pixel_values, noise, interpolate_pos_encoding)
    pixels_BKP, (keep_BK, restore_BN, is_hidden_BN) = cut_visible(self, pixel_values, noise)
    projection = self.patch_embeddings.projection  # a convolution, which is a product where patches do not overlap
    patches_BKD = F.linear(pixels_BKP, projection.weight.flatten(1), projection.bias)
    return add_positions(self, patches_BKD, keep_BK), is_hidden_BN.float(), restore_BN


def decode(self, hidden_states, ids_restore, interpolate_pos_encoding=False):
    """Puts mask tokens where patches were hidden, and predicts pixels: of patches, not of CLS as well."""
    if interpolate_pos_encoding:
        return type(self).forward(self, hidden_states, ids_restore, interpolate_pos_encoding)
    x_BLD = self.decoder_embed(hidden_states)
    x_BLD = restore_patches(x_BLD, ids_restore, self.mask_token[0, 0], self.decoder_pos_embed[0])
    for layer in self.decoder_layers:
        x_BLD = layer(x_BLD)
    return ViTMAEDecoderOutput(logits=self.decoder_pred(self.decoder_norm(x_BLD[:, 1:])))


@can_return_tuple
def reconstruct(
    self, pixel_values=None, noise=None, interpolate_pos_encoding=None, attention_mask=None, **kwargs
) -> ViTMAEForPreTrainingOutput:
    """The loss of the hidden patches, whose targets are cut out of the image as they are needed."""
    options = {"interpolate_pos_encoding": interpolate_pos_encoding}
    outputs = self.vit(pixel_values, noise=noise, attention_mask=attention_mask, **options, **kwargs)
    logits = self.decoder(outputs.last_hidden_state, outputs.ids_restore, **options).logits
    loss = masked_pixel_loss(
        logits,
        pixel_values.to(torch.promote_types(pixel_values.dtype, torch.float32)),
        outputs.mask.bool(),
        patch_size_px=self.config.patch_size,
        normalize_target=self.config.norm_pix_loss,
    )
    return ViTMAEForPreTrainingOutput(
        loss=loss,
        logits=logits,
        mask=outputs.mask,
        ids_restore=outputs.ids_restore,
        hidden_states=outputs.hidden_states,
        attentions=outputs.attentions,
    )


if __name__ == "__main__":
    sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
    from vitmae_step import main

    main(Path(__file__))
