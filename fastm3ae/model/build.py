"""From a configuration to the model that it is of."""

from fastm3ae.config import ModelConfig
from fastm3ae.model.image_model import ImageModel
from fastm3ae.model.m3ae import M3AE
from fastm3ae.model.mpma import MPMA

__all__ = ["Model", "build_model"]

Model = M3AE | MPMA | ImageModel

_MODELS = {"m3ae": M3AE, "mpma": MPMA, "image": ImageModel}


def build_model(config: ModelConfig) -> Model:
    """Builds the model with random weights; the vocabulary, if it has one, must be resolved."""
    return _MODELS[config.kind](config)
