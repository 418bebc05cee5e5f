"""Models to and from the Hugging Face hub, by ``huggingface_hub``'s mixin.

model = M3AE.from_pretrained("runs/m3ae/checkpoints/best")  # or a name of the hub
model.save_pretrained("m3ae-roco")
model.push_to_hub("user/m3ae-roco", private=True)

A saved folder is a checkpoint like those of a run, which every command takes: weights and configuration in
model.safetensors, the tokenizer, and besides README.md, a model card that says what the run says of itself.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from huggingface_hub import ModelCard, ModelHubMixin, snapshot_download
from torch import nn
from transformers import PreTrainedTokenizerFast

from fastm3ae.config import ImageConfig, M3AEConfig, MPMAConfig
from fastm3ae.data.text import hub_says, is_path, load_tokenizer
from fastm3ae.errors import UserError
from fastm3ae.model import image_model, m3ae, mpma
from fastm3ae.model.build import Model
from fastm3ae.weights.header import WEIGHTS_FILE, check_fits
from fastm3ae.weights.model_card import model_card
from fastm3ae.weights.pretrained import data_of, init_model, read_about, save_weights

__all__ = ["M3AE", "MPMA", "ImageModel"]

AnyModel = TypeVar("AnyModel", bound="_OnHub")


class _OnHub(ModelHubMixin, nn.Module, library_name="fastm3ae"):
    """A model with what its checkpoint holds besides.

    Attributes:
        kind: Of which configuration it is.
        tokenizer: Splits its texts; None: it reads none, or its checkpoint has none.
        about: What the run that made it says of itself; nothing where there was none.
    """

    kind: ClassVar[str]
    config: Any
    tokenizer: PreTrainedTokenizerFast | None = None
    about: Mapping[str, Any] = {}

    # Overridden as a whole: the mixin's own would build the nested configuration from config.json, as plain
    # dictionaries, while ours stands in the weights' header.
    @classmethod
    def from_pretrained(
        cls: type[AnyModel],
        pretrained_model_name_or_path: str | Path,
        *,
        force_download: bool = False,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        revision: str | None = None,
        **model_kwargs: Any,
    ) -> AnyModel:
        """Returns the model of a checkpoint, in evaluation mode, on the CPU.

        Args:
            pretrained_model_name_or_path: One of our checkpoints (its folder or file), an official .ckpt that holds its
                configuration, or the name of a repository on the hub.
            force_download: Download again what is in the cache.
            token: For the hub; None: the one that ``hf auth login`` left.
            cache_dir: Where downloads are kept; None: the hub's own folder.
            local_files_only: Take what is in the cache, and ask no network.
            revision: Branch, tag or commit.
            model_kwargs: None: the model is built as its checkpoint says.

        Raises:
            UserError: There is no such checkpoint, it can't be read, or it is of another kind of model.
        """
        if model_kwargs:
            raise UserError(f"{cls.__name__}.from_pretrained takes no {', '.join(model_kwargs)}.")
        path = Path(pretrained_model_name_or_path).expanduser()
        if not (path.exists() or is_path(str(pretrained_model_name_or_path))):
            try:
                path = Path(
                    snapshot_download(
                        str(pretrained_model_name_or_path),
                        revision=revision,
                        cache_dir=cache_dir,
                        force_download=force_download,
                        token=token,
                        local_files_only=local_files_only,
                        allow_patterns=[WEIGHTS_FILE, "*.json", "*.txt"],
                    )
                )
            except (OSError, ValueError) as error:
                raise UserError(
                    f"{path} is neither a local checkpoint nor to be had from the Hugging Face hub ({hub_says(error)})."
                ) from error
        config, about = read_about(path)
        if config is None or config.kind != cls.kind:
            what = "does not hold its configuration" if config is None else f"is a checkpoint of {config.kind}"
            raise UserError(f"{path} {what}; fastm3ae.hub.{cls.__name__} loads one of {cls.kind}.")
        check_fits(config, path)
        model = cls(config)
        assert isinstance(model, Model)
        init_model(model, path)
        model.about = about
        data = data_of(about, path)
        if config.has_texts and Path(data.tokenizer).is_dir():
            model.tokenizer = load_tokenizer(data.tokenizer)
        return model.eval()

    def _save_pretrained(self, save_directory: Path) -> None:
        save_weights(self.state_dict(), self.config, save_directory, self.about)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(save_directory)

    def generate_model_card(self, *_: Any, **__: Any) -> ModelCard:
        """Returns what is known of the model and its run, how it is loaded, and what it is not for."""
        num_parameters = sum(parameter.numel() for parameter in self.parameters())
        return ModelCard(model_card(self.config, num_parameters, data_of(self.about, Path()), self.about))


class M3AE(_OnHub, m3ae.M3AE):
    """``fastm3ae.model.m3ae.M3AE`` that can be had from a checkpoint or the hub, and be put there."""

    kind = "m3ae"
    config: M3AEConfig


class MPMA(_OnHub, mpma.MPMA):
    """``fastm3ae.model.mpma.MPMA``, likewise."""

    kind = "mpma"
    config: MPMAConfig


class ImageModel(_OnHub, image_model.ImageModel):
    """``fastm3ae.model.image_model.ImageModel``, likewise."""

    kind = "image"
    config: ImageConfig
