"""``hf-rope eval``: lm-eval's command, extended by `RopeHFLM` and our tasks.

lm-eval 0.4.13 has no plugin models, and finds other tasks only through ``--include_path``.
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
        words: Arguments of the command; ``--model`` defaults to ``hf_rope``.

    Raises:
        RopeError: If lm-eval is not installed, or an argument would silently give wrong results.
    """
    try:
        from lm_eval._cli import HarnessCLI
        from lm_eval.utils import setup_logging

        import hf_rope_ext.evals.lm_eval.model  # noqa: F401 - registers the model
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
            f"--cache_requests caches prompts by task name only, so {', '.join(sorted(ours))} "
            f"would reuse the lengths of an earlier run; omit it."
        )
    if settings.get("use_cache"):
        arguments.use_cache = _cache_of(settings)
    with _without_stock_tasks(len(ours) == len(tasks) > 0):
        command.execute(arguments)


def _settings(arguments: Namespace) -> dict[str, Any]:
    """Return the arguments, completed by a ``--config`` file."""
    from lm_eval.config.evaluate_config import EvaluatorConfig

    path = getattr(arguments, "config", None)
    settings = EvaluatorConfig.load_yaml_config(path) if path else {}
    return settings | {name: value for name, value in vars(arguments).items() if value is not None}


def _add_tasks(arguments: Namespace, ours: str) -> None:
    """Add our directory of tasks to the user's."""
    from lm_eval.config.evaluate_config import EvaluatorConfig

    path = arguments.include_path
    if path is None and getattr(arguments, "config", None):
        path = EvaluatorConfig.load_yaml_config(arguments.config).get("include_path")
    arguments.include_path = [ours, *([] if path is None else [path])]


def _names(tasks: str | Sequence[Any] | None) -> list[str]:
    listed = [tasks] if isinstance(tasks, str) else list(tasks or ())
    return [name for entry in listed for name in str(entry).split(",")]


def _known(paths: list[str], tasks: list[str]) -> set[str]:
    """Return the tasks that do not come with lm-eval."""
    from lm_eval.tasks import TaskManager

    index = TaskManager(include_path=paths, include_defaults=False)
    return {name for name in tasks if not name.endswith(".yaml") and index.match_tasks([name])}


def _cache_of(settings: dict[str, Any]) -> str:
    """Return a cache path that is specific to the model; lm-eval shares one across models."""
    model = {"model": settings.get("model"), "arguments": settings.get("model_args")}
    text = json.dumps(model, sort_keys=True, default=str)
    return f"{settings['use_cache']}_{hashlib.sha256(text.encode()).hexdigest()[:12]}"


@contextmanager
def _without_stock_tasks(all_ours: bool) -> Iterator[None]:
    """Avoid reading lm-eval's 14,000 task files if none of them is needed."""
    import lm_eval.tasks

    if not all_ours:
        yield
        return
    without = partial(lm_eval.tasks.TaskManager, include_defaults=False)
    with patch.object(lm_eval.tasks, "TaskManager", without):
        yield
