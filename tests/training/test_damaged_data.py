"""Data as people have it: damaged images, folders with loops and rubbish, captions in every form.  What can be used is
used, what cannot is named; which image it is does not matter."""

from __future__ import annotations

import codecs
import io
import itertools
import json
import os
import random
import unicodedata
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image
from training_helpers import RGB, common, picture, png, tiny_config, train_here, write

from diffusers_sde.training import framing
from diffusers_sde.training.data import DataError, batches, load_images
from diffusers_sde.training.framing import Framing, Unreadable, decoding, open_image, to_mode


def encoded(image: Image.Image, form: str, **options: object) -> bytes:
    image.save(buffer := io.BytesIO(), form, **options)
    return buffer.getvalue()


# -- damage --

DAMAGED = {
    "empty": b"",
    "text": b"no image",
    "cut off": png(picture(1, (64, 64)))[:100],
    "bomb": encoded(Image.new("1", (14000, 14000)), "PNG"),
}


@pytest.mark.parametrize("kind", DAMAGED)
@pytest.mark.parametrize("channels", [None, 3])
def test_it_does_not_matter_which_image_is_damaged(tmp_path, kind, channels):
    for place in range(3):
        names = [f"{'ab'[i % 2]}/{i}.png" for i in range(3)]
        folder = write(tmp_path / str(place), {name: picture(i) for i, name in enumerate(names)})
        (folder / names[place]).write_bytes(DAMAGED[kind])
        images = load_images(folder, resolution=8, channels=channels)
        assert len(images) == 2 and images.skipped == 1 and images.framing.channels == 3
        assert images.damage.lines[0].startswith(f"{names[place]}: ")


@pytest.mark.parametrize("first", ["grey", "damaged"])
def test_one_image_in_colour_makes_a_model_in_colour(tmp_path, first):
    files = {"0.png": picture(0, mode="L") if first == "grey" else b"", "1.png": picture(1, mode="L")}
    assert load_images(write(tmp_path, files), resolution=8, channels=None).framing.channels == 1
    assert load_images(write(tmp_path, {"2.png": picture(2)}), resolution=8, channels=None).framing.channels == 3


@pytest.mark.parametrize(
    ("form", "tag", "wrong"),
    [("JPEG", b"\x01\x1a\x00\x05", b"\x01\x1a\x00\x02"), ("TIFF", b"\x11\x01\x04\x00", b"\x11\x01\x02\x00")],
)
def test_a_wrong_tag_beside_that_of_the_orientation_is_damage_like_any_other(form, tag, wrong):
    """A text instead of a number, on which Pillow raises what it likes."""
    exif = Image.Exif()
    exif[0x0112], exif[0x011A] = 6, 72.5
    good = encoded(picture(9, (24, 16)), form, exif=exif)
    assert good.count(tag) == 1 and open_image(io.BytesIO(good)).getexif()[0x0112] == 6
    bad = io.BytesIO(good.replace(tag, wrong))
    with pytest.raises(Unreadable, match=r"^(TypeError|AttributeError|error): "), decoding(), open_image(bad) as image:
        Framing(8, 3).pixels(image)


def test_the_first_ten_are_named_in_a_file_with_all_that_are_found_later(tmp_path):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    damaged = {f"{i:02d}.png": b"" for i in range(8)} | {f"{i}.jpg": encoded(noise, "JPEG")[:1500] for i in range(4)}
    folder = write(tmp_path / "data", {**damaged, "good.png": picture(3)})
    images = load_images(folder, **RGB, cache_in_memory=False)  # by their headers the JPEGs are good
    assert images.skipped == 8
    file = tmp_path / "logs/names.txt"
    images.damage.name_in(file, begin=False)
    assert not file.exists()
    images.damage.name_in(file, begin=True)
    assert [line.split(":")[0] for line in file.read_text().splitlines()] == [f"{i:02d}.png" for i in range(8)]
    next(batches(images, batch_size=15, seed=0))
    assert images.skipped == 12
    later = {line.split(":")[0] for line in file.read_text().splitlines()[8:]}
    assert len(later) == 2 and later < {f"{i}.jpg" for i in range(4)}


