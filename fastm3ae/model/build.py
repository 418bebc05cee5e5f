"""From a configuration to the model that it is of."""

from fastm3ae.config import ModelConfig
from fastm3ae.model.m3ae import M3AE
from fastm3ae.model.mpma import MPMA

__all__ = ["Model", "build_model"]

Model = M3AE | MPMA


def build_model(config: ModelConfig) -> Model:
    """Builds the model with random weights; the vocabulary must be resolved."""
    return M3AE(config) if config.kind == "m3ae" else MPMA(config)
