"""What users write, for mypy: never run."""

from pathlib import Path

import numpy as np
from torch import Tensor

from fastm3ae.config import FeaturesConfig, M3AEConfig, VisionConfig
from fastm3ae.export import export_graph, export_text, export_vision
from fastm3ae.features import Embedder, Extracted, extract_features
from fastm3ae.hub import M3AE, MPMA
from fastm3ae.model.embed import ImageEncoder
from fastm3ae.tasks.predict import Choices, Predictor
from fastm3ae.weights.pretrained import load_model


def from_the_hub(name: str) -> MPMA:
    model: M3AE = M3AE.from_pretrained(name, revision="main")
    model.save_pretrained("folder")
    model.push_to_hub("user/name", private=True)
    config: M3AEConfig = model.config
    assert config.vision == VisionConfig()
    return MPMA.from_pretrained(Path(name)).eval()


def ask(image: bytes) -> Choices:
    predictor = Predictor.load("checkpoint", device="cpu", precision="fp32")
    answers: list[tuple[str, float]] = predictor.answer(image, "why", top=3)
    return answers + predictor.classify_all([(image, "text")])[0]


def features(image_BCHW: Tensor) -> np.ndarray:
    found: Extracted = extract_features(FeaturesConfig(checkpoint="checkpoint", datasets=("roco",)))
    assert found.num_items > 0
    embedded: dict[str, Tensor] = ImageEncoder(load_model(Path("checkpoint")))(image_BCHW)
    assert embedded
    return Embedder("checkpoint").embed(["x.png"], ["text"])["fused"]


def export(checkpoint: Path) -> None:
    export_vision(checkpoint, Path("vision"))
    export_text(checkpoint, Path("text"))
    export_graph(checkpoint, Path("pair.pt2"), "pair")
