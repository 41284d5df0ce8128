"""The two training sets of the embedded models as image folders.

Knows two sources, the IDX files of Fashion-MNIST (MIT licence) and the npm package of the Noto emoji (Apache-2.0), and
the layout that it writes: ``<class>/<file>.png``, captions in ``metadata.jsonl`` (the ImageFolder convention of
``datasets``), and a README with the licence.  Knows nothing of how the images are read again, or of the command.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from diffusers_sde.training.framing import DataError, Unreadable, decoding, open_image, to_mode

FASHION_CLASSES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
FASHION_FOLDER = "/usr/share/datasets/fashion-mnist"
FASHION_README = """# Fashion-MNIST, 32x32

{count} grey images of 28x28 pixels ({split} split), padded with black to 32x32; the folder names begin with the label
of the data set.  Captions are in `metadata.jsonl`.

Source: https://github.com/zalandoresearch/fashion-mnist, copyright 2017 Zalando SE, MIT licence.  H. Xiao, K. Rasul,
R. Vollgraf, "Fashion-MNIST: a novel image dataset for benchmarking machine learning algorithms", arXiv:1708.07747.
"""

EMOJI_PACKAGE = "emoji-datasource-google@16.0.0"
EMOJI_IMAGES = "img/google/64"
EMOJI_EXCLUDED = ("Flags", "Component")  # Component holds the five bare skin tones
EMOJI_README = """# Noto emoji, {resolution}x{resolution}

{count} emoji of Google's Noto font without flags and skin tones, composited on white; the folders are the categories of
the Unicode charts in their order.  `metadata.jsonl` has the name of each as `text`, and as `captions` that, its short
names, and the shortest with its keywords (`--caption_column captions` draws one at random).

Images: Noto Emoji, copyright Google, Apache licence 2.0, https://github.com/googlefonts/noto-emoji.
Names and categories: npm package {package}, MIT licence, https://github.com/iamcal/emoji-data.
"""


class Picture(NamedTuple):
    """One image of the folder: its class folder, file name, caption and pixels; ``captions`` are all that fit it."""

    folder: str
    name: str
    caption: str
    image: Image.Image
    captions: tuple[str, ...] = ()


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """The uint8 array of a gzipped IDX file; raises :class:`DataError` if it is missing or not such a file."""
    if not path.exists():
        raise DataError(f"{path} is missing: `apt-get install dataset-fashion-mnist` or pass its folder as --source.")
    try:
        data = gzip.decompress(path.read_bytes())
        if data[:4] != bytes((0, 0, 8, dimensions)):
            raise ValueError("wrong magic number")
        shape = np.frombuffer(data, ">u4", dimensions, offset=4)
        return np.frombuffer(data, np.uint8, offset=4 + 4 * dimensions).reshape(shape)
    except (OSError, EOFError, ValueError) as error:
        raise DataError(
            f"{path} is no IDX file of bytes ({error}): fetch it again or pass another --source."
        ) from error


def fashion_mnist(source: str | Path = FASHION_FOLDER, split: str = "train") -> tuple[np.ndarray, np.ndarray]:
    """Fashion-MNIST: uint8 images ``(N, 32, 32)``, 28x28 padded with black, and labels ``(N,)``, from the IDX files.

    ``split`` is ``"train"`` (60,000) or ``"test"`` (10,000).
    """
    stem = Path(source) / {"train": "train", "test": "t10k"}[split]
    images = read_idx(Path(f"{stem}-images-idx3-ubyte.gz"), 3)
    labels = read_idx(Path(f"{stem}-labels-idx1-ubyte.gz"), 1)
    if len(images) != len(labels):
        raise DataError(f"{source} has {len(images)} images but {len(labels)} labels: pass another --source.")
    if labels.max(initial=0) >= len(FASHION_CLASSES):
        raise DataError(f"{source} has labels above {len(FASHION_CLASSES) - 1}: pass another --source.")
    margin = [(32 - n) // 2 for n in images.shape[1:]]
    return np.pad(images, ((0, 0), *((m, m) for m in margin))), labels


def fashion_pictures(source: str | Path, split: str) -> Iterator[Picture]:
    for i, (pixels, label) in enumerate(zip(*fashion_mnist(source, split), strict=True)):
        caption = FASHION_CLASSES[label]
        yield Picture(f"{label}_{slug(caption)}", f"{i:05d}.png", caption, Image.fromarray(pixels))


def slug(text: str) -> str:
    """``"Smileys & Emotion"`` as ``"smileys-and-emotion"``."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower().replace("&", "and")).strip("-")


@contextlib.contextmanager
def package_reader(source: str | Path | None) -> Iterator[Callable[[str], bytes]]:
    """A function that reads one file of the npm package: from its tarball or its unpacked folder, or, for None, from
    a tarball that ``npm pack`` fetches into a temporary folder.  Only what is asked for is unpacked."""
    with contextlib.ExitStack() as stack:
        path = Path(source) if source else fetch_package(stack.enter_context(tempfile.TemporaryDirectory()))
        if path.is_dir():
            root = path / "package" if (path / "package").is_dir() else path
            yield lambda name: (root / name).read_bytes()
            return
        if not path.exists():
            raise DataError(f"{path} does not exist: pass the tarball or folder of {EMOJI_PACKAGE}, or no --source.")
        try:
            tar = stack.enter_context(tarfile.open(path, "r:gz"))
            members = {member.name.partition("/")[2]: member for member in tar}
        except (tarfile.TarError, OSError, EOFError) as error:
            raise DataError(f"{path} is no tarball ({error}): `npm pack {EMOJI_PACKAGE}` makes it.") from error

        def read(name: str) -> bytes:
            file = tar.extractfile(members[name]) if name in members else None
            if file is None:
                raise FileNotFoundError(name)
            return file.read()

        yield read


