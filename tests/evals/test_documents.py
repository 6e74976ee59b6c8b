"""Documents of a task made of words, counted by a tokenizer of words."""

import random
from dataclasses import dataclass

import pytest

from hf_rope_ext import RopeError
from hf_rope_ext.evals import registry
from hf_rope_ext.evals.documents import build, build_dataset, fit, make_document_task, score
from hf_rope_ext.evals.tasks.base import (
    DEPTHS,
    DepthTask,
    DocumentTask,
    Draft,
    FrameDraft,
    FrameTask,
    Place,
    QuestionTask,
    Task,
    TextTask,
)


class Words:
    """A word is a token; texts begin with one more unless told otherwise."""

    unk_token_id = None

    def __call__(self, text, add_special_tokens=True, verbose=True):
        assert verbose is False
        words = [len(word) for word in text.split()]
        return {"input_ids": [0] * add_special_tokens + words}


@dataclass(frozen=True, kw_only=True)
class Filler(DocumentTask):
    """Words, one a unit, then a question of three."""

    kind = "generate"
    smallest = 2
    most: int = 1 << 40
    groups: tuple = ((None, None),)
    samples: dict | None = None

    def draft(self, draw, size, place):
        body = " ".join(["w"] * size)
        number = draw.randrange(10**9)
        return Draft(
            prompt=f"{body} what is it",
            answer=" it is",
            target=" the answer",
            gold=("the", "answer"),
            metadata={"number": number, "asked": size},
        )

    def largest(self, place):
        return self.most

    def cells(self):
        return list(self.groups)

    @property
    def sampling(self):
        return self.samples


class Forced(Filler):
    kind = "loglikelihood"


def documents(task, lengths, samples=1, seed=7, tokenizer=None):
    return list(build("filler", task, tokenizer or Words(), lengths, samples, seed))


# the beginning, the question and the opening of the answer take 1 + 3 + 2 tokens
@pytest.mark.parametrize(
    ("task", "rest"),
    [
        (Filler(max_new_tokens=10), 10),
        (Filler(max_new_tokens=10, template_tokens=4), 14),
        (Forced(max_new_tokens=10), 2),
        (Forced(template_tokens=3), 5),
    ],
)
@pytest.mark.parametrize("length", [30, 31, 100, 1000])
def test_a_document_fills_its_length_to_the_word(task, rest, length):
    (document,) = documents(task, [length])

    size = length - 6 - rest
    assert document["prompt"] == " ".join(["w"] * size) + " what is it"
    assert document["tokens"] == size + 6
    assert document["metadata"]["size"] == document["metadata"]["asked"] == size


def test_a_document_says_all_that_it_depends_on():
    (document,) = documents(Filler(max_new_tokens=9, samples={"n": 3}), [40])
    number = document["metadata"].pop("number")

    assert document.pop("prompt").startswith("w w w")
    assert document == {
        "task": "filler",
        "length": 40,
        "index": 0,
        "depth": None,
        "group": None,
        "kind": "generate",
        "answer": " it is",
        "target": " the answer",
        "gold": ["the", "answer"],
        "max_new_tokens": 9,
        "tokens": 31,
        "sampling": {"n": 3},
        "metadata": {"seed": 7, "size": 25, "asked": 25},
    }
    assert number == random.Random("7/filler/40/None/None/0").randrange(10**9)


def test_lengths_take_turns_within_cells_and_cells_within_samples():
    groups = ((0.0, "a"), (1.0, "b"))
    found = documents(Filler(groups=groups), [50, 60], samples=2)

    assert [(one["index"], one["depth"], one["group"], one["length"]) for one in found] == [
        (index, depth, group, length)
        for index in range(2)
        for depth, group in groups
        for length in (50, 60)
    ]
    assert len({one["metadata"]["number"] for one in found}) == 8


@pytest.mark.parametrize(
    "change",
    [{"seed": 8}, {"lengths": [51]}, {"groups": ((0.5, None),)}, {"groups": ((None, "g"),)}],
)
def test_what_is_drawn_follows_from_seed_length_and_place(change):
    given = {"seed": 7, "lengths": [50], "groups": ((None, None),)}

    def drawn(seed, lengths, groups):
        return documents(Filler(groups=groups), lengths, seed=seed)[0]["metadata"]["number"]

    assert drawn(**given) == drawn(**given)
    assert drawn(**given) != drawn(**{**given, **change})


def test_a_task_may_run_out_of_units_or_of_room():
    (document,) = documents(Filler(most=5), [1000])
    assert document["metadata"]["size"] == 5
    (document,) = documents(Filler(max_new_tokens=4), [12])
    assert document["metadata"]["size"] == 2
    with pytest.raises(RopeError, match=r"filler: a length of 11 is too short .* at least 12 tok"):
        documents(Filler(max_new_tokens=4), [11])


def test_an_answer_without_tokens_is_refused():
    class Silent(Words):
        def __call__(self, text, **settings):
            return super().__call__("" if text == "answer" else text, **settings)

    with pytest.raises(RopeError, match=r"filler: this tokenizer has no tokens for .* 'answer'"):
        documents(Filler(), [60], tokenizer=Silent())


def test_the_next_document_is_found_near_the_last():
    class Counting(Words):
        calls = 0

        def __call__(self, text, **settings):
            Counting.calls += 1
            return super().__call__(text, **settings)

    counts = []
    for samples in (1, 2, 3):
        Counting.calls = 0
        documents(Filler(), [100_000], samples, tokenizer=Counting())
        counts.append(Counting.calls)

    first, second, third = counts[0], counts[1] - counts[0], counts[2] - counts[1]
    assert second == third <= first


