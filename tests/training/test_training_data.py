"""Training data: the order is a function of (seed, position), images arrive as they are, and what is wrong is said."""

from __future__ import annotations

import io
import itertools
import json
import pickle
import random
import warnings
from collections.abc import Sequence

import datasets
import fsspec
import helpers  # noqa: F401 (the profile of hypothesis)
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, VQModel
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image
from training_helpers import RGB, picture, png, write

from diffusers_sde.training import hub_data
from diffusers_sde.training import latents as latents_module
from diffusers_sde.training.data import DataError, batches, cache_latents, load_images, sample_seed
from diffusers_sde.training.framing import Framing, to_mode
from diffusers_sde.training.samples import TrainingData


def ramp(width: int, height: int) -> Image.Image:
    """A grey image whose value is 10 times the column."""
    return Image.fromarray(np.tile(10 * np.arange(width, dtype=np.uint8), (height, 1)))


def value(item) -> int:
    """The number that :func:`picture` was made with."""
    return round((float(item["pixel_values"][0, 0, 0]) + 1) * 127.5)


def first(n: int, images: TrainingData, **kwargs) -> list[dict]:
    return list(itertools.islice(batches(images, **{"batch_size": 4, "seed": 0, **kwargs}), n))


def same(left: dict, right: dict) -> bool:
    return left.keys() == right.keys() and all(
        torch.equal(a, right[k]) if isinstance(a, torch.Tensor) else a == right[k] for k, a in left.items()
    )


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """Eleven wide images in two classes with captions, to be cropped and flipped at random."""
    folder = tmp_path_factory.mktemp("wide")
    names = [f"{'ab'[i % 2]}/{i:02d}.png" for i in range(11)]
    write(folder, {name: ramp(20, 8).point(lambda v, i=i: v + i) for i, name in enumerate(names)})
    lines = [json.dumps({"file_name": name, "text": f"caption {name}"}) for name in names]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def cropped(wide):
    return load_images(wide, resolution=8, channels=1, center_crop=False, random_flip=True)


# -- the order --


