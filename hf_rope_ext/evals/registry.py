"""The registry of evaluation tasks: a new task is a class and a line here."""

from collections.abc import Iterable
from dataclasses import fields, replace
from typing import Any

from hf_rope_ext.checks import suggest
from hf_rope_ext.errors import RopeError
from hf_rope_ext.evals.perplexity import (
    LongPerplexity,
    Perplexity,
    ShortPerplexity,
    SlidingPerplexity,
)
from hf_rope_ext.evals.tasks.babi import Babi
from hf_rope_ext.evals.tasks.base import FrameTask, Task
from hf_rope_ext.evals.tasks.chain import Chain
from hf_rope_ext.evals.tasks.kv import KeyValue
from hf_rope_ext.evals.tasks.needle import Needle
from hf_rope_ext.evals.tasks.numbers import Arithmetic, ItemSequence
from hf_rope_ext.evals.tasks.passkey import Passkey, TeacherForcedPasskey
from hf_rope_ext.evals.tasks.ruler_needle import RulerNeedle
from hf_rope_ext.evals.tasks.ruler_qa import RulerQA
from hf_rope_ext.evals.tasks.ruler_words import CommonWords, FrequentWords, VariableTracking
from hf_rope_ext.evals.tasks.visual_needle import VisualNeedle
from hf_rope_ext.evals.text_passkey import TextPasskey
from hf_rope_ext.parsing import parse_task

TASKS: dict[str, Task] = {
    "perplexity": Perplexity(),
    "passkey": TextPasskey(),
    "rope_ppl": SlidingPerplexity(),
    "rope_longppl": LongPerplexity(),
    "rope_short": ShortPerplexity(),
    "rope_passkey": Passkey(),
    "rope_passkey_ll": TeacherForcedPasskey(),
    "rope_needle": Needle(),
    "rope_needle_multi": Needle(needles=4, max_new_tokens=96),
    "rope_kv": KeyValue(),
    "rope_ruler_niah_single_1": RulerNeedle(),
    "rope_ruler_niah_single_2": RulerNeedle(hay="essay"),
    "rope_ruler_niah_single_3": RulerNeedle(hay="essay", value="uuids"),
    "rope_ruler_niah_multikey_1": RulerNeedle(hay="essay", keys=4),
    "rope_ruler_niah_multikey_2": RulerNeedle(hay="needle"),
    "rope_ruler_niah_multikey_3": RulerNeedle(hay="needle", key="uuids", value="uuids"),
    "rope_ruler_niah_multivalue": RulerNeedle(hay="essay", values=4),
    "rope_ruler_niah_multiquery": RulerNeedle(hay="essay", keys=4, queries=4),
    "rope_ruler_vt": VariableTracking(),
    "rope_ruler_cwe": CommonWords(),
    "rope_ruler_fwe": FrequentWords(),
    "rope_ruler_qa_1": RulerQA(layout="squad"),
    "rope_ruler_qa_2": RulerQA(layout="hotpotqa"),
    "rope_add": Arithmetic(),
    "rope_compare": Arithmetic(operation="compare"),
    "rope_copy": ItemSequence(),
    "rope_sort": ItemSequence(operation="sort"),
    "rope_babi_qa1": Babi(facts=1),
    "rope_babi_qa2": Babi(facts=2),
    "rope_babi_qa3": Babi(facts=3),
    "rope_cot_chain": Chain(),
    "rope_cot_chain_cot": Chain(mode="cot", max_new_tokens=160),
    "rope_cot_chain_maj": Chain(mode="maj", max_new_tokens=160),
    "rope_vniah": VisualNeedle(),
    "rope_vniah_d": VisualNeedle(period=8),
}
"""Every task by name, with its default options."""

GROUPS: dict[str, list[str]] = {
    "rope_ruler": [name for name in TASKS if name.startswith("rope_ruler_")],
    "rope_ruler_offline": [
        name for name in TASKS if name.startswith("rope_ruler_") and "_qa_" not in name
    ],
    "rope_babi": [name for name in TASKS if name.startswith("rope_babi_")],
}
"""Names that stand for several tasks."""


def make_task(name: str, **options: Any) -> Task:
    """Return a task with some options changed.

    Args:
        name: One of `TASKS`, such as ``"rope_passkey"``.
        **options: Fields of the task; lists become tuples.

    Raises:
        RopeError: If the task or an option is unknown, or an option is out of range.
    """
    require_known(name, TASKS)
    task = TASKS[name]
    known = option_names(task)
    for option in options:
        if option not in known:
            raise RopeError(
                f"{name} has no option {option!r}.{suggest(option, known)} Options: "
                f"{', '.join(known)}."
            )
    values: dict[str, Any] = {
        option: tuple(value) if isinstance(value, list) else value
        for option, value in options.items()
    }
    task = replace(task, **values)
    task.check()
    return task


def option_names(task: Task) -> list[str]:
    """Return the options of a task."""
    return [option.name for option in fields(task) if option.init]


def require_known(name: str, known: Iterable[str]) -> None:
    """Check the name of a task.

    Raises:
        RopeError: If it is unknown; the message suggests the closest name.
    """
    known = list(known)
    if name not in known:
        raise RopeError(f"unknown task {name!r}.{suggest(name, known)} Known: {', '.join(known)}.")


def needs_processor(specifications: Iterable[str]) -> bool:
    """Return whether any of the tasks shows images, as in ``["rope_vniah:pixels=56"]``."""
    names = [parse_task(specification)[0] for specification in specifications]
    return any(isinstance(TASKS.get(name), FrameTask) for name in names)


def describe_tasks() -> dict[str, str]:
    """Return a one-sentence description of every task, and the members of every group."""
    documentation = {name: type(task).__doc__ or "" for name, task in TASKS.items()}
    summaries = {
        name: " ".join(text.partition("\n\n")[0].split()) for name, text in documentation.items()
    }
    return summaries | {name: f"All of {', '.join(tasks)}." for name, tasks in GROUPS.items()}