def test_a_training_counts_and_names_what_it_skips(tmp_path, capsys):
    files = {f"{i}.png": picture(i, (16, 16), "L") for i in range(4)}
    folder = write(tmp_path / "data", {"a/-.png": b"", **{f"{'ab'[int(n[0]) % 2]}/{n}": i for n, i in files.items()}})
    arguments = common(folder, tmp_path / "out", tiny_config(tmp_path / "config"), 1)
    assert train_here(arguments) == 0
    said = capsys.readouterr().out
    assert "1 unreadable ones skipped" in said and "a 2, b 2" in said
    assert (tmp_path / "out/logs/unreadable_images.txt").read_text().startswith("a/-.png: UnidentifiedImageError")


def test_mutated_images_decode_or_are_unreadable():
    draw, source = random.Random(0), np.random.default_rng(0)
    pixels = Image.fromarray(source.integers(0, 256, (17, 24, 4), np.uint8))
    exif = Image.Exif()
    exif[0x0112], exif[0x011A] = 6, 72.5
    seeds = {
        form: encoded(pixels.convert("RGB"), form) for form in ("GIF", "BMP", "DIB", "PPM", "JPEG2000", "TGA", "PCX")
    }
    seeds |= {form: encoded(pixels.convert("RGB"), form, exif=exif) for form in ("JPEG", "MPO", "TIFF", "AVIF")}
    seeds |= {form: encoded(pixels, form, exif=exif) for form in ("PNG", "WEBP")} | {"ICO": encoded(pixels, "ICO")}
    assert len(seeds) == 14
    framings, decoded = (Framing(8, 3), Framing(8, 1, False)), dict.fromkeys(seeds, 0)
    for number, form in itertools.product(range(100), seeds):
        data = bytearray(seeds[form])
        for _ in range(number % 5):
            place = draw.randrange(min(len(data), 300))
            data[place : place + draw.randrange(3)] = draw.randbytes(draw.randrange(3))
        try:
            with decoding(), open_image(io.BytesIO(data)) as image:
                found = framings[number % 2].pixels(image)
        except Unreadable:
            continue
        assert min(found.shape[1:]) == 8 and found.dtype == np.uint8
        decoded[form] += 1
    assert min(decoded.values()) >= 20 and max(decoded.values()) < 100


def test_formats_that_start_programs_are_not_read(tmp_path):
    images = {"0.png": picture(0), "1.png": encoded(picture(1), "EPS")}
    assert load_images(write(tmp_path, images), **RGB).skipped == 1


@pytest.mark.parametrize("size", [(1, 30000), (60000, 1)])
@pytest.mark.parametrize("center_crop", [True, False])
def test_a_strip_costs_no_more_than_its_crop(monkeypatch, size, center_crop):
    """At 512 pixels a side, one of 1 x 30,000 would be 8 GB when scaled as a whole."""
    scaled = []
    resize = Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", lambda image, size, *a: scaled.append(size) or resize(image, size, *a))
    pixels = Framing(512, 3, center_crop).pixels(Image.new("L", size, 7))
    side = 512 if center_crop else 512 * framing.MAX_ASPECT
    assert sorted(pixels.shape[1:]) == [512, side] and (pixels == 7).all() and [max(s) for s in scaled] == [side]


def test_what_is_kept_is_the_middle_as_if_the_whole_was_scaled():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (31, 900), np.uint8))
    whole = np.array(image.resize((round(900 * 8 / 31), 8), Image.Resampling.LANCZOS), np.int64)
    for center_crop, width in ((True, 8), (False, 64)):
        left = (whole.shape[1] - width) // 2
        found = Framing(8, 1, center_crop).pixels(image)[0].astype(np.int64)
        assert np.abs(found - whole[:, left : left + width]).max() <= 1


def test_only_what_is_kept_is_composited(monkeypatch):
    """On white before or after the scaling is the same, within rounding."""
    composited = []
    composite = Image.alpha_composite
    monkeypatch.setattr(Image, "alpha_composite", lambda a, b: composited.append(b.size) or composite(a, b))
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 130, 4), np.uint8))
    found = Framing(8, 3).pixels(image.copy()).astype(np.int64)
    assert composited == [(8, 8)]
    expected = Framing(8, 3).pixels(to_mode(image, 3)).astype(np.int64)
    assert np.abs(found - expected).max() <= 2


