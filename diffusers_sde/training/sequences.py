"""Where training text comes from: files or a column of a data set, as token numbers in sequences of one length.

Knows documents, the tokenizer made of their characters, and how they are packed.  Knows no network and no loss; the
order of sequences and their batches stand in :mod:`.samples`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from diffusers_sde.training.folders import find_files
from diffusers_sde.training.framing import DataError
from diffusers_sde.training.samples import Item, TrainingData

PAD, UNKNOWN, MASK = "[PAD]", "[UNK]", "[MASK]"
MOST_CHARACTERS = 2**16  # of a vocabulary of characters; more than that is no text
ENCODED_AT_ONCE = 1024  # lines


class Sequences(TrainingData):
    """Sequences of tokens ``{"input_ids": int64 (L,)}``; of text with a prefix also ``"prefix_length": int``, the
    number of tokens at the beginning that are given and not learned.

    Args:
        ids: (N, L).
        prefixes: (N,) lengths, or None.
    """

    unit = "sequences"

    def __init__(self, ids: np.ndarray, prefixes: np.ndarray | None = None) -> None:
        self.ids, self.prefixes = ids, prefixes

    def __len__(self) -> int:
        return len(self.ids)

    def item(self, index: int, seed: int) -> Item:
        """The sequence of this number; nothing of it is random."""
        item: Item = {"input_ids": torch.from_numpy(self.ids[index].astype(np.int64))}
        return item if self.prefixes is None else {**item, "prefix_length": int(self.prefixes[index])}

    def facts(self) -> dict[str, Any]:
        """What gives a checkpoint's numbers their meaning."""
        return {"--sequence_length": self.ids.shape[1]}

    def describe(self, classes: int) -> str:
        """A line of the plan."""
        how = "packed text" if self.prefixes is None else "each a prefix and its text"
        return f"{len(self)} sequences of {self.ids.shape[1]} tokens, {how}"


# -- documents --


def read_documents(source: str, text_column: str, prefix_column: str | None) -> tuple[list[str], list[str] | None]:
    """The texts of a folder (its ``.txt`` files in sorted order, else tables) or of a data set, and their prefixes.

    Raises:
        DataError: for what does not exist or holds no text.
    """
    folder = Path(source).expanduser()
    if folder.is_file():
        raise DataError(f"{source} is a file: pass the folder that it is in.")
    names = find_files(folder) if folder.is_dir() else []
    files = sorted(name for name in names if PurePosixPath(name).suffix == ".txt")
    if files and prefix_column is None:
        return [_read(folder / name) for name in files], None
    if files:
        raise DataError(f"Text files have no column {prefix_column!r}: leave out --prefix_column, or pass a table.")
    try:
        from diffusers_sde.training.hub_data import open_dataset
    except ImportError as error:
        raise DataError("Data sets need the package datasets: `pip install datasets`, or pass text files.") from error
    table = open_dataset(source, None, "train", False)
    columns = [text_column] + ([prefix_column] if prefix_column else [])
    for column in columns:
        if column not in table.column_names:
            known = ", ".join(table.column_names)
            raise DataError(f"{source} has no column {column!r}: pass one of {known} as --text_column.")
    found = [[_checked(value, source) for value in table[column]] for column in columns]
    return found[0], found[1] if prefix_column else None


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file} is no UTF-8 text ({error.reason}): convert it, or take it out of the folder."
        ) from error


def _checked(value: Any, source: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{source} holds {type(value).__name__} where text is expected: pass another --text_column.")
    return value


# -- tokens --


def character_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A stock tokenizer whose tokens are the characters of the texts, in the order of their code points, after a
    padding token, one for other characters, and the mask.

    Raises:
        DataError: for texts without characters, or with so many that they are none.
    """
    characters = sorted(set().union(*map(set, texts)))
    if not 0 < len(characters) <= MOST_CHARACTERS:
        raise DataError(f"The training text has {len(characters)} different characters: pass text files.")
    vocabulary = {token: number for number, token in enumerate([PAD, UNKNOWN, MASK, *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        unk_token=UNKNOWN,
        mask_token=MASK,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: Any, texts: Iterable[str]) -> Iterable[list[int]]:
    """The token numbers of each text, without special tokens."""
    texts = iter(texts)
    while some := list(itertools.islice(texts, ENCODED_AT_ONCE)):
        yield from tokenizer(some, add_special_tokens=False).input_ids


def pack(tokenizer: Any, texts: Sequence[str], length: int) -> Sequences:
    """All texts one after the other, each ended by a line break, cut into sequences.

    Raises:
        DataError: for less text than one sequence.
    """
    lines = (line for text in texts for line in (text if text.endswith("\n") else text + "\n").splitlines(True))
    ids = np.fromiter(itertools.chain.from_iterable(encode(tokenizer, lines)), np.int32)
    if len(ids) < length:
        raise DataError(f"The training text has {len(ids)} tokens, less than --sequence_length {length}: pass more.")
    return Sequences(ids[: len(ids) // length * length].reshape(-1, length))


def pair(tokenizer: Any, prefixes: Sequence[str], texts: Sequence[str], length: int) -> Sequences:
    """Each prefix with a line break and its text behind it, cut to one sequence or filled up with padding, which is
    learned as the end of the text.

    Raises:
        DataError: for a prefix that leaves no place, or a tokenizer without a padding token.
    """
    if tokenizer.pad_token_id is None:
        raise DataError("The tokenizer has no padding token, which ends a text: pass one that has.")
    ids = np.full((len(texts), length), tokenizer.pad_token_id, np.int32)
    lengths = np.zeros(len(texts), np.int32)
    encoded = zip(encode(tokenizer, (f"{prefix}\n" for prefix in prefixes)), encode(tokenizer, texts), strict=True)
    for row, (prefix, text) in enumerate(encoded):
        if len(prefix) >= length:
            raise DataError(
                f"Prefix {row} has {len(prefix)} tokens and leaves none to its text: pass a longer --sequence_length."
            )
        both = (prefix + text)[:length]
        ids[row, : len(both)], lengths[row] = both, len(prefix)
    return Sequences(ids, lengths)
