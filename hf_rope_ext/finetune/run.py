"""Run a recipe: data, patched model, training, evaluation, and what is left behind."""

import copy
import inspect
import json
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
from hf_rope_ext.finetune.build import load_base, patch, trainable, trained_length
from hf_rope_ext.finetune.callback import Evaluation
from hf_rope_ext.finetune.documents import Source, Stream, load_documents, split_stream
from hf_rope_ext.finetune.loss import chunked_loss, find_causal_model
from hf_rope_ext.finetune.memory import MemoryEstimate, estimate_memory, out_of_memory
from hf_rope_ext.finetune.monitor import CURVE, Journal, Progress, plot_curve
from hf_rope_ext.finetune.pose import position_skips
from hf_rope_ext.finetune.recipe import Recipe
from hf_rope_ext.finetune.sequences import MixedWindows, Sequences, SkipWise, collate
from hf_rope_ext.finetune.trainer import LongContextTrainer, last_checkpoint
from hf_rope_ext.parsing import parse_lengths
from hf_rope_ext.rotary.installed import patch_of

RECIPE = "recipe.json"

HOW = (
    "data_seed",
    "gradient_accumulation_steps",
    "learning_rate",
    "lr_scheduler_type",
    "max_steps",
    "num_train_epochs",
    "per_device_train_batch_size",
    "seed",
    "warmup_steps",
)
"""TrainingArguments that a resumed run must have in common with the one it continues."""


