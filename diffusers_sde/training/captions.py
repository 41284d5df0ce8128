"""Captions of an image folder: ``metadata.jsonl``, ``metadata.csv``, or text files beside the images.

Knows the forms that people have and what a caption may be, in the rows of a data set too.  Knows no images: whatever it
refuses is refused with its file and line.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import posixpath
import unicodedata
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from diffusers_sde.training.framing import DataError

METADATA = ("metadata.jsonl", "metadata.csv")
BESIDE = (".txt", ".caption")  # files of one caption, named like their image
Caption = str | list[str]


def caption_of(value: Any, where: str) -> Caption:
    """A caption as it is trained on: a string, or several to draw from; none is the empty one.

    Args:
        value: a string, a list of strings, or None.
        where: what the message calls its place.

    Raises:
        DataError: for anything else.
    """
    several = isinstance(value, list | tuple)
    texts = [v for v in (value if several else [value]) if v is not None]
    wrong = next((v for v in texts if not isinstance(v, str)), None)
    if wrong is not None:
        raise DataError(
            f"{where}: the caption {wrong!r} is no text: correct it to a string, a list of strings, or null for none."
        )
    if any("\ud800" <= character <= "\udfff" for text in texts for character in text):
        raise DataError(f"{where}: the caption {value!a} has half a surrogate pair: correct it.")
    return texts if several and len(texts) > 1 else texts[0] if texts else ""


def folder_captions(folder: Path, files: Sequence[str], images: Sequence[str], column: str) -> list[Caption] | None:
    """The captions of these images, from metadata files, the nearest folder's first, else from text files beside them;
    None without either, or without the column.

    Rows name their image relative to the folder of the metadata file; several rows for one image are several captions.

    Args:
        folder: what all paths are relative to.
        files: all files in it.
        images: those that captions are wanted for.
        column: of the metadata that holds them.

    Raises:
        DataError: with file and line for what is no caption, and for images without one where others have some.
    """
    tables = sorted((f for f in files if PurePosixPath(f).name in METADATA), key=lambda f: f.count("/"))
    folders = [PurePosixPath(f).parent.as_posix() for f in tables]
    if double := next((f for f in folders if folders.count(f) > 1), None):
        raise DataError(f"{folder / double} has both {' and '.join(METADATA)}: keep one of them.")
    found: dict[str, Caption] = {}
    for table in tables:
        found.update(read_table(folder, table, column))
    if found:
        return _matched(found, images, f"{folder / tables[0]} has no {column!r}", "add the line, or remove the image")
    beside = {_same(f): f for f in files if f.endswith(BESIDE)}
    texts = {i: beside[name] for i in images for name in map(_same, _names_beside(i)) if name in beside}
    if not texts:
        return None
    found = {image: read_text(folder / file).strip() for image, file in texts.items()}
    return _matched(found, images, f"{folder} has no text file", "add it, or remove the image")


def _names_beside(image: str) -> Iterator[str]:
    return (str(PurePosixPath(image).with_suffix(suffix)) for suffix in BESIDE)


def _matched(found: Mapping[str, Caption], images: Sequence[str], lack: str, remedy: str) -> list[Caption]:
    """The caption of each image, whichever normal form or separator its name has."""
    alike = {_same(name): caption for name, caption in found.items()}
    captions = [found.get(image, alike.get(_same(image))) for image in images]
    for image, caption in zip(images, captions, strict=True):
        if caption is None:
            raise DataError(f"{lack} for {image}: {remedy}.")
    return [caption for caption in captions if caption is not None]


def _same(name: str) -> str:
    return unicodedata.normalize("NFC", name.replace("\\", "/"))


def read_table(folder: Path, table: str, column: str) -> dict[str, Caption]:
    """The captions in a metadata file, by the path of their image relative to ``folder``; empty without the column."""
    file, here = folder / table, PurePosixPath(table).parent.as_posix()
    rows = csv_rows(file) if file.suffix == ".csv" else json_rows(file)
    found: dict[str, list[str]] = {}
    others: dict[str, None] = {}
    for line, row in rows:
        name = row.get("file_name")
        if not isinstance(name, str):
            raise _wrong(file, line, "the row has no file_name")
        others.update(dict.fromkeys(key for key, value in row.items() if isinstance(value, str | list)))
        if column in row:
            caption = caption_of(row[column], f"{file}, line {line}")
            path = posixpath.normpath(posixpath.join(here, name.replace("\\", "/")))
            found.setdefault(path, []).extend([caption] if isinstance(caption, str) else caption)
    others.pop("file_name", None)
    if not found and others:
        warnings.warn(
            f"{file} has no {column!r}: no captions are read; pass one of {', '.join(others)} as --caption_column to "
            "use it.",
            stacklevel=2,
        )
    return {path: captions if len(captions) > 1 else captions[0] for path, captions in found.items()}


def _wrong(file: Path, line: int, reason: object) -> DataError:
    form = "CSV with a column file_name" if file.suffix == ".csv" else "JSON lines with a file_name each"
    return DataError(f"{file} is not {form} (line {line}: {reason}): correct it.")


def json_rows(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a file of JSON lines with their line numbers; only a line feed ends a line."""
    for number, line in enumerate(read_text(file).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise _wrong(file, number, error) from error
        if not isinstance(row, dict):
            raise _wrong(file, number, f"a {type(row).__name__} is no object")
        yield number, row


def csv_rows(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a CSV file by their header, with their line numbers."""
    reader = csv.reader(io.StringIO(read_text(file), newline=""), strict=True, skipinitialspace=True)
    header: list[str] | None = None
    try:
        for row in reader:
            if header is None:
                header = row
                if "file_name" not in header:
                    raise _wrong(file, reader.line_num, f"the columns are {', '.join(header)}")
            elif row and len(row) != len(header):
                counts = f"{len(row)} values for {len(header)} columns; one with a comma needs quotes"
                raise _wrong(file, reader.line_num, counts)
            elif row:
                yield reader.line_num, dict(zip(header, row, strict=True))
    except csv.Error as error:
        raise _wrong(file, reader.line_num, error) from error


def read_text(file: Path) -> str:
    """The text of a file in UTF-8, with or without a byte-order mark.

    Raises:
        DataError: for another encoding, with the line, and for a file that cannot be read.
    """
    try:
        data = file.read_bytes()
    except OSError as error:
        raise DataError(f"{file} cannot be read ({error.strerror}): permit it, or remove it.") from error
    try:
        return data.removeprefix(codecs.BOM_UTF8).decode()
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise DataError(f"{file}, line {line} is not UTF-8: save the file in that encoding.") from error
