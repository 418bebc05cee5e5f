"""The language tower: transformers' own RoBERTa or BERT, so that its weights load from and go back to transformers."""

from torch import Tensor
from transformers import BertConfig, BertModel, RobertaConfig, RobertaModel

from fastm3ae.config import TextConfig

__all__ = ["build_text", "encode_tokens"]


def build_text(config: TextConfig, init_std: float) -> RobertaModel | BertModel:
    """Builds the tower with random weights.

    The unused pooler is kept, frozen, so that the weights are those of the plain transformers model.

    Args:
        config: The tower's configuration, with the vocabulary resolved.
        init_std: Standard deviation of the initial weights.
    """
    assert config.vocab_size is not None and config.pad_token_id is not None, "resolve_text fills them in"
    roberta = config.kind == "roberta"
    model_config = (RobertaConfig if roberta else BertConfig)(
        vocab_size=config.vocab_size,
        hidden_size=config.width,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        intermediate_size=config.mlp_width,
        hidden_dropout_prob=config.dropout_frac,
        attention_probs_dropout_prob=config.dropout_frac,
        max_position_embeddings=config.max_positions,
        type_vocab_size=config.num_token_types,
        layer_norm_eps=config.layer_norm_eps,
        pad_token_id=config.pad_token_id,
        initializer_range=init_std,
    )
    text = (RobertaModel if roberta else BertModel)(model_config)
    text.pooler.requires_grad_(False)
    return text


def encode_tokens(text: RobertaModel | BertModel, ids_BT: Tensor, is_padding_BT: Tensor) -> Tensor:
    """Encodes token ids into the last layer's hidden states (B, T, D).

    Args:
        text: The tower.
        ids_BT: int64 token ids. RoBERTa numbers positions by counting the ids that are not padding.
        is_padding_BT: True where a key must not be attended to.
    """
    hidden_BTD = text.embeddings(input_ids=ids_BT)
    is_visible_B11T = ~is_padding_BT[:, None, None, :]
    for layer in text.encoder.layer:
        hidden_BTD = layer(hidden_BTD, is_visible_B11T)
    return hidden_BTD
