"""RULER's question answering over a SQuAD or HotpotQA file of the user."""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from hf_rope_ext.checks import require_choice
from hf_rope_ext.errors import RopeError
from hf_rope_ext.evals.tasks.base import DocumentTask, Draft, Place
from hf_rope_ext.evals.tasks.scorers import string_match_part
from hf_rope_ext.evals.text import read_text

ONLY = "Only give me the answer and do not output any other words."
PROMPT = (
    f"Answer the question based on the given documents. {ONLY}\n\nThe following are given "
    f"documents.\n\n{{context}}\n\nAnswer the question based on the given documents. {ONLY}\n\n"
    f"Question: {{query}}"
)
SHUFFLE_SEED = 42


@dataclass(frozen=True)
class Question:
    """A question, with indices of the documents it needs and of others in the same article."""

    query: str
    answers: tuple[str, ...]
    context: tuple[int, ...]
    more: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class RulerQA(DocumentTask):
    """RULER: question answering over many documents, few of them relevant (unit: a document).

    Args:
        data: Local JSON file in SQuAD 2.0 or HotpotQA (distractor setting) format.
        layout: ``"squad"`` or ``"hotpotqa"``.
    """

    max_new_tokens: int = 32
    data: str = ""
    layout: str = "squad"

    smallest = 1

    def check(self) -> None:
        """Check the file of questions."""
        require_choice("layout", self.layout, READERS)
        if not self.data:
            raise RopeError(f"data must be a local JSON file in the {self.layout} format.")
        self._read()

    def draft(self, draw: random.Random, size: int, place: Place) -> Draft:
        """Return a question over ``size`` documents, or over those it needs if that is more."""
        questions, documents = self._read()
        asked = questions[place.index % len(questions)]
        chosen = [documents[number] for number in choose(draw, asked, len(documents), size)]
        random.Random(SHUFFLE_SEED).shuffle(chosen)
        context = "\n\n".join(
            f"Document {number}:\n{text}" for number, text in enumerate(chosen, start=1)
        )
        return Draft(
            prompt=PROMPT.format(context=context, query=asked.query),
            answer=" Answer:",
            target=f" {asked.answers[0]}",
            gold=asked.answers,
            metadata={"data": Path(self.data).name, "documents": len(chosen)},
        )

    def largest(self, place: Place) -> int:
        """Return the total number of documents."""
        return len(self._read()[1])

    def _read(self) -> tuple[list[Question], list[str]]:
        return _parse(read_text(self.data), self.data, self.layout)

    def score(self, gold: tuple[str, ...], prediction: str) -> dict[str, float]:
        """Return 1 if the prediction contains any of the answers."""
        return {"score": string_match_part(prediction, gold)}


def choose(draw: random.Random, asked: Question, documents: int, size: int) -> list[int]:
    """Return the documents of a prompt: those needed, then others of their article, then any."""
    needed, more = list(asked.context), list(asked.more)
    if size >= documents:
        return list(range(documents))
    if size - len(needed) > len(more):
        others = [number for number in range(documents) if number not in {*needed, *more}]
        return needed + more + draw.sample(others, size - len(needed) - len(more))
    return needed + draw.sample(more, max(0, size - len(needed)))


@cache
def _parse(text: str, path: str, layout: str) -> tuple[list[Question], list[str]]:
    try:
        questions, documents = READERS[layout](json.loads(text))
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise RopeError(f"cannot read {path!r} as a {layout} file: {error!r}") from error
    if not questions:
        raise RopeError(f"{path!r} contains no answerable question.")
    return questions, documents


def _squad(content: Any) -> tuple[list[Question], list[str]]:
    articles = [[part["context"] for part in entry["paragraphs"]] for entry in content["data"]]
    documents = sorted({text for texts in articles for text in texts})
    number = {text: index for index, text in enumerate(documents)}
    questions = []
    for entry, texts in zip(content["data"], articles, strict=True):
        for part in entry["paragraphs"]:
            needed = number[part["context"]]
            more = tuple(number[text] for text in texts if number[text] != needed)
            for asked in part["qas"]:
                if not asked.get("is_impossible"):
                    answers = tuple(answer["text"] for answer in asked["answers"])
                    questions.append(Question(asked["question"], answers, (needed,), more))
    return questions, documents


def _hotpotqa(content: Any) -> tuple[list[Question], list[str]]:
    texts = [[f"{title}\n{''.join(part)}" for title, part in row["context"]] for row in content]
    documents = sorted({text for context in texts for text in context})
    number = {text: index for index, text in enumerate(documents)}
    questions = [
        Question(row["question"], (row["answer"],), tuple(number[text] for text in context))
        for row, context in zip(content, texts, strict=True)
    ]
    return questions, documents


READERS: dict[str, Callable[[Any], tuple[list[Question], list[str]]]] = {
    "squad": _squad,
    "hotpotqa": _hotpotqa,
}
