"""Tokenizers built without the Hub, and tiny text and image encoders."""

import string
from functools import lru_cache

import transformers as tr

from tiny_pipelines.common import IMAGE_SIZE, TEXT_DIM, seeded


@lru_cache
def clip_tokenizer():
    characters = [*string.ascii_lowercase, *string.digits, *string.punctuation]
    pieces = [*characters, *(c + "</w>" for c in characters), "<|startoftext|>", "<|endoftext|>"]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    return tr.CLIPTokenizer(vocab=vocab, merges=[], model_max_length=16)


@lru_cache
def clip_text_config():
    tokenizer = clip_tokenizer()
    return tr.CLIPTextConfig(
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        hidden_size=TEXT_DIM,
        projection_dim=TEXT_DIM,
        intermediate_size=37,
        num_attention_heads=4,
        num_hidden_layers=2,
        max_position_embeddings=16,
    )


@lru_cache
def clip_text_encoder():
    return seeded(tr.CLIPTextModel, clip_text_config())


@lru_cache
def clip_text_encoder_with_projection(seed=0):
    return seeded(tr.CLIPTextModelWithProjection, clip_text_config(), seed=seed)


@lru_cache
def clip_image_encoder(encoder=tr.CLIPVisionModelWithProjection):
    config = tr.CLIPVisionConfig(
        hidden_size=TEXT_DIM,
        projection_dim=TEXT_DIM,
        intermediate_size=37,
        num_attention_heads=4,
        num_hidden_layers=2,
        image_size=IMAGE_SIZE,
        patch_size=8,
    )
    return seeded(encoder, config)


def clip_vision_model():
    return clip_image_encoder(tr.CLIPVisionModel)


@lru_cache
def clip_image_processor():
    return tr.CLIPImageProcessor(size=IMAGE_SIZE, crop_size=IMAGE_SIZE)


@lru_cache
def t5_tokenizer():
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), *(("▁" + c, -2.0) for c in string.ascii_lowercase)]
    vocab += [(c, -3.0) for c in string.ascii_lowercase + "▁"]
    return tr.T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=16)


@lru_cache
def t5_encoder(encoder=tr.T5EncoderModel, config=tr.T5Config):
    config = config(vocab_size=128, d_model=TEXT_DIM, d_kv=8, d_ff=37, num_layers=2, num_heads=4)
    return seeded(encoder, config)


def umt5_encoder():
    return t5_encoder(tr.UMT5EncoderModel, tr.UMT5Config)


@lru_cache
def gemma():
    tokenizer = tr.GemmaTokenizer()
    config = tr.Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_DIM,
        head_dim=8,
        intermediate_size=37,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=2,
    )
    return tokenizer, seeded(tr.Gemma2Model, config)


def t5_text():
    return {"text_encoder": t5_encoder(), "tokenizer": t5_tokenizer()}


def clip_text():
    return {"text_encoder": clip_text_encoder(), "tokenizer": clip_tokenizer()}


def sdxl_text():
    second = {"text_encoder_2": clip_text_encoder_with_projection(), "tokenizer_2": clip_tokenizer()}
    return clip_text() | second
