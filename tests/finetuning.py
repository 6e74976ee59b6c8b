"""A tiny model, tokenizer and text to fine-tune, in one process or two."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from conftest import TRAINED, tiny_llama
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, TrainingArguments

from hf_rope_ext.finetune import Recipe

HERE = Path(__file__).parent
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


def assert_same(found, expected, **tolerance):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, **tolerance, msg=name)


def launch(script, words, *options):
    """Run a script in two processes that talk over gloo."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += ["--standalone", *options, str(script), *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
