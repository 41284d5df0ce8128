"""``diffusers-sde prepare``: both data sets become image folders, whole or not at all."""

from __future__ import annotations

import gzip
import io
import json
import os
import tarfile

import numpy as np
import pytest
from PIL import Image

from diffusers_sde.cli import main
from diffusers_sde.training import prepare
from diffusers_sde.training.data import load_images
from diffusers_sde.training.framing import DataError

# -- fake sources --


def idx(array: np.ndarray) -> bytes:
    """An IDX file: two zeros, type (8: bytes), number of dimensions, big-endian sizes, data."""
    sizes = np.array(array.shape, ">u4").tobytes()
    return gzip.compress(bytes((0, 0, 8, array.ndim)) + sizes + array.astype(np.uint8).tobytes())


@pytest.fixture
def fashion(tmp_path):
    """A folder of IDX files with 25 (training) and 12 (test) images whose first pixel is their number."""
    folder = tmp_path / "idx"
    folder.mkdir()
    for stem, n in (("train", 25), ("t10k", 12)):
        images = np.random.default_rng(n).integers(0, 256, (n, 28, 28))
        images[:, 0, 0] = np.arange(n)
        (folder / f"{stem}-images-idx3-ubyte.gz").write_bytes(idx(images))
        (folder / f"{stem}-labels-idx1-ubyte.gz").write_bytes(idx(np.arange(n)[::-1] % 10))
    return folder


def entry(order: int, name: str, category: str, **more) -> dict:
    image = f"{0x1F600 + order:x}.png"
    return {"name": name, "category": category, "sort_order": order, "image": image, "has_img_google": True, **more}


EMOJI = [
    entry(40, "PIZZA", "Food & Drink"),
    entry(3, "THUMBS UP", "People & Body", skin_variations={"1F3FB": {"image": "1f603-1f3fb.png"}}),
    entry(1, "GRINNING FACE", "Smileys & Emotion"),
    entry(20, "SKIN TONE", "Component"),
    entry(90, "FLAG: ITALY", "Flags"),
    entry(41, "WAFFLE", "Food & Drink"),
    entry(42, "NOT BY GOOGLE", "Food & Drink", has_img_google=False),
]
KEPT = {"grinning face": 0, "thumbs up": 1, "pizza": 2, "waffle": 2}


def emoji_files(emoji: list[dict] = EMOJI) -> dict[str, bytes]:
    """The package's files: 64x64 images, clear on the left, of a colour of their own on the right."""
    files = {"emoji.json": json.dumps(emoji).encode(), "LICENSE": b"MIT"}
    names = [e["image"] for e in emoji if e["has_img_google"]] + ["1f603-1f3fb.png"]
    for number, name in enumerate(names):
        image = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
        image.paste((10 * number, 100, 200, 255), (32, 0, 64, 64))
        image.save(buffer := io.BytesIO(), "PNG")
        files[f"img/google/64/{name}"] = buffer.getvalue()
    return files


def tarball(path, files: dict[str, bytes]):
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def metadata(folder) -> dict[str, str]:
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    return {line["file_name"]: line["text"] for line in lines}


def npm(folder, script: str) -> None:
    """A stand-in for the npm client: ``$4`` is the folder of ``npm pack PACKAGE --pack-destination``."""
    path = folder / "npm"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


# -- Fashion-MNIST --


@pytest.mark.parametrize(("split", "count"), [("train", 25), ("test", 12)])
def test_fashion_mnist_is_the_idx_files_padded_with_black(tmp_path, fashion, split, count):
    assert prepare.prepare_fashion_mnist(tmp_path / "out", fashion, split) == count
    images = load_images(tmp_path / "out", resolution=32, channels=1)
    assert len(images) == count and images.captions
    raw = gzip.decompress((fashion / f"{'train' if split == 'train' else 't10k'}-images-idx3-ubyte.gz").read_bytes())
    raw = np.frombuffer(raw, np.uint8, offset=16).reshape(-1, 28, 28)
    for i in range(count):
        item = images.item(i, 0)
        pixels = ((item["pixel_values"][0] + 1) * 127.5).round().byte().numpy()
        number = pixels[2, 2]
        np.testing.assert_array_equal(pixels, np.pad(raw[number], 2))
        label = (count - 1 - number) % 10
        assert item["class_labels"] == label and item["caption"] == prepare.FASHION_CLASSES[label]


def test_fashion_folders_sort_in_the_order_of_the_labels(tmp_path, fashion):
    prepare.prepare_fashion_mnist(tmp_path / "out", fashion)
    names = load_images(tmp_path / "out", resolution=32, channels=1).class_names
    assert names == [f"{i}_{prepare.slug(c)}" for i, c in enumerate(prepare.FASHION_CLASSES)]
    assert names[0] == "0_t-shirt" and names[9] == "9_ankle-boot"


