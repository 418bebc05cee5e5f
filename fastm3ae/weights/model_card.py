"""The model card: what is known of a model and its run, in the Hugging Face hub's form (YAML, then Markdown)."""

from collections.abc import Mapping
from typing import Any

from huggingface_hub import ModelCardData

from fastm3ae import __version__
from fastm3ae.config import DataConfig, ImageConfig, ModelConfig

__all__ = ["model_card"]

_MODELS = {
    "m3ae": ("M3AE", "[Chen et al., MICCAI 2022](https://arxiv.org/abs/2209.07098)"),
    "mpma": ("MPMA", "[Zhang et al., IEEE TMM 2023](https://arxiv.org/abs/2305.07920), as its abstract describes it"),
    "image": ("ImageModel", "a vision tower with a head of its own"),
}
_PIPELINES = {"vqa": "visual-question-answering", "image_classification": "image-classification",
              "segmentation": "image-segmentation"}  # fmt: skip
_TOWERS = {"clip": "CLIP ViT", "vit": "ViT", "swin": "Swin Transformer", "roberta": "RoBERTa", "bert": "BERT"}

_CARD = """---
{data}
---

# {title}

{name} ({source}), made with fastm3ae {version}.

```python
from fastm3ae.hub import {name}

model = {name}.from_pretrained("this repository or a folder with its files")
```

## Model

{model}

## Training

{training}

## Metrics

{metrics}

## Intended use

Research on medical images and texts. It is not a medical device and gives no medical advice: what it says of an image
has been checked by nobody, and it must not be used for diagnosis or treatment. What it was trained on decides what it
knows: other hospitals, devices, languages and findings may be missing there.

## Licence

None is chosen yet: whoever publishes this model names one here and as `license` at the top. What its training data and
the weights it started from allow, decides which.
"""


def model_card(config: ModelConfig, num_parameters: int, data: DataConfig, about: Mapping[str, Any]) -> str:
    """Returns the card.

    Args:
        config: Of what model it is.
        num_parameters: So many.
        data: How its inputs are made.
        about: What the run says of itself (the header of a checkpoint); nothing where there was none.
    """
    run = about.get("config", {})
    task = run.get("task", {}).get("kind")
    name, source = _MODELS[config.kind]
    tags = ["medical", "radiology", config.kind, *(["vision-language"] if config.has_texts else [])]
    pipeline = _PIPELINES.get(task, "image-feature-extraction")
    header = ModelCardData(library_name="fastm3ae", pipeline_tag=pipeline, tags=tags)
    return _CARD.format(
        data=header.to_yaml(),
        title=f"{name} for {task.replace('_', ' ')}" if task else name,
        name=name,
        source=source,
        version=__version__,
        model=_table(_model(config, num_parameters, data)),
        training=_table(_training(config, data, about)) if run else "Nothing is known of its training.",
        metrics=_metrics(about),
    )


def _model(config: ModelConfig, num_parameters: int, data: DataConfig) -> dict[str, Any]:
    vision = config.vision
    depth = vision.swin_num_blocks if vision.kind == "swin" else vision.num_blocks
    rows = {
        "parameters": f"{num_parameters:,}",
        "images": f"{config.image_size_px} x {config.image_size_px} px, normalised as `{data.val_transform}`",
        "vision tower": f"{_TOWERS[vision.kind]}, patches of {vision.patch_size_px} px, width {vision.width}, "
        f"blocks {depth}",
    }
    if not isinstance(config, ImageConfig):
        text = config.text
        rows |= {
            "texts": f"up to {data.max_text_tokens} tokens",
            "language tower": f"{_TOWERS[text.kind]}, width {text.width}, layers {text.num_layers}, vocabulary "
            f"{text.vocab_size}",
            "fusion": f"width {config.fusion.width}, layers {config.fusion.num_layers}",
        }
    return rows | {"objectives": ", ".join(config.objectives)}


def _training(config: ModelConfig, data: DataConfig, about: Mapping[str, Any]) -> dict[str, Any]:
    run, was_random = about["config"], about.get("weights_were_random")
    towers = config.vision.weights
    if not isinstance(config, ImageConfig):
        towers = f"{towers} (images), {config.text.weights} (texts)"
    rows = {
        "data sets": ", ".join(data.datasets),
        "started from": run.get("init_from") or towers,
        "steps": about.get("step"),
        "pairs per step": run.get("train", {}).get("batch_size"),
        "seed": run.get("seed"),
        "all weights started at random": None if was_random is None else "yes" if was_random else "no",
        "labels": len(about.get("labels", [])) or None,
    }
    hashes = {f"sha256 of {name}": digest for name, digest in about.get("fingerprints", {}).items()}
    return {name: value for name, value in (rows | hashes).items() if value is not None}


def _metrics(about: Mapping[str, Any]) -> str:
    if not about.get("validation"):
        return "None were recorded with the weights."
    values = {name: f"{value:.4g}" for name, value in about["validation"].items() if isinstance(value, (int, float))}
    step = about.get("validated_step", "unknown")
    return f"Of the validation split, after step {step}:\n\n{_table(values)}"


def _table(rows: Mapping[str, Any]) -> str:
    return "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows.items())])
