"""A tiny model, tokenizer and text to fine-tune."""

import json
import random
from pathlib import Path
from typing import Any

from conftest import TRAINED, tiny_llama
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, TrainingArguments

from hf_rope_ext.finetune import Recipe

VOCABULARY = 260


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and a beginning-of-text token before each document."""
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<s>": 0, **{symbol: number for number, symbol in enumerate(symbols, start=1)}}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


def documents(count: int = 40) -> list[str]:
    draw = random.Random(0)
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "then", "some", "other", "animal"]
    words += ["came", "by", "to", "look", "at", "it"]
    return [" ".join(draw.choices(words, k=60)) for _ in range(count)]


def write_model(directory: Path, **settings: Any) -> Path:
    model = tiny_llama(vocab_size=VOCABULARY, **settings)
    model.save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


def write_text(path: Path, count: int = 40) -> Path:
    path.write_text("".join(json.dumps({"text": one}) + "\n" for one in documents(count)))
    return path


def recipe(model: Path, data: Path, **settings: Any) -> Recipe:
    small = {
        "factor": 2.0,
        "held_out": 0.1,
        "eval_lengths": "1x,2x",
        "eval_windows": 3,
        "eval_targets": 8,
        "eval_passkeys": 0,
        "cache": str(data.parent / "cache"),
        "loss_chunk": 50,
    }
    return Recipe(model=str(model), data=str(data), **{**small, **settings})


def training(directory: Path, **settings: Any) -> TrainingArguments:
    small = {
        "output_dir": str(directory),
        "max_steps": 4,
        "learning_rate": 5e-3,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "save_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 0,
    }
    return TrainingArguments(**{**small, **settings})


TARGET = 2 * TRAINED