def test_wrong_idx_files_are_refused_with_the_remedy(tmp_path, fashion):
    labels = fashion / "train-labels-idx1-ubyte.gz"
    for content, message in (
        (b"", r"is no IDX file of bytes .*: fetch it again or pass another --source"),
        (idx(np.zeros((2, 2))), "is no IDX file of bytes"),
        (gzip.compress(bytes((0, 0, 8, 1, 0, 0, 0, 9, 1))), "is no IDX file of bytes"),
        (idx(np.zeros(7)), "has 25 images but 7 labels: pass another --source"),
        (idx(np.full(25, 11)), r"has labels above 9: pass another --source"),
    ):
        labels.write_bytes(content)
        with pytest.raises(DataError, match=message):
            prepare.prepare_fashion_mnist(tmp_path / "out", fashion)
    labels.unlink()
    with pytest.raises(DataError, match="is missing: `apt-get install dataset-fashion-mnist` or pass its folder"):
        prepare.prepare_fashion_mnist(tmp_path / "out", fashion)
    assert os.listdir(tmp_path) == ["idx"]


# -- emoji --


def test_captions_are_the_name_the_short_names_and_the_keywords_in_words(tmp_path):
    emoji = [
        entry(1, "RED APPLE", "Food & Drink", short_names=["apple"], subcategory="food-fruit"),
        entry(2, "THUMBS UP SIGN", "People & Body", short_names=["+1", "thumbsup"], subcategory="hand-fingers-closed"),
        entry(3, "DASH", "Objects", short_names=["dash"], subcategory="arts & crafts"),
        entry(4, "PLAIN", "Objects"),
    ]
    source = tarball(tmp_path / "emoji.tgz", emoji_files(emoji))
    assert prepare.prepare_noto_emoji(tmp_path / "out", source) == 4
    rows = [json.loads(line) for line in (tmp_path / "out/metadata.jsonl").read_text().splitlines()]
    assert {row["text"]: row["captions"] for row in rows} == {
        "red apple": ["red apple", "apple", "apple, food fruit"],
        "thumbs up sign": ["thumbs up sign", "+1", "thumbsup", "+1, hand fingers closed"],
        "dash": ["dash", "dash, arts crafts"],
        "plain": ["plain"],
    }
    images = load_images(tmp_path / "out", resolution=32, channels=3, caption_column="captions")
    assert set(images.all_captions()) == {caption for row in rows for caption in row["captions"]}


@pytest.mark.parametrize("kind", ["tarball", "folder", "parent"])
def test_emoji_are_the_base_forms_without_flags_and_skin_tones(tmp_path, kind):
    source = tarball(tmp_path / "emoji.tgz", emoji_files())
    if kind != "tarball":
        with tarfile.open(source) as tar:
            tar.extractall(tmp_path / "unpacked", filter="data")
        source = tmp_path / "unpacked" / ("package" if kind == "folder" else "")
    assert prepare.prepare_noto_emoji(tmp_path / "out", source) == 4
    images = load_images(tmp_path / "out", resolution=32, channels=3)
    assert images.class_names == ["0_smileys-and-emotion", "1_people-and-body", "2_food-and-drink"]
    items = [images.item(i, 0) for i in range(4)]
    assert {item["caption"]: item["class_labels"] for item in items} == KEPT


def test_emoji_are_composited_on_white_and_resized(tmp_path):
    source = tarball(tmp_path / "emoji.tgz", emoji_files())
    prepare.prepare_noto_emoji(tmp_path / "out", source, 16)
    (name,) = (name for name, text in metadata(tmp_path / "out").items() if text == "waffle")
    with Image.open(tmp_path / "out" / name) as image:
        assert image.mode == "RGB" and image.size == (16, 16)
        assert image.getpixel((0, 8)) == (255, 255, 255) and image.getpixel((15, 8)) == (50, 100, 200)