class Numbers(TrainingData):
    """Items that are nothing but their number and seed."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def item(self, index: int, seed: int) -> dict:
        return {"index": index, "seed": seed}


@given(st.integers(1, 30), st.integers(1, 7), st.integers(1, 4), st.integers(0, 40), st.integers(0, 2**31))
@example(3, 7, 2, 5, 0)  # a batch that spans epochs
def test_order_is_stateless_and_its_slices_are_the_ranks(length, batch_size, world_size, first_batch, seed):
    """Global batch b is positions bG ... (b+1)G - 1, cut into contiguous slices of the ranks, whatever came before."""
    samples, total = Numbers(length), batch_size * world_size
    whole = first(first_batch + 2, samples, batch_size=total, seed=seed)[first_batch:]
    for b, batch in enumerate(whole, start=first_batch):
        assert batch["positions"].tolist() == list(range(b * total, (b + 1) * total))
    ranks = [
        first(2, samples, batch_size=batch_size, seed=seed, rank=r, world_size=world_size, first_batch=first_batch)
        for r in range(world_size)
    ]
    for b in range(2):
        assert all(torch.equal(torch.cat([r[b][key] for r in ranks]), whole[b][key]) for key in whole[b])


@given(st.integers(1, 40), st.integers(0, 2**31))
def test_every_epoch_is_a_permutation_of_its_own(length, seed):
    batch = first(1, Numbers(length), batch_size=3 * length, seed=seed)[0]
    epochs = batch["index"].reshape(3, length)
    assert all(sorted(epoch.tolist()) == list(range(length)) for epoch in epochs)
    assert len(set(batch["seed"].tolist())) == 3 * length
    if length > 12:  # two equal ones have a chance of 1/12!
        assert len({tuple(epoch.tolist()) for epoch in epochs}) == 3


def test_seeds_change_the_order_and_the_crops(cropped):
    a, b = first(1, cropped, seed=0)[0], first(1, cropped, seed=1)[0]
    assert not torch.equal(a["pixel_values"], b["pixel_values"])
    assert sample_seed(0, 1) != sample_seed(1, 0)


def test_resumed_batches_are_the_uninterrupted_ones(cropped):
    whole = first(9, cropped)
    assert all(same(a, b) for a, b in zip(whole[5:], first(4, cropped, first_batch=5), strict=True))


def test_two_processes_see_what_one_with_the_doubled_batch_sees(cropped):
    one = first(4, cropped, batch_size=6)
    two = [first(4, cropped, batch_size=3, rank=rank, world_size=2) for rank in (0, 1)]
    for whole, left, right in zip(one, *two, strict=True):
        assert torch.equal(whole["pixel_values"], torch.cat([left["pixel_values"], right["pixel_values"]]))
        assert whole["caption"] == left["caption"] + right["caption"]


def test_workers_change_nothing(wide, cropped):
    uncached = load_images(wide, resolution=8, channels=1, center_crop=False, random_flip=True, cache_in_memory=False)
    alone = first(7, cropped, first_batch=2)
    for images, workers in ((cropped, 2), (uncached, 0), (uncached, 3)):
        other = first(7, images, first_batch=2, num_workers=workers)
        assert all(same(a, b) for a, b in zip(alone, other, strict=True))


def test_images_are_cheap_to_pickle_and_survive_it(cropped):
    copy = pickle.loads(pickle.dumps(cropped))
    assert same(cropped.item(3, 5), copy.item(3, 5))


# -- what an item is --


def test_folder_items_have_pixels_class_and_caption(cropped):
    batch = first(1, cropped, batch_size=11)[0]
    assert cropped.class_names == ["a", "b"] and cropped.captions and cropped.skipped == 0
    assert batch["pixel_values"].shape == (11, 1, 8, 8) and batch["pixel_values"].dtype == torch.float32
    assert batch["class_labels"].dtype == torch.int64 and batch["positions"].dtype == torch.int64
    assert all(c.startswith(f"caption {'ab'[n]}") for c, n in zip(batch["caption"], batch["class_labels"], strict=True))


def test_flat_folder_has_neither_classes_nor_captions(tmp_path):
    images = load_images(write(tmp_path, {f"{i}.png": picture(i) for i in range(3)}), **RGB)
    assert images.class_names is None and not images.captions
    assert set(images.item(0, 0)) == {"pixel_values"}
    assert [value(images.item(i, 0)) for i in range(3)] == [0, 1, 2]


def test_one_sub_folder_and_hidden_files_make_no_classes(tmp_path):
    write(tmp_path, {"only/1.png": picture(1), ".hidden/2.png": picture(2), "only/.3.png": picture(3)})
    images = load_images(tmp_path, **RGB)
    assert images.class_names is None and len(images) == 1


def test_labels_are_the_sorted_class_folders_however_deep_the_files(tmp_path):
    write(tmp_path, {"b/1.png": picture(1), "a/deep/0.png": picture(0), "c/2.JPEG": picture(2)})
    images = load_images(tmp_path, **RGB)
    assert images.class_names == ["a", "b", "c"]
    assert [images.item(i, 0)["class_labels"] for i in range(3)] == [0, 1, 2]


@pytest.mark.parametrize("channels", [1, 3])
def test_values_are_the_pixels_from_minus_one_to_one(tmp_path, channels):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, channels), np.uint8)
    pixels[0, 0], pixels[0, 1] = 0, 255
    images = load_images(write(tmp_path, {"0.png": Image.fromarray(pixels.squeeze())}), resolution=8, channels=channels)
    x = images.item(0, 0)["pixel_values"]
    assert x[0, 0, 0] == -1 and x[0, 0, 1] == 1
    np.testing.assert_array_equal(((x + 1) * 127.5).round().byte().permute(1, 2, 0).numpy(), pixels)


def test_transparency_is_composited_on_white():
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (255, 0, 0, 128))
    assert [to_mode(image, 3).getpixel((i, 0)) for i in (0, 1)] == [(255, 255, 255), (255, 127, 127)]
    assert to_mode(image.convert("LA"), 1).getpixel((0, 0)) == 255
    palette = image.convert("RGB").convert("P")
    palette.info["transparency"] = palette.getpixel((0, 0))
    assert to_mode(palette, 3).getpixel((0, 0)) == (255, 255, 255)


def test_sixteen_bits_are_scaled_to_eight():
    image = Image.fromarray(np.array([[0, 65535, 32768]], np.uint16))
    assert [to_mode(image, 1).getpixel((i, 0)) for i in range(3)] == [0, 255, 128]


def test_orientation_of_cameras_is_applied():
    image, exif = ramp(8, 8), Image.Exif()
    exif[0x0112] = 3  # rotated by 180 degrees
    image.save(buffer := io.BytesIO(), "PNG", exif=exif)
    buffer.seek(0)
    np.testing.assert_array_equal(Framing(8, 1).pixels(Image.open(buffer))[0], np.asarray(image)[::-1, ::-1])


@pytest.mark.parametrize("size", [(3, 5), (5, 3), (8, 8), (40, 31), (9, 1000)])
@pytest.mark.parametrize("center_crop", [True, False])
def test_every_size_becomes_the_resolution(size, center_crop):
    framing = Framing(8, 3, center_crop)
    pixels = torch.from_numpy(framing.pixels(picture(40, size)))
    assert min(pixels.shape[1:]) == 8
    x = framing.tensor(pixels, 0)
    assert x.shape == (3, 8, 8)
    assert value({"pixel_values": x}) == 40 and x.std(dim=(1, 2)).max() == 0


def test_crops_are_central_or_anywhere(tmp_path):
    folder = write(tmp_path, {"0.png": ramp(20, 8)})

    def left(center_crop, seed):
        image = load_images(folder, resolution=8, channels=1, center_crop=center_crop).item(0, seed)
        return value(image) // 10

    assert {left(True, seed) for seed in range(5)} == {6}
    assert {left(False, seed) for seed in range(150)} == set(range(13))


def test_flips_are_off_by_default_and_half_of_all_when_on(tmp_path):
    folder = write(tmp_path, {"0.png": ramp(8, 8)})
    plain, flipping = (load_images(folder, resolution=8, channels=1, random_flip=f) for f in (False, True))
    ahead = plain.item(0, 0)["pixel_values"]
    assert all(torch.equal(plain.item(0, s)["pixel_values"], ahead) for s in range(20))
    flips = sum(torch.equal(flipping.item(0, s)["pixel_values"], ahead.flip(-1)) for s in range(400))
    assert abs(flips - 200) < 50  # five standard deviations


# -- what is wrong --


def test_unreadable_images_are_skipped_with_their_count(tmp_path):
    good = png(picture(9, (64, 64)))
    files = {"a/0.png": b"", "a/1.png": picture(1), "b/2.png": b"no image", "b/3.png": picture(3), "b/4.png": good[:90]}
    write(tmp_path, files)
    with pytest.warns(UserWarning, match=r"^3 unreadable images of .* are skipped\.$"):
        images = load_images(tmp_path, **RGB)
    assert (len(images), images.skipped, images.class_names) == (2, 3, ["a", "b"])
    assert [(value(item), item["class_labels"]) for item in (images.item(0, 0), images.item(1, 0))] == [(1, 0), (3, 1)]


def test_images_damaged_behind_their_header_are_replaced_by_the_next(tmp_path):
    """Without the cache only headers are read at the start: a JPEG that ends early shows when it is needed."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    noise.save(buffer := io.BytesIO(), "JPEG")
    write(tmp_path, {"a/0.jpg": buffer.getvalue()[:1500], "b/1.png": picture(1)})
    with pytest.warns(UserWarning, match="1 unreadable image"):
        assert len(load_images(tmp_path, **RGB)) == 1
    images = load_images(tmp_path, **RGB, cache_in_memory=False)
    assert len(images) == 2
    with pytest.warns(UserWarning, match="damaged, the next takes its place"):
        item = images.item(0, 0)
    assert value(item) == item["class_labels"] == 1


