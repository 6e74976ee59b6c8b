"""The settings of a fine-tune, from a YAML file, flags or Python."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from hf_rope_ext.checks import require_choice, require_integer, require_number, suggest
from hf_rope_ext.errors import RopeError
from hf_rope_ext.finetune.lora import ADAPTERS
from hf_rope_ext.finetune.sequences import PACKINGS
from hf_rope_ext.models import host

LOSSES = ("chunked", "liger", "plain")
QUANTIZATIONS = ("none", "4bit", "8bit")
DTYPES = ("float32", "bfloat16", "float16")

DEFAULTS: dict[str, Any] = {
    # YaRN (arXiv:2309.00071, sec. 4.1): 400 steps at 2e-5 with 20 to warm up; LongLoRA's scripts
    # use the same rate with LoRA
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
"""Defaults for transformers' TrainingArguments that differ from transformers' own."""


def _option(default: Any, text: str) -> Any:
    """Return a dataclass field with a default and its help text."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Recipe:
    """The settings of a fine-tune that are not in transformers' ``TrainingArguments``.

    Each field's metadata holds its help text, which ``hf-rope finetune --fields`` lists.
    """

    model: str = _option("", "Directory or hub id of the base model.")
    data: str = _option(
        "",
        "Text, JSONL or Parquet file, directory of such files or of a saved dataset, or hub "
        "id of a dataset.",
    )
    method: str = _option("yarn", "RoPE method, with options after colons: yarn:beta_fast=16.")
    factor: float | None = _option(None, "Target length over trained length.")
    target_length: int | None = _option(None, "Target length in positions, instead of factor.")
    original_max_position_embeddings: int | None = _option(
        None, "Trained length, if not the config's."
    )
    temperature: str = _option("rotation", "Where a method's temperature goes: rotation or logits.")
    replace: bool = _option(False, "Replace a scaling in the model's own config.")
    sequence_length: int | None = _option(None, "Tokens per sequence; default: target length.")
    adapter: str = _option("lora", "lora, rslora, dora, or full to train the whole text model.")
    lora_rank: int = _option(8, "Rank of the adapter.")
    lora_alpha: float = _option(16.0, "LoRA's alpha; updates are scaled by alpha / rank.")
    lora_dropout: float = _option(0.0, "Dropout on the adapter's input.")
    lora_targets: list[str] = field(
        default_factory=lambda: ["attention"],
        metadata={"help": "attention, all-linear, or module names."},
    )
    train_norms_and_embeddings: bool = _option(False, "Also train norms and embedding (LongLoRA).")
    quantize: str = _option("none", "none, 4bit or 8bit for the frozen weights (bitsandbytes).")
    dtype: str = _option(
        "float32",
        "Dtype of the frozen weights: float32, bfloat16 or float16. Adapters train in "
        "float32; with adapter=full all weights have this dtype.",
    )
    attention: str | None = _option(None, "attn_implementation; transformers' choice by default.")
    column: str = _option("text", "Dataset column with the text or the chat messages.")
    separator: str | None = _option(None, "String that separates documents within a text file.")
    chat: bool = _option(False, "The column holds messages to format with the chat template.")
    answers_only: bool = _option(False, "Train only on the assistant's tokens of a chat.")
    dataset_split: str = _option("train", "Split of the dataset.")
    packing: str = _option("join", "join documents end to end, or cut each separately.")
    held_out: float = _option(0.02, "Share of the tokens held out for evaluation.")
    cache: str | None = _option(None, "Directory for tokenized data; datasets' cache by default.")
    pose_length: int | None = _option(
        None, "Train on this many tokens, with positions that skip over the target length (PoSE)."
    )
    shifted_groups: int | None = _option(None, "Shifted groups of training attention (S2-Attn).")
    mixed_windows: float | None = _option(
        None,
        "Share of the sequences cut to the trained length and run with the original "
        "frequencies (LongRoPE2).",
    )
    factor_schedule: str | None = _option(None, "Successive factors with their steps: 2:200,4:200.")
    loss: str = _option("chunked", "chunked, liger (needs liger-kernel) or plain.")
    loss_chunk: int = _option(512, "Tokens whose logits are in memory at once.")
    eval_lengths: str | None = _option(
        None,
        "Lengths to evaluate at, in tokens or multiples of the trained length (512,2x); by "
        "default the trained length, doubled up to twice the target.",
    )
    eval_windows: int = _option(16, "Text windows over which perplexity is measured.")
    eval_targets: int = _option(64, "Tokens scored in each window.")
    eval_passkeys: int = _option(20, "Passkey prompts per length; 0 to skip the task.")
    check_memory: bool = _option(True, "Refuse to start a run that will not fit in memory.")
    resume: bool = _option(False, "Resume from the last complete checkpoint in output_dir, if any.")

    def __post_init__(self) -> None:
        """Check everything that does not depend on a model.

        Raises:
            RopeError: If a value is not allowed, or two values contradict each other.
        """
        for name, choices in (
            ("adapter", ADAPTERS),
            ("loss", LOSSES),
            ("quantize", QUANTIZATIONS),
            ("packing", PACKINGS),
            ("dtype", DTYPES),
        ):
            require_choice(name, getattr(self, name), choices)
        for name in ("eval_windows", "eval_targets", "lora_rank", "loss_chunk"):
            require_integer(name, getattr(self, name), 1)
        require_integer("eval_passkeys", self.eval_passkeys, 0)
        for name, least in (("target_length", 1), ("sequence_length", 2)):
            if getattr(self, name) is not None:
                require_integer(name, getattr(self, name), least)
        if self.factor is not None:
            require_number("factor", self.factor, least=1)
        if self.mixed_windows is not None:
            require_number("mixed_windows", self.mixed_windows, above=0, below=1)
        require_number("lora_dropout", self.lora_dropout, least=0, below=1)
        require_number("held_out", self.held_out, above=0, below=1)
        self._require_consistent()

    def _require_consistent(self) -> None:
        if self.factor is not None and self.target_length is not None:
            raise RopeError("give factor or target_length, not both.")
        if self.quantize != "none" and self.adapter == "full":
            raise RopeError("quantized weights cannot be trained; use an adapter.")
        if self.pose_length is not None and (self.mixed_windows or self.shifted_groups):
            raise RopeError(
                "pose_length trains on short sequences, but mixed_windows and shifted_groups need "
                "the full length; choose one."
            )
        if self.mixed_windows is not None and self.shifted_groups is not None:
            raise RopeError("mixed_windows and shifted_groups cannot be combined.")
        if self.factor_schedule is not None:
            if self.factor is not None or self.target_length is not None:
                raise RopeError("factor_schedule sets the factors; omit factor and target_length.")
            if self.sequence_length is not None or self.pose_length is not None:
                raise RopeError(
                    "factor_schedule sets the sequence length of each stage; omit sequence_length "
                    "and pose_length."
                )
            self.stages()

    def stages(self) -> list[tuple[float, int]]:
        """Return the factors of the schedule, ascending, each with its number of steps.

        Raises:
            RopeError: If the schedule is not of the form 2:200,4:200.
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
                f"factor_schedule needs increasing factors and steps, all of at least 1, got "
                f"{self.factor_schedule!r}."
            )
        return stages


def parse(words: Sequence[str], config: Path | None = None) -> tuple[Recipe, Any]:
    """Return a recipe and transformers' TrainingArguments from a file and flags.

    Flags are named after the fields of both classes and override the file.

    Args:
        words: Flags and their values.
        config: A YAML or JSON file with values for those fields.

    Raises:
        RopeError: If a name is unknown or a value is invalid.
    """
    from transformers import HfArgumentParser, TrainingArguments

    known = [field.name for cls in (Recipe, TrainingArguments) for field in fields(cls)]
    parser = HfArgumentParser((Recipe, TrainingArguments), add_help=False, allow_abbrev=False)
    parser.error = _refuse
    parser.set_defaults(**{host.training_setting(name): value for name, value in DEFAULTS.items()})
    file_words = []
    for given, value in _read_file(config).items():
        name = host.training_setting(given) if isinstance(given, str) else given
        _require_known(name, known)
        if value is None or isinstance(value, dict):  # flags cannot express these
            parser.set_defaults(**{name: value})
        elif isinstance(value, list):
            file_words += [f"--{name}", *map(str, value)]
        else:
            file_words.append(f"--{name}={value}")
    renamed = [_rename(word) if word.startswith("--") else word for word in words]
    for source in (file_words, renamed):
        values, rest = parser.parse_known_args(source)
        for word in rest:
            if word.startswith("-"):
                _require_known(word.lstrip("-").partition("=")[0], known)
            raise RopeError(f"unexpected {word!r}.")
        parser.set_defaults(**vars(values))
    recipe, training = parser.parse_args_into_dataclasses([], look_for_args_file=False)
    return recipe, training


def describe_flags() -> list[tuple[str, str, str]]:
    """Return name, default and help text of each field of a recipe."""
    defaults = Recipe()
    return [
        (field.name, repr(getattr(defaults, field.name)), field.metadata["help"])
        for field in fields(Recipe)
    ]


def _read_file(config: Path | None) -> dict[str, Any]:
    if config is None:
        return {}
    import yaml

    try:
        values = yaml.safe_load(config.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RopeError(f"cannot read the recipe {str(config)!r}: {error}") from error
    if not isinstance(values, dict):
        raise RopeError(f"the recipe {str(config)!r} must map field names to values.")
    return values


def _rename(flag: str) -> str:
    name, equals, value = flag.removeprefix("--").partition("=")
    return f"--{host.training_setting(name)}{equals}{value}"


def _require_known(name: object, known: list[str]) -> None:
    if name not in known:
        raise RopeError(
            f"{name!r} is not a field of a recipe or of TrainingArguments."
            + suggest(str(name), known)
        )


def _refuse(message: str) -> None:
    raise RopeError(message)
