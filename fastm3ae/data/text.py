"""Tokenizers: found on the hub or in a local folder, and applied to one text."""

import hashlib
from pathlib import Path

from huggingface_hub import file_exists
from huggingface_hub.constants import HF_HUB_OFFLINE
from huggingface_hub.errors import HfHubHTTPError
from tokenizers import Encoding
from transformers import AutoTokenizer, BertTokenizerFast, PreTrainedTokenizerFast, RobertaTokenizerFast

from fastm3ae.errors import UserError, first_line

__all__ = ["encode", "fingerprint", "hub_says", "is_path", "load_tokenizer"]

LOCAL_FILES = "tokenizer.json, vocab.txt (BERT), or vocab.json and merges.txt (RoBERTa)"


def load_tokenizer(name_or_folder: str | Path) -> PreTrainedTokenizerFast:
    """Returns the tokenizer of a local folder or, if there is no such folder, of the Hugging Face hub.

    Args:
        name_or_folder: A folder as transformers writes it, a folder with BERT's vocab.txt or RoBERTa's vocab.json and
            merges.txt and nothing else, or a hub name.

    Raises:
        UserError: The folder lacks a file, the hub name cannot be fetched, or the tokenizer lacks a special token or
            its vocabulary.
    """
    folder = Path(name_or_folder).expanduser()
    tokenizer = _load_folder(folder) if folder.is_dir() else _load_from_hub(str(name_or_folder))
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # what transformers makes of a cache with no vocabulary
        raise UserError(f"The tokenizer {name_or_folder} has no vocabulary; a local folder needs {LOCAL_FILES}.")
    for kind in ("cls", "sep", "pad", "mask"):
        if getattr(tokenizer, f"{kind}_token_id") is None:
            raise UserError(f"The tokenizer {name_or_folder} has no {kind} token; expected one of a BERT or a RoBERTa.")
    return tokenizer


def encode(tokenizer: PreTrainedTokenizerFast, text: str, max_tokens: int) -> Encoding:
    """Splits a text into CLS, at most ``max_tokens`` - 2 tokens, and SEP, without padding.

    Returns:
        ``ids``, ``tokens``, and ``word_ids``: the word that each token belongs to, as the tokenizer's own pre-tokenizer
        splits (at white space, and punctuation apart), None for special tokens.
    """
    # transformers' own call starts the backend's thread pool, of which it would warn when worker processes fork.
    backend = tokenizer.backend_tokenizer
    backend.no_padding()  # a tokenizer.json may ask for padding, and transformers' call leaves its settings behind
    backend.enable_truncation(max_tokens)
    return backend.encode(text)


def fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
    """Returns the SHA-256 of all that a tokenizer consists of."""
    return hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()


def _load_folder(folder: Path) -> PreTrainedTokenizerFast:
    files = {path.name for path in folder.iterdir()}
    if not files & {"tokenizer.json", "vocab.txt", "vocab.json"}:
        raise UserError(f"The tokenizer folder {folder} has no vocabulary; expected {LOCAL_FILES}.")
    if "vocab.json" in files and not files & {"tokenizer.json", "merges.txt"}:
        raise UserError(f"The tokenizer folder {folder} has vocab.json but no merges.txt beside it.")
    try:
        if files & {"tokenizer_config.json", "config.json"}:
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        if "vocab.txt" in files:
            return BertTokenizerFast.from_pretrained(folder, do_lower_case=_is_lower_case(folder / "vocab.txt"))
        if "vocab.json" in files:
            return RobertaTokenizerFast.from_pretrained(folder)
    except Exception as error:  # the libraries raise bare Exception for a damaged tokenizer.json
        raise UserError(f"The tokenizer in {folder} cannot be read: {first_line(error)}") from error
    raise UserError(f"The tokenizer folder {folder} has tokenizer.json but no tokenizer_config.json beside it.")


def _is_lower_case(vocab: Path) -> bool:
    """Returns whether no word of a BERT vocabulary has a capital letter; special tokens stand in brackets."""
    return all(word == word.lower() or word.startswith("[") for word in vocab.read_text(encoding="utf-8").splitlines())


def _load_from_hub(name: str) -> PreTrainedTokenizerFast:
    if is_path(name):
        raise UserError(f"The tokenizer folder {name} does not exist; expected a folder with {LOCAL_FILES}.")
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False, local_files_only=not _hub_answers(name))
    except (OSError, ValueError) as error:
        raise UserError(
            f"The tokenizer {name!r} is no local folder and could not be fetched from the Hugging Face hub "
            f"({hub_says(error)}); a local folder with {LOCAL_FILES} works too."
        ) from error


def is_path(name: str) -> bool:
    """Returns whether this can be no name of the hub."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1


def hub_says(error: BaseException) -> str:
    """Returns why something is not to be had from the hub, as a part of a sentence."""
    if HF_HUB_OFFLINE and isinstance(error, OSError):
        return "HF_HUB_OFFLINE is set, and it is not in the hub's local cache"
    return first_line(error)


def _hub_answers(name: str) -> bool:
    """Returns whether the hub can be reached: transformers would try for a minute before it looks into its cache."""
    try:
        file_exists(name, "tokenizer_config.json")
    except HfHubHTTPError:
        return True
    except Exception:  # of the HTTP library below, which is another one in every major release of the hub's client
        return False
    return True
