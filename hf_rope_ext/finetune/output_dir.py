"""A run's output directory: its recipe, its checkpoints, and whether a run may use it."""

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers.trainer_callback import TrainerState

from hf_rope_ext.errors import RopeError
from hf_rope_ext.finetune.recipe import Recipe

RECIPE = "recipe.json"

STATE = "trainer_state.json"
"""The file that Trainer writes last in a checkpoint."""

TRAINING_SETTINGS = (
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
"""TrainingArguments that a resumed run must share with the run it resumes."""


def collect_settings(recipe: Recipe, training: Any) -> dict[str, Any]:
    """Return, as JSON data, the settings that must not change when a run is resumed."""
    settings = asdict(recipe) | {name: getattr(training, name) for name in TRAINING_SETTINGS}
    del settings["resume"]
    return json.loads(json.dumps(settings, default=str))  # type: ignore[no-any-return]


def require_usable(directory: Path, settings: dict[str, Any], resume: bool) -> None:
    """Check that a run can be started or resumed in a directory.

    Raises:
        RopeError: If it is not writable, or holds another run or one with other settings.
    """
    parent = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    # access: no file is made before everything else is checked
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise RopeError(f"output_dir: {str(directory)!r} is not writable.")
    path = directory / RECIPE
    if not path.is_file():
        if find_last_checkpoint(directory) is not None:
            raise RopeError(f"{str(directory)!r} holds checkpoints of another program.")
        return
    if not resume:
        raise RopeError(
            f"{str(directory)!r} already holds a run; resume it with --resume (resume=True in "
            f"Python), or choose another output_dir."
        )
    before = json.loads(path.read_text())
    changes = [
        f"{name} was {before.get(name)!r}"
        for name, value in settings.items()
        if value != before.get(name)
    ]
    if changes:
        raise RopeError(
            f"{str(directory)!r} cannot be resumed with other settings: {'; '.join(changes)}."
        )


def write_settings(directory: Path, settings: dict[str, Any]) -> None:
    """Write what `collect_settings` returned for a later run to compare with."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / RECIPE).write_text(json.dumps(settings, indent=2) + "\n")


def find_last_checkpoint(directory: Path) -> Path | None:
    """Return the last complete checkpoint, or None.

    A run killed while saving leaves a checkpoint with no state or half of it, which is skipped.
    """
    checkpoints = {
        int(number): path
        for path in directory.glob("checkpoint-*")
        if (number := path.name.removeprefix("checkpoint-")).isdigit()
    }
    for _, path in sorted(checkpoints.items(), reverse=True):
        try:
            TrainerState.load_from_json(str(path / STATE))
        except (OSError, ValueError, TypeError):
            continue
        return path
    return None