# -- folders --


def test_no_folder_is_entered_twice_whatever_links_there_are(tmp_path):
    folder = write(tmp_path / "data", {f"{c}/{i}.png": picture(i) for c in "ab" for i in range(4)})
    outside = write(tmp_path / "outside", {"8.png": picture(8), "9.png": picture(9)})
    (folder / "a/up").symlink_to(folder)
    (folder / "a/there").symlink_to("../b")
    (folder / "b/there").symlink_to("../a")
    (folder / "b/itself").symlink_to("itself")
    for name in ("c", "d"):
        (folder / name).symlink_to(outside)
    (outside / "back").symlink_to(folder / "a")
    images = load_images(folder, **RGB)
    assert len(images) == 10 and images.class_names == ["a", "b", "c"] and images.class_counts() == [4, 4, 2]


RUBBISH = "@eaDir __MACOSX .DS_Store .thumbnails lost+found $RECYCLE.BIN .ipynb_checkpoints .Trash-1000 #recycle"


@pytest.mark.parametrize("name", [*RUBBISH.split(), "System Volume Information"])
def test_what_systems_leave_behind_is_no_class(tmp_path, name):
    files = {"a/0.png": picture(0), "b/1.png": picture(1), f"{name}/2.png": picture(2), f"a/{name}/0.png": picture(3)}
    images = load_images(write(tmp_path, files), **RGB)
    assert images.class_names == ["a", "b"] and len(images) == 2


def test_pipes_are_not_waited_for_and_links_to_nothing_are_skipped(tmp_path):
    write(tmp_path, {"a/0.png": picture(0), "b/1.png": picture(1)})
    os.mkfifo(tmp_path / "a/2.png")
    (tmp_path / "b/3.png").symlink_to("nowhere.png")
    images = load_images(tmp_path, **RGB)
    assert len(images) == 2 and images.damage.lines[0].startswith("b/3.png: FileNotFoundError")
    assert "1.png" in images.fingerprint()


def test_classes_may_lie_in_the_folder_of_the_split(tmp_path):
    images = load_images(write(tmp_path, {"train/a/0.png": picture(0), "train/b/1.png": picture(1)}), **RGB)
    assert images.class_names == ["a", "b"]


def test_a_dry_run_names_the_classes_with_their_counts(tmp_path, capsys):
    folder = write(
        tmp_path / "data", {"cat/0.png": picture(0), "cat/1.png": picture(1), os.fsdecode(b"\xff/2.png"): picture(2)}
    )
    arguments = common(folder, tmp_path / "out", None, 1, resolution=16, dry_run=True)
    assert train_here(arguments) == 0
    assert "cat 2, \\udcff 1" in capsys.readouterr().out


# -- captions --


def captions_of(folder: Path, **options: object) -> dict[int, set[str]]:
    """What each image, known by its value, is trained with."""
    images = load_images(folder, **RGB, **options)
    found: dict[int, set[str]] = {}
    for index, seed in itertools.product(range(len(images)), range(20)):
        item = images.item(index, seed)
        number = round((float(item["pixel_values"][0, 0, 0]) + 1) * 127.5)
        found.setdefault(number, set()).add(item["caption"])
    return found


def lines(*rows: object) -> bytes:
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode()