@dataclass(frozen=True)
class Finetuned:
    """What a fine-tune left.

    Args:
        directory: Of the adapter, or of the whole model.
        model: As trained.
        before: Perplexity and pass keys by length before the first step, as ``perplexity_512``.
        after: The same at the end.
        history: Everything logged.
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
        recipe: What is trained on what.
        training: transformers' ``TrainingArguments``.
        model: The base model, unpatched, instead of ``recipe.model``.
        tokenizer: Its tokenizer, likewise.
        data: A `datasets.Dataset` instead of ``recipe.data``.

    Raises:
        RopeError: If the recipe cannot be served; nothing is written then.
    """
    _require_whole_sequences(recipe)
    if _offloads(training) and training.device.type == "cpu":
        raise RopeError("offload needs a GPU: on a CPU activations are in main memory already.")
    tokenizer = _tokenizer(recipe) if tokenizer is None else tokenizer
    directory = Path(training.output_dir)
    _require_directory(directory, recipe, training)
    model = load_base(recipe) if model is None else model
    stages: list[tuple[float | None, int]] = [(recipe.factor, training.max_steps)]
    if recipe.factor_schedule is not None:
        stages = list(recipe.stages())
    with training.main_process_first(desc="tokenising"):
        rows = load_documents(_source(recipe, data), tokenizer)
    wrapped: nn.Module | None = None
    results = []
    for number, (factor, steps) in enumerate(stages, start=1):
        own = copy.copy(training)
        own.max_steps = steps
        # without it every process draws an order of its own
        own.data_seed = _data_seed(training)
        if len(stages) > 1 and number < len(stages):
            own.output_dir = str(directory / f"stage-{number}")
        target = patch(model if wrapped is None else wrapped, recipe, factor)
        _require_one_plan(model)
        if wrapped is None:
            set_seed(training.seed)  # of the adapter's first weights; the Trainer seeds the rest
            wrapped = trainable(model, recipe)
        settings = _settings(recipe, training)
        stage = _Stage(recipe, own, settings, wrapped, tokenizer, rows, target)
        results.append(stage.run())
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
        """Tokens of a long sequence."""
        return self.recipe.sequence_length or self.target

    @property
    def lengths(self) -> tuple[int, ...]:
        """Where perplexity is measured."""
        trained = trained_length(self.model)
        if self.recipe.eval_lengths is not None:
            return parse_lengths(self.recipe.eval_lengths, trained)
        doubled = [trained]
        while doubled[-1] * 2 <= 2 * self.target:
            doubled.append(doubled[-1] * 2)
        return tuple(doubled)

    def run(self) -> Finetuned:
        """Train, evaluate and save."""
        recipe, training = self.recipe, self.training
        directory = Path(training.output_dir)
        train, held = split_stream(self.rows, recipe.held_out, max(self.lengths))
        dataset = self._dataset(train)
        evaluation = Evaluation.on(
            held.tokens(),
            self.tokenizer,
            self.lengths,
            windows=recipe.eval_windows,
            targets=recipe.eval_targets,
            passkeys=recipe.eval_passkeys,
            seed=training.seed,
        )
        self._require_memory()
        checkpoint = last_checkpoint(directory) if recipe.resume else None
        with self._techniques() as skips:
            trainer = self._trainer(dataset, evaluation, skips, checkpoint is None)
            if training.should_save:
                _write_recipe(directory, self.settings)
            with _clear_out_of_memory():
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
                after = trainer.evaluate()
            trainer.save_model()
        history = trainer.state.log_history
        if training.should_save:
            _draw(history, directory / CURVE)
        before: dict[str, Any] = next((entry for entry in history if entry["step"] == 0), {})
        return Finetuned(directory, self.model, _numbers(before), _numbers(after), history)

    def _dataset(self, stream: Stream) -> Dataset[Any]:
        recipe, seed = self.recipe, self.training.seed
        sequences = Sequences(stream, self.length, recipe.packing)
        if recipe.pose_length is not None:
            return SkipWise(sequences, recipe.pose_length, seed)
        if recipe.mixed_windows is not None:
            short = trained_length(self.model)
            return MixedWindows(sequences, short, recipe.mixed_windows, seed)
        return sequences

    @contextmanager
    def _techniques(self) -> Iterator[Any]:
        """Put the loss and the position skips into the model for the run."""
        with ExitStack() as stack:
            if self.recipe.loss == "chunked":
                stack.enter_context(chunked_loss(self.model, self.recipe.loss_chunk))
            if self.recipe.pose_length is None:
                yield None
            else:
                yield stack.enter_context(position_skips(self.model))

    def _trainer(
        self, dataset: Dataset[Any], evaluation: Evaluation, skips: Any, fresh: bool
    ) -> LongContextTrainer:
        arguments = self.training
        arguments.remove_unused_columns = False
        arguments.eval_on_start = fresh
        arguments.use_cache = False
        arguments.dataloader_pin_memory &= torch.cuda.is_available()
        if self.recipe.loss == "liger":
            _use_liger(arguments, self.model)
        length = self.recipe.pose_length or self.length
        each = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
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
            trainer.add_callback(Progress(length * each * arguments.world_size))
        trainer.remove_callback(PrinterCallback)
        return trainer

    def _require_memory(self) -> None:
        found = self._estimate()
        if self.training.should_save:
            sys.stderr.write("\n".join(["estimated memory:", *found.lines(), ""]))
        if self.recipe.check_memory:
            advice = ["a shorter sequence_length", "fewer per_device_train_batch_size"]
            if not self.training.activation_checkpointing:
                advice.insert(0, "activation_checkpointing=true")
            if self.recipe.loss == "plain":
                advice.insert(0, "loss=chunked")
            if self.recipe.quantize == "none":
                advice.append("quantize=4bit")
            advice.append("pose_length")
            found.require_fit(advice)

    def _estimate(self) -> MemoryEstimate:
        arguments = self.training
        length = self.recipe.pose_length or self.length
        sharded = bool(arguments.fsdp) or _sharded_by_launcher()
        return estimate_memory(
            self.model,
            length * arguments.per_device_train_batch_size,
            checkpointing=bool(arguments.activation_checkpointing),
            offload=_offloads(arguments),
            loss_chunk=None if self.recipe.loss == "plain" else self.recipe.loss_chunk,
            shards=arguments.world_size if sharded else 1,
            device=arguments.device,
        )


def _offloads(training: Any) -> bool:
    return bool((training.activation_checkpointing_kwargs or {}).get("offload"))


def _source(recipe: Recipe, data: Any) -> Source:
    if data is None and not recipe.data:
        raise RopeError("the recipe has no data.")
    return Source(
        data=recipe.data if data is None else data,
        column=recipe.column,
        separator=recipe.separator,
        chat=recipe.chat,
        split=recipe.dataset_split,
        answers_only=recipe.answers_only,
        cache=Path(recipe.cache) if recipe.cache else None,
    )


def _tokenizer(recipe: Recipe) -> Any:
    from transformers import AutoTokenizer

    if not recipe.model:
        raise RopeError("the recipe has no model.")
    try:
        return AutoTokenizer.from_pretrained(recipe.model)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise RopeError(f"cannot load the tokenizer of {recipe.model!r}: {reason}") from error


def _settings(recipe: Recipe, training: Any) -> dict[str, Any]:
    """Return what must not change between a run and its continuation."""
    how = {name: getattr(training, name) for name in HOW} | {"data_seed": _data_seed(training)}
    what = {name: value for name, value in recipe.to_dict().items() if name != "resume"}
    return json.loads(json.dumps({**what, **how}, default=str))  # type: ignore[no-any-return]