METADATA_LINE = b'{"file_name": "0.png", "text": "zero"}\n'
WRONG = {
    "no images: pass a folder that has some": {"readme.txt": b"nothing"},
    "None of the 2 images of .* can be read: pass other data": {"0.png": b"", "1.png": b""},
    "sub-folders test, train are splits, not classes: pass one": {"train/0.png": picture(0), "test/0.png": picture(0)},
    "has no 'text' for 1.png: add the line": {
        "0.png": picture(0),
        "1.png": picture(1),
        "metadata.jsonl": METADATA_LINE,
    },
    "is not JSON lines with a file_name each": {"0.png": picture(0), "metadata.jsonl": b"{"},
    "not JSON lines with a file_name": {"0.png": picture(0), "metadata.jsonl": b'{"name": "0.png", "text": "zero"}'},
}


@pytest.mark.parametrize("message", WRONG)
def test_unusable_folders_are_refused_with_the_remedy(tmp_path, message):
    with pytest.raises(DataError, match=message) as error:
        load_images(write(tmp_path, WRONG[message]), **RGB)
    assert str(error.value).endswith(".") and "\n" not in str(error.value)


def test_missing_sources_are_refused_with_the_remedy(tmp_path):
    with pytest.raises(DataError, match="does not exist: pass a folder of images or the name of a data set"):
        load_images(tmp_path / "nowhere", **RGB)
    with pytest.raises(DataError, match="is a file: pass the folder that it is in"):
        load_images(write(tmp_path, {"0.png": picture(0)}) / "0.png", **RGB)
    with pytest.raises(DataError, match=r"no folder of images and no data set .*: check the name, or the connection"):
        load_images("nobody/such-data-set", **RGB)


