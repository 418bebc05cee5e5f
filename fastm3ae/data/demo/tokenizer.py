"""A small WordPiece tokenizer, learned from the corpus' own captions; the same captions give the same files."""

import json
import re
import string
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

__all__ = ["learn_wordpieces", "write_tokenizer"]

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
CHARACTERS = string.ascii_lowercase + string.digits + ".,;:()-"


def learn_wordpieces(captions: Iterable[str], vocab_size: int) -> list[str]:
    """Merges the most frequent pair of neighbouring pieces until the vocabulary is full; ties go by the alphabet.

    Frequent words become one piece, rare ones stay in several. Every character is a piece at the start and inside of a
    word, so that no lower-case word is unknown.

    Args:
        captions: Lower-case texts.
        vocab_size: Entries, special tokens included; fewer when nothing is left to merge.

    Returns:
        The vocabulary in the order of its ids; pieces inside a word begin with "##".

    Source: Sennrich et al., "Neural Machine Translation of Rare Words with Subword Units" (ACL 2016), algorithm 1.
    """
    counts = Counter(word for caption in captions for word in re.findall(r"\w+|[^\w\s]", caption))
    pieces = {word: [word[0], *(f"##{character}" for character in word[1:])] for word in sorted(counts)}
    # A dictionary keeps the order and drops a piece that a second pair of pieces spells.
    vocab = dict.fromkeys([*SPECIAL_TOKENS, *CHARACTERS, *(f"##{character}" for character in CHARACTERS)])
    while len(vocab) < vocab_size:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, parts in pieces.items():
            for pair in zip(parts, parts[1:], strict=False):
                pairs[pair] += counts[word]
        if not pairs:
            break
        first, second = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merged = first + second.removeprefix("##")
        vocab[merged] = None
        for parts in pieces.values():
            i = 0
            while i < len(parts) - 1:
                if (parts[i], parts[i + 1]) == (first, second):
                    parts[i : i + 2] = [merged]
                i += 1
    return list(vocab)


def write_tokenizer(folder: Path, captions: Iterable[str], vocab_size: int) -> None:
    """Writes a BERT tokenizer's folder, which ``transformers.AutoTokenizer.from_pretrained`` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    vocab = learn_wordpieces(captions, vocab_size)
    (folder / "vocab.txt").write_text("".join(f"{piece}\n" for piece in vocab), encoding="utf-8", newline="\n")
    config = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": 512}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8", newline="\n")
