"""No secret is written anywhere: card, logs, trackers, checkpoints, messages, the plan."""

from __future__ import annotations

from pathlib import Path

import pytest
from training_helpers import common, make_images, tiny_config, train_here

from diffusers_sde.training.arguments import read_settings
from diffusers_sde.training.secrets import redact
from diffusers_sde.training.settings import Settings

TOKEN = "hf_" + "aB3" * 12


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"--hub_token {TOKEN}", "--hub_token ..."),
        ("--hub_token=mine", "--hub_token=..."),
        ("https://me:hidden@host/data", "https://...@host/data"),
        ("hf://datasets/me/data@main/a.png", "hf://datasets/me/data@main/a.png"),
        ("https://host/a?rev=1&access_token=hidden&x=2", "https://host/a?rev=1&access_token=...&x=2"),
        ("s3://b/k?X-Amz-Signature=hidden", "s3://b/k?X-Amz-Signature=..."),
        ("the key of the API is kept-in-here.", "the key of the API is ...."),
        ("sk-" + "a1" * 20, "..."),
        ("hf_dataset_of_flowers/skeletons sk-learn a@b.org", "hf_dataset_of_flowers/skeletons sk-learn a@b.org"),
    ],
)
def test_a_secret_is_three_dots_and_nothing_else_is(text: str, shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "kept-in-here")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "flowers_")
    monkeypatch.setenv("SOME_KEY", "short")
    assert redact(text, "mine", None) == shown


@pytest.mark.parametrize("form", ["apart", "joined"])
def test_no_file_and_no_line_of_a_training_has_a_secret(
    tmp_path: Path, capfd, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    """Tracker, logs, event files, checkpoints, card: every byte is looked at."""
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef" * 2)
    data, config = make_images(tmp_path / "data", 8), tiny_config(tmp_path / "config")
    prompt = f"https://me:pass-word-1@host/?token=in-the-url {'0123456789abcdef' * 2}"
    words = common(data, tmp_path / "out", config, 2, report_to="tensorboard", validation_prompts=prompt)
    words += ["--hub_token", "own-token-1"] if form == "apart" else ["--hub_token=own-token-1"]
    words += ["--hub_model_id", "me/own-token-1"]
    assert train_here([*words, "--dry_run"]) == 0
    assert train_here(words) == 0
    seen = "".join(capfd.readouterr()).encode()
    files = {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert {"README.md", "hparams.yml", "training.json"} <= {p.name for p in files}
    assert b"--hub_token" in files[tmp_path / "out/README.md"]
    for secret in (b"own-token-1", b"pass-word-1", b"in-the-url", b"0123456789abcdef"):
        assert secret not in seen and [p.name for p, content in files.items() if secret in content] == []


def settings(*words: str) -> Settings:
    return read_settings(["--output_dir", "out", "--train_data_dir", "missing/own-token", *words])


def test_an_error_that_repeats_a_secret_is_said_without_it(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    train_here(["--output_dir", "out", "--train_data_dir", "./own-token", "--hub_token", "own-token"])
    assert capsys.readouterr().err == (
        "diffusers_sde.train: ./... does not exist: pass a folder of images or the name of a data set on the Hub.\n"
    )


def test_settings_that_are_printed_do_not_show_a_secret() -> None:
    read = settings("--hub_token", "own-token-1")
    assert "own-token-1" not in repr(read) and "hub_token" not in read.public()
    assert read.hub_token == "own-token-1"


@pytest.mark.parametrize(
    "words",
    [
        ["--hub_tokn", TOKEN],
        [f"--hub_tokn={TOKEN}"],
        [f"--hub_tok={TOKEN}"],
        ["--hub_token", "a", TOKEN],
        [TOKEN],
        ["--seed", "1", f"--wandb_key={TOKEN}"],
    ],
)
def test_a_command_line_that_is_refused_is_not_repeated(words: list[str], capsys) -> None:
    with pytest.raises(SystemExit):
        settings(*words)
    said = capsys.readouterr().err
    assert "aB3" not in said and said.count("\n") == 1
