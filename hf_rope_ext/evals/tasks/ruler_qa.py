"""RULER's question answering over the user's own SQuAD or HotpotQA file."""

import json
import random
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from hf_rope_ext.errors import RopeError
from hf_rope_ext.evals.tasks.base import Draft, Place, Task
from hf_rope_ext.evals.tasks.scorers import string_match_part

ONLY = "Only give me the answer and do not output any other words."
PROMPT = (
    f"Answer the question based on the given documents. {ONLY}\n\nThe following are given "
    f"documents.\n\n{{context}}\n\nAnswer the question based on the given documents. {ONLY}\n\n"
    f"Question: {{query}}"
)
SHUFFLE_SEED = 42


@dataclass(frozen=True)
class Question:
    """One question, and the documents it needs and those of the same article, by number."""

    query: str
    answers: tuple[str, ...]
    context: tuple[int, ...]
    more: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class RulerQA(Task):
    """Answer from documents of which few matter; the unit is one document.

    Args:
        data: A local JSON file in the format of SQuAD 2.0 or of HotpotQA (distractor setting).
        layout: Which of the two it is.
    """

    max_new_tokens: int = 32
    data: str = ""
    layout: str = "squad"

    smallest = 1

    def check(self) -> None:
        """Check that there is a file of questions."""
        if not self.data:
            raise RopeError(f"data must be a local JSON file in the {self.layout} format.")
        _read(self.data, self.layout)

    def draft(self, draw: random.Random, size: int, place: Place) -> Draft:
        """Return a question over ``size`` documents, or over those it needs if they are more."""
        questions, documents = _read(self.data, self.layout)
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
        """Return the number of documents there are."""
        return len(_read(self.data, self.layout)[1])

    def score(self, gold: tuple[str, ...], prediction: str) -> dict[str, float]:
        """Return 1 if any of the answers occurs."""
        return {"score": string_match_part(prediction, gold)}


def choose(draw: random.Random, asked: Question, documents: int, size: int) -> list[int]:
    """Return the documents of a prompt: those needed, then their article's, then any."""
    needed, more = list(asked.context), list(asked.more)
    if size >= documents:
        return list(range(documents))
    if size - len(needed) > len(more):
        others = [number for number in range(documents) if number not in {*needed, *more}]
        return needed + more + draw.sample(others, size - len(needed) - len(more))
    return needed + draw.sample(more, max(0, size - len(needed)))


@cache
def _read(path: str, layout: str) -> tuple[list[Question], list[str]]:
    readers = {"squad": _squad, "hotpotqa": _hotpotqa}
    if layout not in readers:
        raise RopeError(f"layout must be 'squad' or 'hotpotqa', got {layout!r}.")
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        questions, documents = readers[layout](content)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise RopeError(f"cannot read {path!r} as a {layout} file: {error!r}") from error
    if not questions:
        raise RopeError(f"{path!r} holds no question that has an answer.")
    return questions, documents


def _squad(content: Any) -> tuple[list[Question], list[str]]:
    articles = [[part["context"] for part in entry["paragraphs"]] for entry in content["data"]]
    documents = sorted({text for texts in articles for text in texts})
    number = {text: index for index, text in enumerate(documents)}
    questions = []
    for entry, texts in zip(content["data"], articles, strict=True):
        for part in entry["paragraphs"]:
            own = number[part["context"]]
            more = tuple(number[text] for text in texts if number[text] != own)
            for asked in part["qas"]:
                if not asked.get("is_impossible"):
                    answers = tuple(answer["text"] for answer in asked["answers"])
                    questions.append(Question(asked["question"], answers, (own,), more))
    return questions, documents


def _hotpotqa(content: Any) -> tuple[list[Question], list[str]]:
    texts = [[f"{title}\n{''.join(part)}" for title, part in one["context"]] for one in content]
    documents = sorted({text for own in texts for text in own})
    number = {text: index for index, text in enumerate(documents)}
    questions = [
        Question(one["question"], (one["answer"],), tuple(number[text] for text in own))
        for one, own in zip(content, texts, strict=True)
    ]
    return questions, documents