@pytest.mark.parametrize("guess", [0, 2, 3, 99, 100, 10**6])
@pytest.mark.parametrize("limits", [(0, 100), (2, 100), (7, 7), (0, 1 << 40)])
def test_a_fit_asks_few_sizes_within_the_limits(limits, guess):
    smallest, largest = limits
    for budget in (-1, 0, 1, 2, 3, 50, 99, 100, 101, 5000):
        asked = []

        def tokens(size, asked=asked):
            asked.append(size)
            return size

        found = fit(tokens, budget, limits, guess)

        assert found == (None if budget < smallest else min(budget, largest))
        assert all(smallest <= size <= largest for size in asked)
        assert len(asked) <= (12 if largest < 1 << 40 else 60)


@pytest.mark.parametrize("unit", [1, 7, 40])
def test_a_fit_of_like_units_takes_few_steps(unit):
    asked = []

    def tokens(size):
        asked.append(size)
        return 11 + unit * size

    assert fit(tokens, 100_000, (0, 1 << 40), 3) == (100_000 - 11) // unit
    assert len(asked) <= 5


@pytest.mark.parametrize("guess", [0, 1, 40, 700])
@pytest.mark.parametrize(
    "count", [lambda size: max(0, size - 300), lambda size: size // 64, lambda size: size**2 // 99]
)
@pytest.mark.parametrize("largest", [500, 1 << 40])
def test_a_fit_is_found_where_units_are_unlike(count, guess, largest):
    for budget in (0, 1, 7, 200):
        found = fit(count, budget, (0, largest), guess)

        assert count(found) <= budget
        assert found == largest or count(found + 1) > budget


def test_a_data_set_is_of_a_task_of_documents(monkeypatch):
    monkeypatch.setitem(registry.TASKS, "filler", Filler())
    found = build_dataset("filler", Words(), [60.0], max_new_tokens=3)

    assert len(found) == 10
    assert found == documents(Filler(max_new_tokens=3), [60], samples=10, seed=42)
    assert type(found[0]["length"]) is int
    assert make_document_task("filler", most=3) == Filler(most=3)
    with pytest.raises(RopeError, match="samples must be an integer of at least 1, got 0"):
        build_dataset("filler", Words(), [60], samples=0)
    with pytest.raises(RopeError, match="perplexity has no text documents"):
        make_document_task("perplexity")


def test_a_prediction_is_scored_by_its_task_and_several_by_their_mean():
    task, document = Filler(), documents(Filler(), [60])[0]

    assert score(task, document, "THE end") == {"score": 0.5}
    assert score(task, document, ["the answer", "the", "none"]) == {"score": pytest.approx(0.5)}
    assert score(task, document, ("the answer",)) == {"score": 1.0}


# the kinds of tasks


@dataclass(frozen=True, kw_only=True)
class Deep(DepthTask):
    def draft(self, draw, size, place):
        return Draft("w " * size)


@dataclass(frozen=True, kw_only=True)
class Film(FrameTask):
    def draft(self, draw, size, place):
        return FrameDraft("what?")


@dataclass(frozen=True, kw_only=True)
class Shapes(TextTask):
    def require_text(self, bench):
        pass

    def units(self, bench, length):
        return 1

    def measure(self, bench, model, length, size, advance):
        return {}


def test_tasks_are_greedy_of_one_cell_and_as_large_as_asked_unless_they_say_otherwise():
    @dataclass(frozen=True, kw_only=True)
    class Plain(DocumentTask):
        def draft(self, draw, size, place):
            return Draft("")

    task = Plain()
    assert (task.metric, task.kind, task.smallest, task.sampling) == ("score", "generate", 0, None)
    assert (task.max_new_tokens, task.template_tokens) == (32, 0)
    assert task.cells() == [(None, None)]
    assert task.largest(Place(5)) == 2**40
    assert task.check() is None
    assert Place(5) == Place(5, None, None, 0)
    assert Draft("a") == Draft("a", "", "", (), {})
    assert Shapes().lengths(None, (3, 5)) == (3, 5)
    for abstract in (DocumentTask, QuestionTask, TextTask, DepthTask, FrameTask):
        with pytest.raises(TypeError, match="abstract"):
            abstract()
    assert Task().metric == "score"


@pytest.mark.parametrize("kind", [Deep, Film])
def test_depths_are_from_the_start_to_the_end(kind):
    assert kind().depths == DEPTHS == (0.0, 0.25, 0.5, 0.75, 1.0)
    assert kind(depths=(0, 0.5)).cells() == [(0, None), (0.5, None)]
    for right in ((0,), [0, 1], (0.3, 0.3)):
        kind(depths=right).check()
    for wrong in ((), [], "0.5", 0.5, None):
        with pytest.raises(RopeError, match="depths must be a list of numbers from 0 to 1, got"):
            kind(depths=wrong).check()
    for wrong in ((0.5, 1.01), (-0.01,), ("0",)):
        with pytest.raises(RopeError, match=r"each of depths must be .* at least 0 and at most 1"):
            kind(depths=wrong).check()


def test_frames_are_images_of_112_pixels_answered_in_a_forward_pass():
    task = Film()
    assert (task.max_new_tokens, task.generated, task.media, task.pixels) == (
        8,
        False,
        "images",
        112,
    )
    assert FrameDraft("a") == FrameDraft(
        prompt="a", frames=(), opening="These are the frames of a film, in order."
    )
    Film(media="video", generated=True, pixels=24).check()
    for wrong, message in (
        ({"generated": 1}, "generated must be True or False"),
        ({"media": "film"}, "media must be one of 'images', 'video'"),
        ({"pixels": 23}, "pixels must be an integer of at least 24"),
    ):
        with pytest.raises(RopeError, match=message):
            Film(**wrong).check()
