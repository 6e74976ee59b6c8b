"""``hf-rope eval``: lm-eval's own command, with `RopeHFLM` and our tasks in it.

lm-eval 0.4.13 looks for models only among its own, and for tasks of others only where
``--include_path`` points.
"""

import hashlib
import json
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

from hf_rope_ext.errors import RopeError


def launch(words: Sequence[str]) -> None:
    """Run lm-eval's command.

    Args:
        words: Its arguments. ``--model`` is ``hf_rope`` if not given.

    Raises:
        RopeError: If lm-eval is not installed, or an argument would give wrong numbers in silence.
    """
    try:
        from lm_eval._cli import HarnessCLI
        from lm_eval.utils import setup_logging

        import hf_rope_ext.evals.lm_eval.model  # noqa: F401 - makes the model known
        from hf_rope_ext.evals.lm_eval.tasks import TASK_DIRECTORY
    except ImportError as error:
        raise RopeError(f"lm-eval is needed: pip install 'hf-rope-ext[eval]' ({error})") from error
    setup_logging()
    sys.argv = ["lm-eval", *words]
    command = HarnessCLI()
    arguments = command.parse_args()
    if "include_path" in arguments:
        _add_tasks(arguments, str(TASK_DIRECTORY))
    if arguments.command != "run":
        command.execute(arguments)
        return
    settings = _settings(arguments)
    arguments.model = settings.get("model") or "hf_rope"
    tasks = _names(settings.get("tasks"))
    ours = _known(arguments.include_path, tasks)
    if settings.get("cache_requests") and ours:
        raise RopeError(
            f"--cache_requests keeps prompts under the name of their task alone, so "
            f"{', '.join(sorted(ours))} would be asked at the lengths of an earlier run; leave "
            f"it out."
        )
    if settings.get("use_cache"):
        arguments.use_cache = _cache_of(settings)
    with _stock_tasks_left_out(len(ours) == len(tasks) > 0):
        command.execute(arguments)


def _settings(arguments: Namespace) -> dict[str, Any]:
    """Return arguments, and under those not given what a ``--config`` file says."""
    from lm_eval.config.evaluate_config import EvaluatorConfig

    path = getattr(arguments, "config", None)
    settings = EvaluatorConfig.load_yaml_config(path) if path else {}
    given = {name: value for name, value in vars(arguments).items() if value is not None}
    return {**settings, **given}


def _add_tasks(arguments: Namespace, ours: str) -> None:
    """Put our directory of tasks beside the one the user names."""
    from lm_eval.config.evaluate_config import EvaluatorConfig

    named = arguments.include_path
    if named is None and getattr(arguments, "config", None):
        named = EvaluatorConfig.load_yaml_config(arguments.config).get("include_path")
    arguments.include_path = [ours, *([] if named is None else [named])]


def _names(tasks: str | Sequence[Any] | None) -> list[str]:
    listed = [tasks] if isinstance(tasks, str) else list(tasks or ())
    return [name for entry in listed for name in str(entry).split(",")]


def _known(paths: list[str], tasks: list[str]) -> set[str]:
    """Return those of the tasks that are found without lm-eval's own."""
    from lm_eval.tasks import TaskManager

    index = TaskManager(include_path=paths, include_defaults=False)
    return {name for name in tasks if not name.endswith(".yaml") and index.match_tasks([name])}


def _cache_of(settings: dict[str, Any]) -> str:
    """Return a cache of answers for this model only; lm-eval would share one between models."""
    model = {"model": settings.get("model"), "arguments": settings.get("model_args")}
    text = json.dumps(model, sort_keys=True, default=str)
    return f"{settings['use_cache']}_{hashlib.sha256(text.encode()).hexdigest()[:12]}"


@contextmanager
def _stock_tasks_left_out(all_ours: bool) -> Iterator[None]:
    """Spare reading lm-eval's 14,000 task files where none of them is asked for."""
    import lm_eval.tasks

    if not all_ours:
        yield
        return
    without = partial(lm_eval.tasks.TaskManager, include_defaults=False)
    with patch.object(lm_eval.tasks, "TaskManager", without):
        yield