@pytest.mark.parametrize(
    ("wrong", "message"), [({"resolution": 0}, "at least 1"), ({"channels": 4}, "1 or 3 channels, not 4")]
)
def test_wrong_framing_is_refused(tmp_path, wrong, message):
    with pytest.raises(DataError, match=message):
        load_images(tmp_path, **{**RGB, **wrong})


def test_metadata_without_captions_is_no_error(tmp_path):
    images = load_images(write(tmp_path, {"0.png": picture(0), "metadata.jsonl": METADATA_LINE}), **RGB)
    assert images.item(0, 0)["caption"] == "zero"
    assert not load_images(tmp_path, **RGB, caption_column="other").captions


# -- data sets --


def table(path, columns: dict[str, Sequence], features: dict | None = None, shards: int = 1):
    """A folder of Parquet files, as a repository of the Hub has it; images are those of their numbers."""
    columns = {**columns, "image": [i if i is None else {"bytes": i, "path": None} for i in columns["image"]]}
    full = datasets.Features({"image": datasets.Image(decode=False), **(features or {})})
    data = datasets.Dataset.from_dict({k: columns[k] for k in full}, features=full)
    for i in range(shards):
        part = data.shard(shards, i).cast_column("image", datasets.Image())
        part.to_parquet(path / f"train-{i:05d}-of-{shards:05d}.parquet")
    return path


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "repository"
    folder.mkdir()
    return folder


LABELLED = {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["dog", "cat"])}


def labelled(n: int) -> dict[str, list]:
    return {
        "image": [png(picture(i)) for i in range(n)],
        "text": [f"picture {i}" for i in range(n)],
        "label": [i % 2 for i in range(n)],
    }


def test_data_set_items_are_those_of_a_folder(hub):
    images = load_images(str(table(hub, labelled(5), LABELLED)), **RGB)
    assert images.class_names == ["dog", "cat"] and images.captions and len(images) == 5
    for i in range(5):
        item = images.item(i, 0)
        assert (value(item), item["class_labels"], item["caption"]) == (i, i % 2, f"picture {i}")


@pytest.mark.parametrize("cache_in_memory", [True, False])
def test_damaged_rows_of_data_sets_are_skipped(hub, cache_in_memory):
    columns = labelled(5)
    columns["image"][1], columns["image"][2] = b"no image", None
    with pytest.warns(UserWarning, match="2 unreadable images"):
        images = load_images(str(table(hub, columns, LABELLED)), **RGB, cache_in_memory=cache_in_memory)
    assert [(value(images.item(i, 0)), images.item(i, 0)["class_labels"]) for i in range(3)] == [(0, 0), (3, 1), (4, 0)]
    assert all(same(a, b) for a, b in zip(first(3, images), first(3, images, num_workers=2), strict=True))


