"""Training on text: what sequences hold, what the loss is, and that the result is a model that writes."""

import json
import math

import diffusers
import numpy as np
import pytest
import torch
import transformers
from training_helpers import common, losses, train_here

from diffusers_sde import EmbeddingTextModel, MaskedDiffusionScheduler
from diffusers_sde.methods.word_embeddings import embedding_denoiser, words_of
from diffusers_sde.training import language
from diffusers_sde.training.arguments import read_settings
from diffusers_sde.training.framing import DataError
from diffusers_sde.training.sequences import character_tokenizer, pack, pair, read_documents

BERT = {
    "model_type": "bert", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
    "max_position_embeddings": 16,
}  # fmt: skip


@pytest.fixture
def texts(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "b.txt").write_text("the cat sat on the mat\n" * 20)
    (folder / "a.txt").write_text("a dog ran\nfar away")
    return folder


@pytest.fixture
def config(tmp_path):
    file = tmp_path / "bert.json"
    file.write_text(json.dumps(BERT))
    return file


def arguments(texts, output, config, steps=4, **options):
    values = {"objective": "masked", "sequence_length": 16, "model_config": config, **options}
    return common(texts, output, None, steps, **values)


# -- sequences --


def test_files_are_packed_in_order_and_nothing_is_lost(texts):
    documents, prefixes = read_documents(str(texts), "text", None)
    assert prefixes is None and documents[0] == "a dog ran\nfar away"
    tokenizer = character_tokenizer(documents)
    data = pack(tokenizer, documents, 16)
    whole = "a dog ran\nfar away\n" + "the cat sat on the mat\n" * 20
    assert tokenizer.decode(data.ids.flatten()) == whole[: len(whole) // 16 * 16]
    assert tokenizer.decode(tokenizer("the mat\n", add_special_tokens=False).input_ids) == "the mat\n"
    assert tokenizer("q").input_ids == [tokenizer.unk_token_id]


def test_a_column_with_prefixes_is_paired_and_filled_up_with_the_end(tmp_path):
    rows = [{"text": "meow", "animal": "cat"}, {"text": "a very long bark", "animal": "dog"}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    texts, prefixes = read_documents(str(tmp_path), "text", "animal")
    tokenizer = character_tokenizer([*texts, *prefixes, "\n"])
    data = pair(tokenizer, prefixes, texts, 12)
    assert tokenizer.decode(data.ids[0]) == "cat\nmeow" + 4 * "[PAD]" and data.item(0, 0)["prefix_length"] == 4
    assert tokenizer.decode(data.ids[1]) == "dog\na very l"
    with pytest.raises(DataError, match="sequence_length"):
        pair(tokenizer, prefixes, texts, 4)
    with pytest.raises(DataError, match="'sound'"):
        read_documents(str(tmp_path), "sound", None)


# -- the loss --


def test_as_many_positions_are_masked_as_were_drawn_and_never_a_prefix():
    u = torch.tensor([0.0, 0.49, 0.51, 0.999], dtype=torch.float64)
    keys = torch.rand(4, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    learned = (torch.arange(10) >= 6).expand(4, -1)
    masked = language.drawn_masks(u, keys, learned)
    assert masked.sum(-1).tolist() == [1, 2, 3, 4] and not bool(masked[:, :6].any())


def test_the_loss_of_a_network_that_knows_nothing_is_the_logarithm_of_the_vocabulary(texts, tmp_path, config):
    settings = read_settings(arguments(texts, tmp_path / "out", config, label_dropout=0.5))
    task, data = language.build(settings)
    seen = []

    class Nothing(torch.nn.Module):
        def forward(self, input_ids):
            seen.append(input_ids)
            return type("Out", (), {"logits": torch.zeros(*input_ids.shape, 9)})

    x0 = torch.stack([data.item(i, 0)["input_ids"].clamp(max=8) for i in range(4)])
    batch = {"input_ids": x0, "positions": torch.arange(4), "prefix_length": torch.full((4,), 5)}
    loss = language.masked_loss(settings, task, Nothing(), batch)
    assert float(loss) == pytest.approx(math.log(9))
    hidden = (seen[0] == task.tokenizer.mask_token_id)[:, :5]
    assert set(hidden.sum(-1).tolist()) == {0, 5}  # a prefix is there or dropped as a whole
    language.masked_loss(settings, task, Nothing(), batch)
    assert torch.equal(seen[0], seen[1])  # a function of the positions


# -- the script --


def test_stopped_and_resumed_it_is_uninterrupted_bit_for_bit(texts, tmp_path, config):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    options = {"use_ema": True, "time_sampling": "stratified"}
    assert train_here(arguments(texts, whole, config, **options)) == 0
    assert train_here(arguments(texts, halves, config, **options, stop_after_steps=2)) == 0
    assert train_here(arguments(texts, halves, config, **options, resume_from_checkpoint="latest")) == 0
    assert losses(whole) == losses(halves)
    one, two = (transformers.AutoModelForMaskedLM.from_pretrained(p / "model") for p in (whole, halves))
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b)
    changed = arguments(texts, halves, config, **options, sequence_length=8, resume_from_checkpoint="latest")
    assert train_here(changed) == 2


def test_the_result_writes_in_the_stock_pipeline_and_is_trained_on(texts, tmp_path, config):
    output = tmp_path / "out"
    options = {"num_held_out_images": 4, "num_validation_images": 2, "validation_inference_steps": 4}
    options["checkpointing_steps"] = 100
    assert train_here(arguments(texts, output, config, 60, learning_rate=0.02, **options)) == 0
    curve = list(losses(output).values())
    assert np.mean(curve[-10:]) < 0.88 * np.mean(curve[:5])
    card = (output / "README.md").read_text()
    assert "bits per character on 4 held-out sequences" in card and "---" in (output / "samples.txt").read_text()
    pipe = diffusers.DiffusionPipeline.from_pretrained(
        output, tokenizer=transformers.AutoTokenizer.from_pretrained(output / "tokenizer")
    )
    assert type(pipe) is diffusers.LLaDA2Pipeline
    pipe.scheduler = MaskedDiffusionScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    out = pipe("the ", gen_length=12, block_length=16, num_inference_steps=6, temperature=1.0, use_chat_template=False)
    assert len(out.texts[0]) >= 8
    again = arguments(texts, tmp_path / "more", None, 2, pretrained_model_name_or_path=output)
    assert train_here(again) == 0
    assert losses(tmp_path / "more")[1] < np.mean(curve[:5])


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"path": "flow"}, "--path"),
        ({"loss_weighting": "min_snr"}, "--loss_weighting"),
        ({"resolution": 8}, "--resolution"),
        ({"objective": "embedding", "prefix_column": "animal"}, "masked"),
        ({"objective": "denoising", "prefix_column": "animal"}, "--prefix_column"),
        ({"pretrained_model_name_or_path": "x", "model_config": None, "tokenizer_name_or_path": "y"}, "tokenizer"),
    ],
)
def test_contradictions_get_one_sentence(texts, tmp_path, config, options, word, capsys):
    with pytest.raises(SystemExit):
        read_settings(arguments(texts, tmp_path / "out", config, **options))
    assert word in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "word"), [({"sequence_length": 17}, "16 tokens"), ({"sequence_length": 4000}, "less than")]
)
def test_what_does_not_fit_is_refused_before_anything_is_written(texts, tmp_path, config, options, word, capsys):
    output = tmp_path / "out"
    assert train_here(arguments(texts, output, config, **options)) == 2
    assert word in capsys.readouterr().err and not output.exists()


