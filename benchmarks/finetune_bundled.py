"""Perplexity and passkey accuracy of each method before and after LoRA, on the bundled model.

Half of the training texts contain passkeys, as in the bundled model's own training. Run it as
``python benchmarks/finetune_bundled.py``; with ``--keep FOLDER`` it resumes where it stopped.
"""

import argparse
import json
import random
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from recording import record
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from hf_rope_ext import patched
from hf_rope_ext.assets import DIRECTORY, TEXT
from hf_rope_ext.evals.text import tokenize
from hf_rope_ext.evals.text_passkey import SENTENCE
from hf_rope_ext.finetune import Recipe, finetune
from hf_rope_ext.finetune.evaluation import Evaluation

METHODS = ("none", "linear", "ntk", "yarn")
TRAINED, FACTOR = 512, 4
SHARE = 0.6
"""Share of the text that is trained on."""
CHARACTERS = 4400
"""Characters per training text: about four times the trained length in tokens."""

SETTINGS: dict[str, Any] = {
    "max_steps": 60,
    "learning_rate": 2e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 5,
    "per_device_train_batch_size": 2,
}
LORA: dict[str, Any] = {"lora_rank": 8, "lora_alpha": 16.0, "lora_targets": ["all-linear"]}


def make_documents(text: str) -> Dataset:
    """Cut a text into documents; every other one has a passkey inside and again at its end."""
    generator = random.Random(0)
    documents = []
    for number, start in enumerate(range(0, len(text) - CHARACTERS, CHARACTERS)):
        piece = text[start : start + CHARACTERS]
        if number % 2:
            sentence = SENTENCE.format(key=f"{generator.randrange(100_000):05d}")
            place = generator.randrange(len(piece))
            piece = piece[:place] + sentence + piece[place:] + sentence
        documents.append(piece)
    return Dataset.from_dict({"text": documents})


def tune(model: Path, text: Path, method: str, seed: int) -> dict[str, Any]:
    """Return perplexity and passkey accuracy by length before and after tuning.

    They are measured on the last part of the text, which is not trained on and has no other keys.
    """
    words = text.read_text(encoding="utf-8")
    border = int(SHARE * len(words))
    tokenizer = AutoTokenizer.from_pretrained(model)
    lengths = tuple(TRAINED * times for times in (1, 2, 4, 8))
    evaluation = Evaluation.on(
        tokenize(tokenizer, words[border:]), tokenizer, lengths, windows=16, passkeys=50, seed=0
    )
    options = {} if method == "none" else {"factor": FACTOR}
    base = AutoModelForCausalLM.from_pretrained(model)
    with patched(base, method, **options):
        before = evaluation.measure(base)
    with tempfile.TemporaryDirectory() as output:
        training = TrainingArguments(
            output_dir=output,
            seed=seed,
            report_to="none",
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
            **SETTINGS,
        )
        recipe = Recipe(
            model=str(model),
            method=method,
            sequence_length=FACTOR * TRAINED,
            held_out=0.15,
            eval_lengths="1x",
            eval_windows=2,
            eval_passkeys=0,
            **options,
            **LORA,
        )
        done = finetune(recipe, training, data=make_documents(words[:border]))
    return {"before": before, "after": evaluation.measure(done.model)}


def main() -> None:
    """Run what has not been run yet, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=DIRECTORY)
    parser.add_argument("--text", type=Path, default=TEXT)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--keep", type=Path, default=Path(tempfile.mkdtemp()))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.keep.mkdir(exist_ok=True)
    runs: dict[str, list[dict[str, Any]]] = {method: [] for method in METHODS}
    for seed in range(arguments.seeds):
        for method in METHODS:
            path = arguments.keep / f"{method} {seed}.json"
            if not path.is_file():
                path.write_text(json.dumps(tune(arguments.model, arguments.text, method, seed)))
                print(path.stem, path.read_text(), flush=True)
            runs[method].append(json.loads(path.read_text()))
    results = {
        method: {
            when: {
                name: {
                    "mean": statistics.fmean(run[when][name] for run in method_runs),
                    "stdev": statistics.stdev(
                        [run[when][name] for run in method_runs] * (1 + (len(method_runs) < 2))
                    ),
                }
                for name in method_runs[0][when]
            }
            for when in ("before", "after")
        }
        for method, method_runs in runs.items()
    }
    print(record("finetune_bundled", results, training=SETTINGS, lora=LORA, seeds=arguments.seeds))


if __name__ == "__main__":
    main()