TWO = {"0.png": picture(0), "1.png": picture(1)}
ZERO, ONE = ({"file_name": f"{i}.png", "text": text} for i, text in enumerate(("zero", "one")))
PLAIN = {0: {"zero"}, 1: {"one"}}
FORMS = {
    "JSON lines": ({"metadata.jsonl": lines(ZERO, ONE)}, PLAIN),
    "null": ({"metadata.jsonl": lines(ZERO, {**ONE, "text": None})}, {0: {"zero"}, 1: {""}}),
    "list": ({"metadata.jsonl": lines(ZERO, {**ONE, "text": ["1", "one", None]})}, {0: {"zero"}, 1: {"1", "one"}}),
    "two rows": ({"metadata.jsonl": lines(ZERO, ONE, {**ONE, "text": "1"})}, {0: {"zero"}, 1: {"1", "one"}}),
    "separators": ({"metadata.jsonl": lines(ZERO, {**ONE, "text": "\u20281\x85"})}, {0: {"zero"}, 1: {"\u20281\x85"}}),
    "byte-order mark": ({"metadata.jsonl": codecs.BOM_UTF8 + lines(ZERO, ONE)}, PLAIN),
    "Windows": ({"metadata.jsonl": lines(ZERO, {**ONE, "file_name": ".\\1.png"}).replace(b"\n", b"\r\n")}, PLAIN),
    "CSV": ({"metadata.csv": b'file_name,text\n0.png,zero\n1.png,"one, ""two"""\n'}, {0: {"zero"}, 1: {'one, "two"'}}),
    "CSV with a mark": ({"metadata.csv": codecs.BOM_UTF8 + b"file_name, text\r\n0.png, zero\r\n1.png, one\r\n"}, PLAIN),
    "text files": ({"0.txt": codecs.BOM_UTF8 + b"zero\r\n", "1.txt": b"one", "readme.txt": b"\xff"}, PLAIN),
    "caption files": ({"0.caption": b"zero", "1.caption": b"one"}, PLAIN),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_captions_in_every_form_that_people_have(tmp_path, form):
    files, expected = FORMS[form]
    assert captions_of(write(tmp_path, {**TWO, **files})) == expected


@pytest.mark.parametrize("table", ["metadata.jsonl", "metadata.csv"])
def test_metadata_in_a_sub_folder_is_relative_to_it_and_goes_first(tmp_path, table):
    rows = {"metadata.jsonl": lines(ZERO, ONE), "metadata.csv": b"file_name,text\n0.png,zero\n1.png,one\n"}
    files = {f"train/{name}": image for name, image in TWO.items()} | {f"train/{table}": rows[table]}
    assert captions_of(write(tmp_path, files)) == PLAIN
    write(tmp_path, {"metadata.jsonl": lines({"file_name": "train/0.png", "text": "farther"})})
    assert captions_of(tmp_path) == PLAIN


@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC")])
@pytest.mark.parametrize("beside", [True, False])
def test_names_are_found_in_another_normal_form(tmp_path, forms, beside):
    there, here = (unicodedata.normalize(form, "Zoë") for form in forms)
    files = (
        {f"{here}.txt": b"one"} if beside else {"metadata.jsonl": lines({"file_name": f"{here}.png", "text": "one"})}
    )
    assert captions_of(write(tmp_path, {f"{there}.png": picture(1), **files})) == {1: {"one"}}


REFUSED = {
    "line 2: the caption False is no text": lines(ZERO, {**ONE, "text": False}),
    "line 2: the caption 7 is no text": lines(ZERO, {**ONE, "text": ["1", 7]}),
    "line 1: the caption {'en': 'one'} is no text": lines({**ONE, "text": {"en": "one"}}),
    r"line 1: the caption '\ud800' has half a surrogate": b'{"file_name": "0.png", "text": "\\ud800"}',
    "line 3: a list is no object": lines(ZERO, ONE, ["0.png", "zero"]),
    "line 1: a str is no object": lines("0.png"),
    "line 2: the row has no file_name": lines(ZERO, {"image": "1.png", "text": "one"}),
    "line 2 is not UTF-8": lines(ZERO) + b'\n{"file_name": "1.png", "text": "\xe9"}',
    "line 1 is not UTF-8": lines(ZERO, ONE).decode().encode("utf-16"),
    "line 2: Expecting": lines(ZERO) + b"\n{",
}
REFUSED_CSV = {
    "line 3: 3 values for 2 columns": b"file_name,text\n0.png,zero\n1.png,one, two\n",
    "line 1: the columns are name, text": b"name,text\n0.png,zero\n",
    "line 2: ": b'file_name,text\n0.png,"zero\n',
}


@pytest.mark.parametrize(
    ("table", "message", "content"),
    [("metadata.jsonl", m, c) for m, c in REFUSED.items()] + [("metadata.csv", m, c) for m, c in REFUSED_CSV.items()],
)
def test_other_captions_are_refused_with_file_and_line(tmp_path, table, message, content):
    with pytest.raises(DataError) as error:
        load_images(write(tmp_path, {**TWO, table: content}), **RGB)
    said = str(error.value)
    assert message in said and str(tmp_path / table) in said and "\n" not in said and said.endswith(".")


def test_images_without_a_caption_among_others_with_one_are_named(tmp_path):
    with pytest.raises(DataError, match=r"has no text file for 1\.png: add it, or remove the image"):
        load_images(write(tmp_path, {**TWO, "0.txt": b"zero"}), **RGB)
    with pytest.raises(DataError, match=r"has both metadata\.jsonl and metadata\.csv: keep one"):
        load_images(write(tmp_path, {"metadata.jsonl": b"", "metadata.csv": b""}), **RGB)


def test_captions_under_another_name_are_pointed_out(tmp_path):
    write(tmp_path, {**TWO, "metadata.jsonl": lines({"file_name": "0.png", "prompt": "zero"})})
    with pytest.warns(UserWarning, match="has no 'text': no captions are read; pass one of prompt as --caption_column"):
        assert not load_images(tmp_path, **RGB).captions


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_of_data_sets_are_like_lines_of_folders(tmp_path, monkeypatch, streaming):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def rows(name: str, captions: list, kind: object) -> str:
        features = datasets.Features({"image": datasets.Image(), "text": kind})
        values = {"image": [{"bytes": png(picture(i)), "path": None} for i in range(2)], "text": captions}
        (tmp_path / name).mkdir()
        datasets.Dataset.from_dict(values, features=features).to_parquet(tmp_path / name / "train.parquet")
        return str(tmp_path / name)

    text = datasets.Value("string")
    images = load_images(rows("lists", [["1", "one", None], None], datasets.List(text)), **RGB, streaming=streaming)
    found = next(batches(images, batch_size=60, seed=0))
    by_value = {
        (round(float(p[0, 0, 0]) * 127.5 + 127.5), c)
        for p, c in zip(found["pixel_values"], found["caption"], strict=True)
    }
    assert by_value == {(0, "1"), (0, "one"), (1, "")}
    for kind, values in (("bool", [False, False]), ("int64", [7, 7])):
        with pytest.raises(DataError, match=r"(row|position) 0: the caption (False|7) is no text"):
            next(
                batches(
                    load_images(rows(kind, values, datasets.Value(kind)), **RGB, streaming=streaming),
                    batch_size=1,
                    seed=0,
                )
            )


def test_columns_that_are_not_used_are_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    features = datasets.Features({"image": datasets.Image(), "mask": datasets.Image()})
    values = {"image": [{"bytes": png(picture(1)), "path": None}], "mask": [{"bytes": b"damaged", "path": None}]}
    (tmp_path / "rows").mkdir()
    datasets.Dataset.from_dict(values, features=features).to_parquet(tmp_path / "rows/train.parquet")
    assert load_images(str(tmp_path / "rows"), **RGB).skipped == 0


# -- one class --


@pytest.mark.parametrize("classes", [1, 2])
def test_the_snippet_of_a_card_asks_only_for_classes_that_there_are(tmp_path, monkeypatch, classes):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    names = ["first", "second"][:classes]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    values = {"image": [{"bytes": png(picture(i, (16, 16), "L")), "path": None} for i in range(4)], "label": [0] * 4}
    (tmp_path / "rows").mkdir()
    datasets.Dataset.from_dict(values, features=features).to_parquet(tmp_path / "rows/train.parquet")
    arguments = common(None, tmp_path / "out", tiny_config(tmp_path / "config"), 1, dataset_name=tmp_path / "rows")
    assert train_here([a for a in arguments if a]) == 0
    card = (tmp_path / "out/README.md").read_text()
    assert f"pipe({names}, " in card
    config = json.loads((tmp_path / "out/unet/config.json").read_text())
    assert config["num_class_embeds"] == classes + 1 and config["_class_names"] == names
