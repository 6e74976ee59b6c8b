"""Run a recipe: tokenize, patch, train, evaluate and save."""

import copy
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import PrinterCallback, set_seed
from transformers.trainer_callback import ProgressCallback

from hf_rope_ext.errors import RopeError
from hf_rope_ext.finetune.build import (
    load_base,
    load_tokenizer,
    make_trainable,
    patch,
    trained_length,
)
from hf_rope_ext.finetune.documents import Source, Stream, load_documents, split_stream
from hf_rope_ext.finetune.evaluation import Evaluation
from hf_rope_ext.finetune.liger import use_liger_loss
from hf_rope_ext.finetune.loss import chunked_loss
from hf_rope_ext.finetune.memory import estimate_memory, explain_out_of_memory
from hf_rope_ext.finetune.monitor import CURVE, Journal, Progress, plot_curve
from hf_rope_ext.finetune.output_dir import (
    collect_settings,
    find_last_checkpoint,
    require_usable,
    write_settings,
)
from hf_rope_ext.finetune.parallelism import require_static_plan, require_whole_sequences
from hf_rope_ext.finetune.pose import position_skips
from hf_rope_ext.finetune.recipe import Recipe
from hf_rope_ext.finetune.sequences import MixedWindows, Sequences, SkipWise, collate
from hf_rope_ext.finetune.trainer import LongContextTrainer
from hf_rope_ext.models import host
from hf_rope_ext.parsing import parse_lengths


@dataclass(frozen=True)
class Finetuned:
    """The result of a fine-tune.

    Args:
        directory: Where the adapter, or the whole model, was saved.
        model: The trained model.
        before: Perplexity and passkey accuracy by length before training, as ``perplexity_512``.
        after: The same after training.
        history: All logged entries.
    """

    directory: Path
    model: nn.Module
    before: dict[str, float]
    after: dict[str, float]
    history: list[dict[str, Any]]


def finetune(
    recipe: Recipe,
    training: Any,
    *,
    model: nn.Module | None = None,
    tokenizer: Any = None,
    data: Any = None,
) -> Finetuned:
    """Fine-tune a model for a longer context.

    Args:
        recipe: The settings of the fine-tune.
        training: transformers' ``TrainingArguments``.
        model: The unpatched base model, in place of ``recipe.model``.
        tokenizer: Its tokenizer, likewise.
        data: A `datasets.Dataset` in place of ``recipe.data``.

    Raises:
        RopeError: If the recipe cannot be run; nothing has been written then.
    """
    require_whole_sequences(recipe)
    if _offloads(training) and training.device.type == "cpu":
        raise RopeError("offload needs a GPU: on a CPU, activations are already in main memory.")
    if _offloads(training) and not hasattr(training, "activation_checkpointing_kwargs"):
        raise RopeError(f"{host.describe_release()} cannot offload activations; leave offload out.")
    tokenizer = load_tokenizer(recipe) if tokenizer is None else tokenizer
    training = copy.copy(training)
    if training.data_seed is None:
        training.data_seed = training.seed  # otherwise every process draws an order of its own
    directory, settings = Path(training.output_dir), collect_settings(recipe, training)
    require_usable(directory, settings, recipe.resume)
    model = load_base(recipe) if model is None else model
    stages: list[tuple[float | None, int]] = [(recipe.factor, training.max_steps)]
    if recipe.factor_schedule is not None:
        stages = list(recipe.stages())
    with training.main_process_first(desc="tokenizing"):
        rows = load_documents(_source(recipe, data), tokenizer)
    results: list[Finetuned] = []
    for number, (factor, steps) in enumerate(stages, start=1):
        arguments = copy.copy(training)
        arguments.max_steps = steps
        if number < len(stages):
            arguments.output_dir = str(directory / f"stage-{number}")
        target = patch(model, recipe, factor)
        require_static_plan(model)
        if number == 1:
            set_seed(training.seed)  # for the adapter's initial weights; Trainer seeds the rest
            model = make_trainable(model, recipe)
        results.append(_Stage(recipe, arguments, settings, model, tokenizer, rows, target).run())
    first, last = results[0], results[-1]
    return Finetuned(directory, last.model, first.before, last.after, last.history)


