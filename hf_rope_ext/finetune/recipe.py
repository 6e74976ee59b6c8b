"""What a fine-tune is made of, from a YAML file, flags or Python."""

import difflib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from hf_rope_ext.errors import RopeError
from hf_rope_ext.finetune.lora import ADAPTERS
from hf_rope_ext.finetune.sequences import PACKINGS

LOSSES = ("chunked", "liger", "plain")
QUANTIZATIONS = ("none", "4bit", "8bit")

DEFAULTS: dict[str, Any] = {
    # YaRN (arXiv:2309.00071, sec. 4.1): 400 steps at 2e-5 with 20 to warm up; with LoRA LongLoRA's
    # own scripts take the same rate
    "learning_rate": 2e-5,
    "lr_scheduler_type": "constant_with_warmup",
    "warmup_steps": 20,
    "max_steps": 400,
    "weight_decay": 0.0,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 8,
    "activation_checkpointing": True,
    "logging_steps": 1,
    "eval_strategy": "steps",
    "eval_steps": 100,
    "save_steps": 100,
    "save_total_limit": 2,
    "report_to": "none",
    "seed": 0,
}
"""Where this package's defaults for transformers' TrainingArguments are not transformers' own."""


@dataclass(frozen=True)
class Recipe:
    """What is trained on what; how is transformers' ``TrainingArguments``.

    Args:
        model: Directory or hub id of the base model.
        data: A text, JSONL or Parquet file, a directory of a saved dataset or of such files, or a
            dataset's hub id.
        method: What extends the context, with knobs as on the command line (yarn:beta_fast=16).
        factor: Target over trained length.
        target_length: Target length in positions, instead of factor.
        original_max_position_embeddings: Trained length, where the config's is not it.
        temperature: rotation or logits, where a method's temperature goes.
        replace: Replace a scaling in the model's own config.
        sequence_length: Tokens of a training sequence; the target length if not given.
        adapter: lora, rslora, dora, or full for every weight of the text model.
        lora_rank: Rank of the adapter.
        lora_alpha: Scale of the adapter, times the rank.
        lora_dropout: Dropout on the adapter's input.
        lora_targets: attention, all-linear, or names of modules.
        train_norms_and_embeddings: Train norms and the input embedding in full too (LongLoRA).
        quantize: none, 4bit or 8bit, of the frozen weights (QLoRA; needs bitsandbytes).
        dtype: float32, bfloat16 or float16, of the frozen weights; the trained ones are float32
            unless they are all.
        attention: transformers' attn_implementation; its own choice if not given.
        column: Column of the text, or of a chat's messages.
        separator: What ends a document inside a text file.
        chat: The column holds messages, for the chat template.
        answers_only: Predict only the assistant's tokens of a chat.
        dataset_split: Split of a dataset that has several.
        packing: join documents, or cut each on its own.
        held_out: Share of the tokens that is evaluated on and not trained on.
        cache: Directory for tokenised data; that of datasets if not given.
        pose_length: Train on so many tokens whose positions skip over the target length (PoSE).
        shifted_groups: Cut attention into so many shifted groups in training (S2-Attn).
        mixed_windows: Share of sequences that are cut to the trained length and run with the
            original frequencies (LongRoPE2).
        factor_schedule: Factors in turn with their steps, such as 2:200,4:200.
        loss: chunked, liger (needs liger-kernel) or plain.
        loss_chunk: Tokens whose logits exist at once.
        eval_lengths: Where perplexity and pass keys are measured, in tokens or times the trained
            length; 1x and doublings up to twice the target if not given.
        eval_windows: Places perplexity is measured at.
        eval_targets: Tokens scored at each place.
        eval_passkeys: Pass keys per length; 0 for none.
        check_memory: Refuse to start what will not fit.
        resume: Go on from the last complete checkpoint of the output directory, if there is one.
    """

    model: str = ""
    data: str = ""
    method: str = "yarn"
    factor: float | None = None
    target_length: int | None = None
    original_max_position_embeddings: int | None = None
    temperature: str = "rotation"
    replace: bool = False
    sequence_length: int | None = None
    adapter: str = "lora"
    lora_rank: int = 8
    lora_alpha: float = 16.0
    lora_dropout: float = 0.0
    lora_targets: list[str] = field(default_factory=lambda: ["attention"])
    train_norms_and_embeddings: bool = False
    quantize: str = "none"
    dtype: str = "float32"
    attention: str | None = None
    column: str = "text"
    separator: str | None = None
    chat: bool = False
    answers_only: bool = False
    dataset_split: str = "train"
    packing: str = "join"
    held_out: float = 0.02
    cache: str | None = None
    pose_length: int | None = None
    shifted_groups: int | None = None
    mixed_windows: float | None = None
    factor_schedule: str | None = None
    loss: str = "chunked"
    loss_chunk: int = 512
    eval_lengths: str | None = None
    eval_windows: int = 16
    eval_targets: int = 64
    eval_passkeys: int = 20
    check_memory: bool = True
    resume: bool = False

    def __post_init__(self) -> None:
        """Check what can be checked without a model.

        Raises:
            RopeError: If a value is not one of those allowed, or two contradict each other.
        """
        for name, allowed in (
            ("adapter", ADAPTERS),
            ("loss", LOSSES),
            ("quantize", QUANTIZATIONS),
            ("packing", PACKINGS),
            ("dtype", ("float32", "bfloat16", "float16")),
        ):
            if getattr(self, name) not in allowed:
                raise RopeError(
                    f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}."
                )
        for name, least in (
            ("eval_windows", 1),
            ("eval_targets", 1),
            ("eval_passkeys", 0),
            ("factor", 1),
            ("target_length", 1),
            ("sequence_length", 2),
            ("lora_rank", 1),
            ("loss_chunk", 1),
        ):
            value = getattr(self, name)
            if value is not None and not value >= least:
                raise RopeError(f"{name} must be at least {least}, got {value!r}.")
        if not 0 <= self.lora_dropout < 1:
            raise RopeError(f"lora_dropout must be from 0 to below 1, got {self.lora_dropout!r}.")
        self._require_consistent()

    def _require_consistent(self) -> None:
        if self.factor is not None and self.target_length is not None:
            raise RopeError("give factor or target_length, not both.")
        if self.quantize != "none" and self.adapter == "full":
            raise RopeError("quantized weights cannot be trained; use an adapter.")
        if self.pose_length is not None and (self.mixed_windows or self.shifted_groups):
            raise RopeError(
                "pose_length trains on few tokens, mixed_windows and shifted_groups on the whole "
                "length; choose one."
            )
        if self.mixed_windows is not None and self.shifted_groups is not None:
            raise RopeError("mixed_windows and shifted_groups cannot be combined.")
        if self.factor_schedule is not None:
            if self.factor is not None or self.target_length is not None:
                raise RopeError("factor_schedule sets the factors; leave factor and target out.")
            if self.sequence_length is not None or self.pose_length is not None:
                raise RopeError("factor_schedule sets the length of each stage's sequences.")
            self.stages()

    def stages(self) -> list[tuple[float, int]]:
        """Return the factors of the schedule, ascending, and the steps of each.

        Raises:
            RopeError: If it is not of the form 2:200,4:200.
        """
        stages = []
        for part in (self.factor_schedule or "").split(","):
            factor, _, steps = part.partition(":")
            try:
                stages.append((float(factor), int(steps)))
            except ValueError:
                raise RopeError(
                    f"factor_schedule: {part!r} is not factor:steps, as in 2:200,4:200."
                ) from None
        factors = [factor for factor, _ in stages]
        if factors != sorted(set(factors)) or factors[0] < 1 or min(s for _, s in stages) < 1:
            raise RopeError(
                f"factor_schedule needs factors of at least 1 that grow, and steps of at least 1, "
                f"got {self.factor_schedule!r}."
            )
        return stages

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON data."""
        return asdict(self)


def parse(words: Sequence[str], config: Path | None = None) -> tuple[Recipe, Any]:
    """Return a recipe and transformers' TrainingArguments from a YAML file and flags.

    Flags have the names of the fields of both and win over the file.

    Args:
        words: Flags and their values.
        config: A YAML file of those fields.

    Raises:
        RopeError: If a name or a value is not known.
    """
    from transformers import HfArgumentParser, TrainingArguments

    known = {one.name: one for cls in (Recipe, TrainingArguments) for one in fields(cls)}
    values = {**DEFAULTS, **_read_yaml(config)}
    for name in values:
        _require_known(name, list(known))
    parser = HfArgumentParser((Recipe, TrainingArguments), add_help=False, allow_abbrev=False)
    parser.error = _refuse
    parser.set_defaults(**{name: _typed(name, value, parser) for name, value in values.items()})
    recipe, training, rest = parser.parse_args_into_dataclasses(
        list(words), return_remaining_strings=True
    )
    for word in rest:
        _require_known(word.lstrip("-").partition("=")[0], list(known))
        raise RopeError(f"unexpected {word!r}.")
    return recipe, training


def describe_flags() -> list[tuple[str, str, str]]:
    """Return the recipe's fields: name, default and what it says."""
    text = " ".join((Recipe.__doc__ or "").partition("Args:")[2].split())
    found = []
    names = [one.name for one in fields(Recipe)]
    for name, following in zip(names, [*names[1:], ""], strict=True):
        _, _, after = text.partition(f"{name}: ")
        says = after.partition(f" {following}: ")[0] if following else after
        found.append((name, repr(getattr(Recipe(), name)), says))
    return found