# -- embeddings --


def test_embeddings_train_resume_and_write(texts, tmp_path, config):
    """From noise on embeddings, under flow matching; a resumed training is the uninterrupted one."""
    options = {"objective": "embedding", "path": "flow", "learning_rate": 0.01, "num_held_out_images": 4}
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    samples = {"num_validation_images": 2, "validation_inference_steps": 4}
    assert train_here(arguments(texts, whole, config, 40, **options, **samples, checkpointing_steps=100)) == 0
    curve = list(losses(whole).values())
    assert np.mean(curve[-8:]) < 0.8 * np.mean(curve[:4])
    assert "bits per character on 4 held-out sequences" in (whole / "README.md").read_text()
    assert (whole / "samples.txt").read_text().count("---") == 1
    assert train_here(arguments(texts, halves, config, 40, **options, stop_after_steps=3)) == 0
    resumed = arguments(texts, halves, config, 40, **options, stop_after_steps=2, resume_from_checkpoint="latest")
    assert train_here(resumed) == 0
    found = losses(halves)
    assert {step: losses(whole)[step] for step in found} == found
    pipe = diffusers.DDPMPipeline.from_pretrained(whole)
    assert type(pipe.unet) is EmbeddingTextModel
    np.testing.assert_allclose(pipe.unet.embeddings.detach().square().mean(-1), 1, rtol=1e-4)


def test_a_denoiser_remembers_its_last_prediction_and_clamps_to_words():
    embeddings = torch.eye(3) * 3**0.5
    seen = []

    def network(sample, timestep, last):
        seen.append(last)
        return type("Out", (), {"sample": sample + 0.1})

    network.embeddings = embeddings
    x = embeddings[torch.tensor([[0, 2]])][:, None]
    denoise = embedding_denoiser(network)
    assert torch.equal(denoise(x, 5), x + 0.1) and torch.equal(denoise(x, 4), x + 0.1)
    assert seen[0] is None and torch.equal(seen[1], x + 0.1)
    assert torch.equal(embedding_denoiser(network, clamping=True)(x, 5), x)
    assert words_of(x + 0.1, network).tolist() == [[0, 2]]
