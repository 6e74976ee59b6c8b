"""Fine-tune a model for four times its context with LoRA, and load the result.

Needs ``pip install 'hf-rope-ext[finetune]'``. Run it as ``python examples/finetune_lora.py``: the
bundled model and text take a few minutes on a CPU; with ``--model`` and ``--data`` it tunes yours.
"""

import argparse
from pathlib import Path

from transformers import TrainingArguments

from hf_rope_ext import describe, load_pretrained
from hf_rope_ext.assets import DIRECTORY, TEXT
from hf_rope_ext.finetune import Recipe, finetune, merge_adapter


def main() -> None:
    """Tune, print the scores, reload the adapter and merge it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(DIRECTORY))
    parser.add_argument("--data", default=str(TEXT))
    parser.add_argument("--method", default="yarn")
    parser.add_argument("--factor", type=float, default=4.0)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--output", type=Path, default=Path("tuned"))
    arguments = parser.parse_args()

    recipe = Recipe(
        model=arguments.model,
        data=arguments.data,
        method=arguments.method,
        factor=arguments.factor,
        lora_targets=["all-linear"],
        held_out=0.1,
        cache=str(arguments.output / "cache"),
    )
    training = TrainingArguments(
        output_dir=str(arguments.output / "adapter"),
        max_steps=arguments.steps,
        learning_rate=2e-3,
        lr_scheduler_type="cosine",
        warmup_steps=min(10, arguments.steps),
        per_device_train_batch_size=4,
        eval_strategy="no",  # it is evaluated before and after training in any case
        save_steps=50,
        report_to="none",
    )
    done = finetune(recipe, training)
    for name, value in done.after.items():
        print(f"{name:>18}: {done.before[name]:8.3f} -> {value:8.3f}")

    # the adapter is loaded with the method it was trained with
    print(describe(load_pretrained(done.directory)))
    # one plain model, for tools without this package or PEFT
    merge_adapter(done.directory, arguments.output / "merged")


if __name__ == "__main__":
    main()