def test_wrong_packages_are_refused_with_the_remedy(tmp_path):
    files = emoji_files()
    for content, message in (
        ({"LICENSE": b""}, "has no emoji.json"),
        ({**files, "emoji.json": b"{"}, "has no emoji.json"),
        ({**files, "emoji.json": b'[{"name": "PIZZA"}]'}, "has no emoji.json .*: pass the tarball or folder of"),
        ({**files, f"img/google/64/{EMOJI[0]['image']}": b""}, "has no readable img/google/64/1f628.png: fetch emoji-"),
        ({k: v for k, v in files.items() if not k.startswith("img")}, "has no readable img/google/64/1f601.png"),
    ):
        source = tarball(tmp_path / "emoji.tgz", content)
        with pytest.raises(DataError, match=message):
            prepare.prepare_noto_emoji(tmp_path / "out", source)
    source.write_bytes(b"no tarball")
    with pytest.raises(DataError, match=r"is no tarball .*not a gzip file.*: `npm pack emoji-data.*` makes it"):
        prepare.prepare_noto_emoji(tmp_path / "out", source)
    with pytest.raises(DataError, match="does not exist: pass the tarball or folder"):
        prepare.prepare_noto_emoji(tmp_path / "out", tmp_path / "nowhere")
    assert os.listdir(tmp_path) == ["emoji.tgz"]


def test_without_a_source_npm_fetches_the_package(tmp_path, monkeypatch):
    source = tarball(tmp_path / "emoji.tgz", emoji_files())
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    npm(tmp_path, f'test "$1 $2 $3" = "pack {prepare.EMOJI_PACKAGE} --pack-destination" && cp {source} "$4"')
    assert prepare.prepare_noto_emoji(tmp_path / "out") == 4


def test_missing_or_failing_npm_is_said_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DataError, match=r"npm is not installed: install it, or pass the tarball of .* as --source"):
        prepare.prepare_noto_emoji(tmp_path / "out")
    npm(tmp_path, "echo 'npm error network is down' >&2; exit 1")
    with pytest.raises(DataError, match=r"failed \(npm error network is down\): fetch it elsewhere"):
        prepare.prepare_noto_emoji(tmp_path / "out")
    assert os.listdir(tmp_path) == ["npm"]


# -- the folder --


def test_folder_has_captions_and_the_licence(tmp_path, fashion):
    prepare.prepare_fashion_mnist(tmp_path / "fashion", fashion, "test")
    prepare.prepare_noto_emoji(tmp_path / "emoji", tarball(tmp_path / "emoji.tgz", emoji_files()))
    for name, count, words in (
        ("fashion", 12, ["12 grey images", "test split", "MIT licence", "Zalando"]),
        ("emoji", 4, ["4 emoji", "32x32", "Apache licence 2.0", "Google"]),
    ):
        folder = tmp_path / name
        readme = (folder / "README.md").read_text()
        assert all(word in readme for word in words) and "{" not in readme
        assert sorted(metadata(folder)) == sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.png"))
        assert len(metadata(folder)) == count


def test_captions_follow_the_convention_of_datasets(tmp_path, fashion, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    prepare.prepare_fashion_mnist(tmp_path / "out", fashion)
    data = datasets.load_dataset("imagefolder", data_dir=str(tmp_path / "out"), split="train")
    ours = load_images(tmp_path / "out", resolution=32, channels=1)
    assert sorted(data["text"]) == sorted(ours.item(i, 0)["caption"] for i in range(len(ours)))


def test_command_writes_the_folder_and_refuses_to_write_over_one(tmp_path, fashion, capsys):
    command = ["prepare", "fashion-mnist", "--output_dir", str(tmp_path / "deep" / "out"), "--source", str(fashion)]
    (tmp_path / "deep" / "out").mkdir(parents=True)  # an empty folder will do
    assert main(command) == 0
    assert capsys.readouterr().out == f"25 images in {tmp_path / 'deep' / 'out'}\n"
    before = sorted((tmp_path / "deep").rglob("*"))
    assert main(command) == 2
    assert "is not empty: remove it or pass a new folder." in capsys.readouterr().err
    assert sorted((tmp_path / "deep").rglob("*")) == before
    assert main([*command[:3], str(fashion / "train-labels-idx1-ubyte.gz")]) == 2
    assert "is a file: pass a new folder." in capsys.readouterr().err


def test_command_makes_the_emoji(tmp_path, capsys):
    source = tarball(tmp_path / "emoji.tgz", emoji_files())
    command = ["prepare", "noto-emoji", "--source", str(source), "--output_dir", str(tmp_path / "out")]
    assert main([*command, "--resolution", "0"]) == 2
    assert "--resolution must be at least 1, not 0." in capsys.readouterr().err
    assert main([*command, "--resolution", "24"]) == 0
    with Image.open(next((tmp_path / "out").rglob("*.png"))) as image:
        assert image.size == (24, 24)


def test_interrupted_writing_leaves_nothing(tmp_path):
    def pictures():
        yield prepare.Picture("a", "0.png", "zero", Image.new("L", (2, 2)))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare.write_folder(pictures(), tmp_path / "out", "")
    assert os.listdir(tmp_path) == []