@pytest.mark.parametrize(("values", "kind"), [([7, 3, 7], "int64"), (["dog", "cat", "dog"], "string")])
def test_labels_without_names_are_numbered_in_sorted_order(hub, values, kind):
    columns = {"image": labelled(3)["image"], "kind": values}
    images = load_images(str(table(hub, columns, {"kind": datasets.Value(kind)})), **RGB, label_column="kind")
    assert images.class_names == [str(v) for v in sorted(set(values))]
    assert [images.class_names[images.item(i, 0)["class_labels"]] for i in range(3)] == [str(v) for v in values]


def test_one_of_several_captions_is_drawn_and_none_is_empty(hub):
    columns = {"image": labelled(2)["image"], "text": [["left", "right"], None]}
    images = load_images(str(table(hub, columns, {"text": datasets.List(datasets.Value("string"))})), **RGB)
    assert {images.item(0, seed)["caption"] for seed in range(20)} == {"left", "right"}
    assert images.item(1, 0)["caption"] == ""


def test_wrong_columns_are_refused_with_the_remedy(hub):
    source = str(table(hub, {**labelled(2), "label": [0, -1]}, LABELLED))
    for streaming in (False, True):
        with pytest.raises(DataError, match="has no column 'img': pass one of image, text, label as --image_column"):
            load_images(source, **RGB, image_column="img", streaming=streaming)
        with pytest.raises(DataError, match=r"'label' of .* holds no images .*: pass another --image_column"):
            load_images(source, **RGB, image_column="label", streaming=streaming)
        with pytest.raises(DataError, match="rows without a label: remove them or pass another --label_column"):
            first(1, load_images(source, **RGB, streaming=streaming))
    with pytest.raises(DataError, match=r"'image' of .* has no labels: pass another --label_column"):
        load_images(source, **RGB, label_column="image")


def test_images_named_by_paths_are_opened_wherever_they_are():
    """Streams of image folders name files that are remote or in archives."""
    with fsspec.open("memory://folder/0.png", "wb") as file:
        file.write(png(picture(3)))
    image = hub_data.open_encoded({"bytes": None, "path": "memory://folder/0.png"})
    assert image.getpixel((0, 0)) == (3, 252, 7)


# -- streams --


@pytest.fixture
def stream(hub):
    return load_images(str(table(hub, labelled(10), LABELLED, shards=2)), **RGB, streaming=True)


def test_stream_has_the_items_and_epochs_of_the_data_set(stream):
    assert stream.class_names == ["dog", "cat"] and stream.captions
    batch = first(1, stream, batch_size=30)[0]
    numbers = ((batch["pixel_values"][:, 0, 0, 0] + 1) * 127.5).round().long()
    assert all(sorted(epoch.tolist()) == list(range(10)) for epoch in numbers.reshape(3, 10))
    assert len({tuple(epoch.tolist()) for epoch in numbers.reshape(3, 10)}) == 3
    assert torch.equal(batch["class_labels"], numbers % 2)
    assert batch["caption"] == [f"picture {i}" for i in numbers]


def test_stream_resumes_slices_and_reads_in_a_worker_like_a_folder(stream):
    whole = first(8, stream, batch_size=6)
    assert all(same(a, b) for a, b in zip(whole[5:], first(3, stream, batch_size=6, first_batch=5), strict=True))
    assert all(same(a, b) for a, b in zip(whole, first(8, stream, batch_size=6, num_workers=2), strict=True))
    ranks = [first(8, stream, batch_size=3, rank=r, world_size=2) for r in (0, 1)]
    for batch, left, right in zip(whole, *ranks, strict=True):
        assert torch.equal(batch["pixel_values"], torch.cat([left["pixel_values"], right["pixel_values"]]))
        assert torch.equal(batch["positions"], torch.cat([left["positions"], right["positions"]]))


@given(st.integers(0, 40), st.integers(1, 12), st.integers(0, 99))
def test_shuffling_in_a_buffer_loses_and_doubles_nothing(n, size, seed):
    out = list(hub_data.shuffled(range(n), size, random.Random(seed)))
    assert sorted(out) == list(range(n))
    assert all(row <= place + size for place, row in enumerate(out))