def fetch_package(folder: str) -> Path:
    """The tarball that ``npm pack`` downloads into ``folder``."""
    npm = shutil.which("npm")
    if npm is None:
        raise DataError(f"npm is not installed: install it, or pass the tarball of {EMOJI_PACKAGE} as --source.")
    done = subprocess.run([npm, "pack", EMOJI_PACKAGE, "--pack-destination", folder], capture_output=True, text=True)
    tarballs = list(Path(folder).glob("*.tgz"))
    if done.returncode or not tarballs:
        reason = (done.stderr.strip().splitlines() or ["no tarball"])[-1]
        raise DataError(f"`npm pack {EMOJI_PACKAGE}` failed ({reason}): fetch it elsewhere and pass it as --source.")
    return tarballs[0]


def emoji_pictures(source: str | Path | None, resolution: int) -> Iterator[Picture]:
    """The emoji on white at ``resolution``, in the order of the data set: the base forms only (skin tones are entries
    below them), without flags."""
    with package_reader(source) as read:
        try:
            entries = json.loads(read("emoji.json"))
            entries = [e for e in entries if e["category"] not in EMOJI_EXCLUDED and e.get("has_img_google", True)]
            entries.sort(key=lambda e: e["sort_order"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{source} has no emoji.json ({error!r}): pass the tarball or folder of {EMOJI_PACKAGE}."
            ) from error
        categories = list(dict.fromkeys(e["category"] for e in entries))
        # A gzipped tarball is read forwards fastest: in the order of its files, then yielded in that of the data set.
        images = {}
        for file in sorted(e["image"] for e in entries):
            try:
                with decoding(), open_image(io.BytesIO(read(f"{EMOJI_IMAGES}/{file}"))) as image:
                    images[file] = to_mode(image, 3).resize((resolution, resolution), Image.Resampling.LANCZOS)
            except Unreadable as error:
                raise DataError(f"{source} has no readable {EMOJI_IMAGES}/{file}: fetch {EMOJI_PACKAGE}.") from error
        for e in entries:
            folder = f"{categories.index(e['category'])}_{slug(e['category'])}"
            yield Picture(folder, e["image"], e["name"].lower(), images[e["image"]], emoji_captions(e))


def emoji_captions(entry: dict[str, Any]) -> tuple[str, ...]:
    """The name of an emoji, its short names in words, and the shortest of them with its keywords (the subcategory):
    ``("red apple", "apple", "apple, food fruit")``."""
    name = entry["name"].lower()
    short = [words(n) for n in entry.get("short_names", ())] or [name]
    keywords = words(entry.get("subcategory", ""))
    described = [f"{min(short, key=len)}, {keywords}"] if keywords else []
    return tuple(dict.fromkeys([name, *short, *described]))


def words(text: str) -> str:
    """``"stuck_out-tongue"`` as ``"stuck out tongue"``; ``"+1"`` stays."""
    return re.sub(r"[_&\s]+|(?<=\w)-", " ", text.lower()).strip()


def check_output(output_dir: str | Path) -> Path:
    """The path of a new or empty folder; raises :class:`DataError` for anything else."""
    output = Path(output_dir)
    if output.exists() and not output.is_dir():
        raise DataError(f"--output_dir {output} is a file: pass a new folder.")
    if output.is_dir() and any(output.iterdir()):
        raise DataError(f"--output_dir {output} is not empty: remove it or pass a new folder.")
    return output


def write_folder(pictures: Iterable[Picture], output_dir: str | Path, readme: str) -> int:
    """Write an image folder, first under a temporary name beside it, and return the number of images.

    ``readme`` is formatted with ``count``.
    """
    output = check_output(output_dir)
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    try:
        count = 0
        with open(partial / "metadata.jsonl", "w") as metadata:
            for picture in tqdm(pictures, desc=output.name, unit=" images", disable=None):
                folder = partial / picture.folder
                folder.mkdir(exist_ok=True)
                picture.image.save(folder / picture.name)
                line: dict[str, Any] = {"file_name": f"{picture.folder}/{picture.name}", "text": picture.caption}
                if picture.captions:
                    line["captions"] = picture.captions
                metadata.write(json.dumps(line) + "\n")
                count += 1
        (partial / "README.md").write_text(readme.format(count=count))
        partial.chmod(0o755)  # mkdtemp keeps others out
        if output.exists():
            output.rmdir()
        partial.rename(output)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return count


def prepare_fashion_mnist(output_dir: str | Path, source: str | Path = FASHION_FOLDER, split: str = "train") -> int:
    """Write Fashion-MNIST as an image folder of 32x32 grey PNGs; returns the number of images.

    Class folders are ``0_t-shirt`` ... ``9_ankle-boot``, so that sorted names give the labels of the data set.
    """
    readme = FASHION_README.replace("{split}", split)
    return write_folder(fashion_pictures(source, split), output_dir, readme)


def prepare_noto_emoji(output_dir: str | Path, source: str | Path | None = None, resolution: int = 32) -> int:
    """Write the Noto emoji as an image folder of RGB PNGs on white; returns the number of images.

    Class folders are the categories in the order of the data set; ``source`` is the package's tarball or folder.
    Captions are the names (``text``) and everything that fits (``captions``, a list).
    """
    if resolution < 1:
        raise DataError(f"--resolution must be at least 1, not {resolution}.")
    readme = EMOJI_README.replace("{resolution}", str(resolution)).replace("{package}", EMOJI_PACKAGE)
    return write_folder(emoji_pictures(source, resolution), output_dir, readme)