@dataclass(frozen=True)
class _Stage:
    """One training run at one factor."""

    recipe: Recipe
    training: Any
    settings: dict[str, Any]
    model: nn.Module
    tokenizer: Any
    rows: Any
    target: int

    @property
    def length(self) -> int:
        """Tokens of a full-length sequence."""
        return self.recipe.sequence_length or self.target

    @property
    def trained_tokens(self) -> int:
        """Tokens of a sequence that the model is given in training."""
        return self.recipe.pose_length or self.length

    @property
    def eval_lengths(self) -> tuple[int, ...]:
        """Lengths to evaluate at, in tokens."""
        trained = trained_length(self.model)
        if self.recipe.eval_lengths is not None:
            return parse_lengths(self.recipe.eval_lengths, trained)
        lengths = [trained]
        while lengths[-1] * 2 <= 2 * self.target:
            lengths.append(lengths[-1] * 2)
        return tuple(lengths)

    def run(self) -> Finetuned:
        """Train, evaluate and save."""
        recipe, training = self.recipe, self.training
        directory = Path(training.output_dir)
        train, held_out = split_stream(self.rows, recipe.held_out, max(self.eval_lengths))
        dataset = self._make_dataset(train)
        evaluation = Evaluation.on(
            held_out.tokens(),
            self.tokenizer,
            self.eval_lengths,
            windows=recipe.eval_windows,
            targets=recipe.eval_targets,
            passkeys=recipe.eval_passkeys,
            seed=training.seed,
        )
        self._require_memory()
        checkpoint = find_last_checkpoint(directory) if recipe.resume else None
        with self._install_techniques() as skips:
            trainer = self._make_trainer(dataset, evaluation, skips, checkpoint is None)
            if training.should_save:
                write_settings(directory, self.settings)
            with explain_out_of_memory():
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
                after = trainer.evaluate()
            trainer.save_model()
        history = trainer.state.log_history
        if training.should_save:
            _draw_curve(history, directory / CURVE)
        before: dict[str, Any] = next((entry for entry in history if entry["step"] == 0), {})
        return Finetuned(directory, self.model, _read_scores(before), _read_scores(after), history)

    def _make_dataset(self, stream: Stream) -> Dataset[Any]:
        recipe, seed = self.recipe, self.training.seed
        sequences = Sequences(stream, self.length, recipe.packing)
        if recipe.pose_length is not None:
            return SkipWise(sequences, recipe.pose_length, seed)
        if recipe.mixed_windows is not None:
            short = trained_length(self.model)
            return MixedWindows(sequences, short, recipe.mixed_windows, seed)
        return sequences

    @contextmanager
    def _install_techniques(self) -> Iterator[Any]:
        """Install the loss and the position skips for the run, and yield the skips, if any."""
        with ExitStack() as stack:
            if self.recipe.loss == "chunked":
                stack.enter_context(chunked_loss(self.model, self.recipe.loss_chunk))
            skips = None
            if self.recipe.pose_length is not None:
                skips = stack.enter_context(position_skips(self.model))
            yield skips

    def _make_trainer(
        self, dataset: Dataset[Any], evaluation: Evaluation, skips: Any, fresh: bool
    ) -> LongContextTrainer:
        arguments = self.training
        arguments.remove_unused_columns = False
        arguments.eval_on_start = fresh
        arguments.use_cache = False
        arguments.dataloader_pin_memory &= torch.cuda.is_available()
        if self.recipe.loss == "liger":
            use_liger_loss(arguments, self.model)
        trainer = LongContextTrainer(
            model=self.model,
            args=arguments,
            train_dataset=dataset,
            eval_dataset=dataset,
            data_collator=collate,
            processing_class=self.tokenizer,
            evaluation=evaluation,
            skips=skips,
            callbacks=[Journal(Path(arguments.output_dir))],
        )
        if trainer.pop_callback(ProgressCallback) is not None:
            rows = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
            trainer.add_callback(Progress(self.trained_tokens * rows * arguments.world_size))
        trainer.remove_callback(PrinterCallback)
        return trainer

    def _require_memory(self) -> None:
        """Print the estimated memory, and refuse a run that will not fit."""
        recipe, training = self.recipe, self.training
        checkpointing = bool(getattr(training, host.training_setting("activation_checkpointing")))
        sharded = training.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "false") == "true"
        estimate = estimate_memory(
            self.model,
            self.trained_tokens * training.per_device_train_batch_size,
            checkpointing=checkpointing,
            offload=_offloads(training),
            loss_chunk=None if recipe.loss == "plain" else recipe.loss_chunk,
            shards=training.world_size if sharded else 1,
            device=training.device,
        )
        if training.should_save:
            sys.stderr.write("\n".join(["estimated memory:", *estimate.lines(), ""]))
        if recipe.check_memory:
            advice = {
                "loss=chunked": recipe.loss == "plain",
                "activation_checkpointing=true": not checkpointing,
                "a shorter sequence_length": True,
                "a smaller per_device_train_batch_size": True,
                "quantize=4bit": recipe.quantize == "none",
                "pose_length": recipe.pose_length is None,
            }
            estimate.require_fit([step for step, helps in advice.items() if helps])


def _offloads(training: Any) -> bool:
    settings = getattr(training, host.training_setting("activation_checkpointing_kwargs"))
    return bool((settings or {}).get("offload"))


def _source(recipe: Recipe, data: Any) -> Source:
    if data is None and not recipe.data:
        raise RopeError("the recipe has no data; set data.")
    return Source(
        data=recipe.data if data is None else data,
        column=recipe.column,
        separator=recipe.separator,
        chat=recipe.chat,
        split=recipe.dataset_split,
        answers_only=recipe.answers_only,
        cache=Path(recipe.cache) if recipe.cache else None,
    )


def _read_scores(entry: dict[str, Any]) -> dict[str, float]:
    prefix = "eval_"
    return {
        name.removeprefix(prefix): score for name, score in entry.items() if name.startswith(prefix)
    }


def _draw_curve(history: list[dict[str, Any]], path: Path) -> None:
    try:
        plot_curve(history, path)
    except ImportError:
        sys.stderr.write("no curve: pip install 'hf-rope-ext[plot]'\n")