def _require_directory(directory: Path, recipe: Recipe, training: Any) -> None:
    """Refuse to write over another run, or to continue it with other settings."""
    path = directory / RECIPE
    _require_writable(directory)
    if not path.is_file():
        if last_checkpoint(directory) is not None:
            raise RopeError(f"{str(directory)!r} holds checkpoints of something else.")
        return
    if not recipe.resume:
        raise RopeError(
            f"{str(directory)!r} holds a run already; continue it with resume=true, or give "
            f"another output_dir."
        )
    before, now = json.loads(path.read_text()), _settings(recipe, training)
    differing = [name for name in now if now[name] != before.get(name)]
    if differing:
        raise RopeError(
            f"{str(directory)!r} cannot be continued with other settings: "
            + "; ".join(f"{name} was {before.get(name)!r}" for name in differing)
            + "."
        )


def _require_writable(directory: Path) -> None:
    above = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    # access: no file is made before everything else is checked
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise RopeError(f"output_dir: nothing can be written to {str(directory)!r}.")


def _write_recipe(directory: Path, settings: dict[str, Any]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / RECIPE).write_text(json.dumps(settings, indent=2) + "\n")


def _data_seed(training: Any) -> int:
    return int(training.seed if training.data_seed is None else training.data_seed)


def _spread() -> bool:
    """Return whether the launcher spreads each sequence over several devices."""
    return any(
        os.environ.get(f"PARALLELISM_CONFIG_{kind}_SIZE", "1") != "1" for kind in ("CP", "SP")
    )


def _require_one_plan(model: nn.Module) -> None:
    """Refuse a plan that follows the length, where no device knows a sequence's length."""
    patch = patch_of(model)
    if patch is not None and patch.resolved.method.length_dependent and _spread():
        raise RopeError(
            f"the plan of {patch.resolved.method.name!r} depends on the length of a sequence, "
            f"which the launcher spreads over several devices (context or sequence parallelism); "
            f"use a static method, such as yarn."
        )


def _require_whole_sequences(recipe: Recipe) -> None:
    """Refuse techniques that need a sequence on one device, where it is spread over several."""
    if not _spread():
        return
    for name in ("pose_length", "shifted_groups", "mixed_windows"):
        if getattr(recipe, name) is not None:
            raise RopeError(
                f"{name} needs whole sequences on each device, but the launcher spreads them over "
                f"several (context or sequence parallelism); use one or the other."
            )


def _use_liger(arguments: Any, model: nn.Module) -> None:
    """Let the Trainer put Liger's fused loss into the model, and none of its other kernels."""
    from importlib.util import find_spec

    if find_spec("liger_kernel") is None:
        raise RopeError("loss=liger needs liger-kernel: pip install liger-kernel")
    if arguments.device.type == "cpu" and not os.environ.get("TRITON_INTERPRET"):
        raise RopeError("loss=liger needs a GPU; use loss=chunked.")
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN as FAMILIES

    causal = find_causal_model(model)
    apply = FAMILIES.get(causal.config.model_type)
    switches = dict(inspect.signature(apply).parameters) if apply is not None else {}
    if "fused_linear_cross_entropy" not in switches:
        # Liger leaves such a model as it is, with all its logits
        raise RopeError(
            f"Liger has no fused loss for {causal.config.model_type!r}; use loss=chunked."
        )
    arguments.use_liger_kernel = True
    arguments.liger_kernel_config = {
        name: name == "fused_linear_cross_entropy" for name in switches if name != "model"
    }


def _sharded_by_launcher() -> bool:
    return os.environ.get("ACCELERATE_USE_FSDP", "false") == "true"


@contextmanager
def _clear_out_of_memory() -> Iterator[None]:
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise RopeError(
            f"the device ran out of memory: {str(error).splitlines()[0]}. Checkpoints up to here "
            f"are kept. Use a shorter sequence_length, activation_checkpointing=true, "
            f"loss=chunked, quantize=4bit, or pose_length."
        ) from error


def _numbers(entry: dict[str, Any]) -> dict[str, float]:
    return {
        name.removeprefix("eval_"): value
        for name, value in entry.items()
        if name.startswith("eval_")
    }


def _draw(history: list[dict[str, Any]], path: Path) -> None:
    try:
        plot_curve(history, path)
    except ImportError:
        sys.stderr.write("no curve: pip install 'hf-rope-ext[plot]'\n")