def test_stream_gives_the_next_image_for_a_damaged_one_in_every_process(hub):
    columns = labelled(10)
    columns["image"][3] = columns["image"][7] = b"no image"
    stream = load_images(str(table(hub, columns, LABELLED)), **RGB, streaming=True)
    with pytest.warns(UserWarning, match="damaged and skipped"):
        whole = first(5, stream, batch_size=4)
    assert stream.skipped >= 2
    numbers = torch.cat([b["pixel_values"][:, 0, 0, 0] for b in whole])
    assert len(numbers) == 20 and not {3, 7} & {round((float(n) + 1) * 127.5) for n in numbers}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for rank in (0, 1):
            for batch, part in zip(whole, first(5, stream, batch_size=2, rank=rank, world_size=2), strict=True):
                mine = slice(2 * rank, 2 * rank + 2)
                assert torch.equal(batch["pixel_values"][mine], part["pixel_values"])


def test_stream_without_a_readable_image_is_given_up(hub, monkeypatch):
    monkeypatch.setattr(hub_data, "MAX_UNREADABLE_RUN", 5)
    stream = load_images(str(table(hub, {**labelled(2), "image": [b"", b""]}, LABELLED)), **RGB, streaming=True)
    with pytest.raises(DataError, match=r"5 images of .* in a row are damaged: pass other data"):
        first(1, stream)


def test_stream_has_no_length_and_no_numbers(stream):
    with pytest.raises(TypeError, match="pass --max_train_steps"):
        len(stream)
    with pytest.raises(TypeError, match="only found in order"):
        stream.item(0, 0)


def test_streamed_folder_is_read_when_needed(wide):
    streamed = load_images(wide, resolution=8, channels=1, streaming=True)
    cached = load_images(wide, resolution=8, channels=1)
    assert all(same(a, b) for a, b in zip(first(3, streamed), first(3, cached), strict=True))


# -- latents --


def tiny_vae(kind=AutoencoderKL, **config):
    torch.manual_seed(0)
    return kind(
        in_channels=3, out_channels=3, block_out_channels=(4, 4), norm_num_groups=2, latent_channels=2,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, **config,
    ).eval()  # fmt: skip


@pytest.fixture
def numbered(tmp_path):
    files = {
        f"{'ab'[i % 2]}/{i}.png": ramp(8, 8).rotate(90 * (i % 4)).point(lambda v, i=i: v + 20 * i) for i in range(7)
    }
    return write(tmp_path / "numbered", files)


def test_cached_latents_are_the_scaled_draws_of_the_encoder(tmp_path, numbered):
    """``(mean + std eps - shift_factor) scaling_factor`` with eps of the sample's seed."""
    images, vae = load_images(numbered, **RGB), tiny_vae(scaling_factor=0.3, shift_factor=0.2)
    cached = cache_latents(images, vae, directory=tmp_path / "latents", batch_size=3, progress=False)
    assert cached.class_names == ["a", "b"] and len(cached) == 7 and not cached.captions
    for i in range(7):
        item, plain = cached.item(i, 11), images.item(i, 11)
        with torch.no_grad():
            posterior = vae.encode(plain["pixel_values"][None]).latent_dist
        eps = torch.randn(1, 2, 4, 4, generator=torch.Generator().manual_seed(11))
        expected = (posterior.mean + posterior.std * eps - 0.2) * 0.3
        torch.testing.assert_close(item["latents"], expected[0], rtol=1e-5, atol=1e-5)
        assert set(item) == {"latents", "class_labels"} and item["class_labels"] == plain["class_labels"]
    assert not torch.equal(cached.item(0, 1)["latents"], cached.item(0, 2)["latents"])


def test_cached_latents_come_in_the_order_of_the_images_with_any_workers(tmp_path, numbered):
    images = load_images(numbered, **RGB)
    cached = cache_latents(images, tiny_vae(), directory=tmp_path / "latents", progress=False)
    ours, theirs = first(5, cached), first(5, images)
    assert all(torch.equal(a["class_labels"], b["class_labels"]) for a, b in zip(ours, theirs, strict=True))
    assert all(same(a, b) for a, b in zip(ours, first(5, cached, num_workers=2), strict=True))