def _read_yaml(config: Path | None) -> dict[str, Any]:
    if config is None:
        return {}
    import yaml

    try:
        values = yaml.safe_load(config.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RopeError(f"cannot read the recipe {str(config)!r}: {error}") from error
    if not isinstance(values, dict):
        raise RopeError(f"the recipe {str(config)!r} is not a list of name: value.")
    return values


def _typed(name: str, value: Any, parser: Any) -> Any:
    """Return a value from YAML, checked by the type that the flag has."""
    action = next(action for action in parser._actions if action.dest == name)
    if value is None or isinstance(value, dict) or action.type is None:
        return value
    if isinstance(value, list):
        return [action.type(one) for one in value]
    try:
        # YAML reads 1e-4 as text
        typed = action.type(str(value)) if isinstance(value, str | bool) else action.type(value)
    except (TypeError, ValueError) as error:
        raise RopeError(f"{name}: {value!r} is not a {action.type.__name__}.") from error
    if isinstance(value, float) and typed != value:
        raise RopeError(f"{name}: {value!r} is not a {action.type.__name__}.")
    return [typed] if action.nargs == "+" else typed


def _require_known(name: str, known: list[str]) -> None:
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise RopeError(f"{name!r} is neither a field of a recipe nor of TrainingArguments.{hint}")


def _refuse(message: str) -> None:
    raise RopeError(message)
