"""Tiny text encoders and tokenizers of the transformer families, as --pipeline folders."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from tokenizers import decoders as token_decoders

from benchmarks import make_checkpoint

# What the tests' transformers of these families read.
TEXT_CHANNELS, POOLED_CHANNELS = 32, 24
LETTERS = "abcdefghijklmnopqrstuvwxyz ,.;:!?"
CHAT = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_text_encoders(family: str, folder: Path) -> Path:
    """Write a family's text encoders, random, and their tokenizers; return the folder."""
    torch.manual_seed(5)
    {"flux": _flux, "z-image": _z_image, "qwen-image": _qwen_image}[family](folder)
    return folder


def _flux(folder: Path) -> None:
    config = make_checkpoint.configuration("text_encoder", "tiny")
    config |= {"hidden_size": POOLED_CHANNELS, "num_attention_heads": 2}
    clip = transformers.CLIPTextModel(transformers.CLIPTextConfig(**config))
    clip.save_pretrained(folder / "text_encoder")
    make_checkpoint.write_folder(
        folder / "sdxl", width="tiny", dtype=torch.float32, seed=0, components=()
    )
    shutil.move(folder / "sdxl/tokenizer", folder / "tokenizer")
    shutil.rmtree(folder / "sdxl")
    t5 = transformers.T5EncoderModel(
        transformers.T5Config(
            vocab_size=len(LETTERS) + 4,
            d_model=TEXT_CHANNELS,
            d_ff=48,
            d_kv=8,
            num_heads=2,
            num_layers=2,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
        )
    )
    t5.save_pretrained(folder / "text_encoder_2")
    write_t5_tokenizer(folder / "tokenizer_2")


def _z_image(folder: Path) -> None:
    qwen = transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(
            **_qwen_sizes(), head_dim=8, bos_token_id=0, eos_token_id=2, tie_word_embeddings=True
        )
    )
    qwen.save_pretrained(folder / "text_encoder")
    write_chat_tokenizer(folder / "tokenizer")


def _qwen_image(folder: Path) -> None:
    config = transformers.Qwen2_5_VLConfig(
        text_config={
            **_qwen_sizes(),
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": [1, 1, 2],
            },
        },
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": TEXT_CHANNELS,
        },
    )
    model = transformers.Qwen2_5_VLForConditionalGeneration(config)
    model.save_pretrained(folder / "text_encoder")
    write_chat_tokenizer(folder / "tokenizer")


def _qwen_sizes() -> dict[str, int]:
    return {
        "vocab_size": 256 + len(CHAT) + 1,
        "hidden_size": TEXT_CHANNELS,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }


def write_t5_tokenizer(folder: Path) -> None:
    """Write a unigram tokenizer of letters with T5's special tokens."""
    pieces = [
        ("<pad>", 0.0),
        ("</s>", 0.0),
        ("<unk>", 0.0),
        *((letter, -1.0) for letter in LETTERS),
    ]
    tokenizer = Tokenizer(models.Unigram([*pieces, ("▁", -1.0)], unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = token_decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    _save(
        tokenizer,
        folder,
        tokenizer_class="T5TokenizerFast",
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=512,
        extra_ids=0,
    )


def write_chat_tokenizer(folder: Path) -> None:
    """Write a tokenizer of bytes with Qwen's special tokens and a chat template."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate(letters)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = token_decoders.ByteLevel()
    tokenizer.add_special_tokens(list(CHAT))
    _save(
        tokenizer,
        folder,
        tokenizer_class="Qwen2TokenizerFast",
        pad_token=CHAT[0],
        eos_token=CHAT[2],
        chat_template=CHAT_TEMPLATE,
        model_max_length=4096,
    )
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")


def _save(tokenizer: Tokenizer, folder: Path, **config: Any) -> None:
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