def test_latents_are_encoded_once_and_anew_when_anything_changes(tmp_path, numbered, monkeypatch):
    directory, images, vae = tmp_path / "latents", load_images(numbered, **RGB), tiny_vae()
    encoded = []
    monkeypatch.setattr(
        latents_module, "encoder_output", lambda v, x, f=latents_module.encoder_output: encoded.append(1) or f(v, x)
    )

    def encodes(images, vae):
        encoded.clear()
        cache_latents(images, vae, directory=directory, progress=False)
        return bool(encoded)

    assert encodes(images, vae)
    assert not encodes(load_images(numbered, **RGB), tiny_vae())
    assert encodes(load_images(numbered, **RGB | {"resolution": 16}), vae)
    assert encodes(images, tiny_vae(scaling_factor=0.5))
    other = tiny_vae()
    other.encoder.conv_in.weight.data[0, 0, 0, 0] += 1
    assert encodes(images, other)
    write(numbered, {"a/0.png": picture(200, (9, 9))})
    assert encodes(load_images(numbered, **RGB), vae)


def test_interrupted_encoding_goes_on_where_it_was(tmp_path, numbered, monkeypatch):
    monkeypatch.setattr(latents_module, "SHARD", 3)
    directory, images, vae = tmp_path / "latents", load_images(numbered, **RGB), tiny_vae()
    calls, encode = [], latents_module.encoder_output

    def failing(vae, pixels):
        calls.append(len(pixels))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return encode(vae, pixels)

    monkeypatch.setattr(latents_module, "encoder_output", failing)
    with pytest.raises(KeyboardInterrupt):
        cache_latents(images, vae, directory=directory, progress=False)
    assert [p.name for p in directory.rglob("*") if p.is_file()] == ["00000.safetensors"]
    cached = cache_latents(images, vae, directory=directory, progress=False)
    assert calls == [3, 3, 3, 1]  # the first shard is not encoded again
    monkeypatch.setattr(latents_module, "SHARD", 1024)
    whole = cache_latents(images, vae, directory=tmp_path / "whole", progress=False)
    monkeypatch.setattr(latents_module, "SHARD", 3)
    parts = [cached.item(i, i)["latents"] for i in range(7)]
    monkeypatch.setattr(latents_module, "SHARD", 1024)
    for i, part in enumerate(parts):
        torch.testing.assert_close(part, whole.item(i, i)["latents"], rtol=1e-5, atol=1e-5)


def test_deterministic_encoders_have_latents_without_noise(tmp_path, numbered):
    images, vae = load_images(numbered, **RGB), tiny_vae(VQModel, num_vq_embeddings=8, scaling_factor=0.5)
    cached = cache_latents(images, vae, directory=tmp_path / "latents", progress=False)
    with torch.no_grad():
        expected = 0.5 * vae.encode(images.item(2, 0)["pixel_values"][None]).latents[0]
    torch.testing.assert_close(cached.item(2, 1)["latents"], expected, rtol=1e-5, atol=1e-5)


def test_latents_of_damaged_images_keep_the_label_of_what_was_encoded(tmp_path):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    noise.save(buffer := io.BytesIO(), "JPEG")
    images = load_images(
        write(tmp_path, {"a/0.jpg": buffer.getvalue()[:1500], "b/1.png": picture(1)}), **RGB, cache_in_memory=False
    )
    with pytest.warns(UserWarning, match="damaged"):
        cached = cache_latents(images, tiny_vae(), directory=tmp_path / "latents", progress=False)
    assert cached.item(0, 0)["class_labels"] == 1
    assert torch.equal(cached.item(0, 0)["latents"], cached.item(1, 0)["latents"])


def test_what_cannot_be_encoded_once_is_refused(tmp_path, numbered, stream):
    for images, message in (
        (stream, "A stream cannot be encoded once"),
        (load_images(numbered, **RGB, random_flip=True), "leave out the caching of latents or --random_flip"),
    ):
        with pytest.raises(DataError, match=message):
            cache_latents(images, tiny_vae(), directory=tmp_path / "latents")
    assert not (tmp_path / "latents").exists()
