"""One class and one line of the registry make a task, of whatever kind."""

import math
from dataclasses import dataclass

import pytest
import vision
from evaluating import TEXT, Scripted, make_tokenizer, small

from hf_rope_ext import RopeError
from hf_rope_ext.evals.bench import Bench
from hf_rope_ext.evals.compare import Comparison, compare
from hf_rope_ext.evals.documents import build_dataset, score
from hf_rope_ext.evals.measures import make_measure, make_measures
from hf_rope_ext.evals.registry import GROUPS, TASKS, describe_tasks, make_task, needs_processor
from hf_rope_ext.evals.scoring import score_last
from hf_rope_ext.evals.tasks.base import (
    DepthTask,
    Draft,
    FrameDraft,
    FrameTask,
    TextTask,
)
from hf_rope_ext.evals.tasks.frames import Frame
from hf_rope_ext.methods import NoScaling
from hf_rope_ext.parsing import split_tasks


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@dataclass(frozen=True, kw_only=True)
class LastToken(TextTask):
    """Loss of the last token of a text."""

    metric = "nll"

    def require_text(self, bench):
        assert len(bench.ids) > bench.longest

    def units(self, bench, length):
        return 1

    def measure(self, bench, model, length, size, advance):
        advance(1)
        loss = -float(score_last(model, bench.ids[None, :length], 1).log_probs)
        return {"nll": loss, "tokens": 1}


@dataclass(frozen=True, kw_only=True)
class Echo(DepthTask):
    """The word at a depth."""

    word: str = "cat"

    def draft(self, draw, size, place):
        return Draft(prompt="a " * size + self.word, target=f" {self.word}", gold=(self.word,))

    def score(self, gold, prediction):
        return {"score": float(gold[0] in prediction)}


@dataclass(frozen=True, kw_only=True)
class Count(FrameTask):
    """The number of frames."""

    def draft(self, draw, size, place):
        frames = tuple(Frame(str(number)) for number in range(size))
        return FrameDraft(
            frames=frames, prompt="?", answer="", target=f" {size}", gold=(str(size),)
        )

    def score(self, gold, prediction):
        return {"score": float(prediction.strip() == gold[0])}


def test_a_class_and_a_line_make_a_task_of_any_kind(monkeypatch):
    for name, task in (("my_loss", LastToken()), ("my_echo", Echo()), ("my_count", Count())):
        monkeypatch.setitem(TASKS, name, task)
    processor = vision.processor()
    specifications = ("my_loss", "my_echo:word=mat:depths=[0.5]", "my_count:pixels=48:depths=[0]")
    comparison = Comparison(
        model=vision.model(processor),
        tokenizer=processor.tokenizer,
        text=TEXT,
        methods={"none": NoScaling()},
        lengths=(150,),
        tasks=specifications,
        samples=1,
        processor=processor,
    )

    report = compare(comparison)

    assert report.settings["tasks"] == dict(
        zip(specifications, ("nll", "score", "score"), strict=True)
    )
    assert all(math.isfinite(report.value("none", task, 150)) for task in specifications)
    assert describe_tasks()["my_echo"] == "The word at a depth."
    assert needs_processor(["passkey", "my_count:pixels=48"])
    assert not needs_processor(["my_loss", "my_echo", "unknown"])


def test_every_task_is_described_in_a_sentence():
    described = describe_tasks()

    assert set(described) == {*TASKS, *GROUPS}
    assert all(text.endswith(".") and len(text) > 20 for text in described.values())


def test_frames_and_texts_have_no_documents(tokenizer):
    for name in ("rope_vniah", "rope_ppl"):
        with pytest.raises(RopeError, match=f"{name} has no text documents"):
            build_dataset(name, tokenizer, [400])


def test_samples_are_an_option_of_questions_only(tokenizer):
    bench = Bench(tokenizer, TEXT, 700, 64)

    assert make_measure("rope_cot_chain", {"samples": 3}, bench).units(700) == 3
    assert make_measure("passkey", {"samples": 3}, bench).units(700) == 3
    with pytest.raises(RopeError, match="rope_ppl has no option 'samples'"):
        make_measure("rope_ppl", {"samples": 3}, bench)
    with pytest.raises(RopeError, match="rope_short has no option 'mode'"):
        make_measure("rope_short", {"mode": "sliding"}, bench)
    for name in ("passkey", "rope_kv"):
        with pytest.raises(RopeError, match="samples must be an integer of at least 1, got 0"):
            make_measure(name, {"samples": 0}, bench)


def test_answers_are_scored_with_the_options_of_their_document(tokenizer):
    (document,) = build_dataset("rope_cot_chain", tokenizer, [900], samples=1, mode="cot")
    right = f" First 1, then 2. Answer: {document['gold'][0]}."

    assert score(make_task("rope_cot_chain", mode="cot"), document, right)["score"] == 1.0
    assert score(make_task("rope_cot_chain"), document, right)["score"] == 0.0


@pytest.fixture
def chatty(tokenizer, monkeypatch):
    """A model that always reasons, with numbers, before the right answer."""
    (document,) = build_dataset("rope_cot_chain", tokenizer, [900], samples=1, seed=0, mode="cot")
    text = f" First 1, then 2. Answer: {document['gold'][0]}."
    monkeypatch.setattr("hf_rope_ext.evals.answering._generate", lambda *_: [[text]])
    return Scripted(1)


def test_a_measure_scores_with_its_options(tokenizer, chatty):
    bench = Bench(tokenizer, "", 900, samples=1, seed=0)
    (measure,) = make_measures(["rope_cot_chain:mode=cot"], bench).values()

    assert measure.run(chatty, 900, 1, lambda done: None)["score"] == 1.0


def test_lists_are_split_once(tokenizer):
    specifications = split_tasks("rope_ppl:stride=64, rope_needle:depths=[0,0.5]:needles=2,passkey")

    needle = "rope_needle:depths=[0,0.5]:needles=2"
    assert specifications == ("rope_ppl:stride=64", needle, "passkey")
    with pytest.raises(RopeError, match="unknown task 'rope_kv,passkey'"):
        make_measures(["rope_kv,passkey"], Bench(tokenizer, TEXT, 700))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"samples": 0}, "samples must be an integer of at least 1, got 0"),
        ({"windows": 1.5}, "windows must be an integer of at least 1"),
        ({"lengths": ()}, "give at least one length"),
        ({"lengths": (64, "2x")}, "lengths must be an integer of at least 1, in tokens, got '2x'"),
    ],
)
def test_numbers_out_of_range_are_refused_at_once(tokenizer, change, message):
    with pytest.raises(RopeError, match=message):
        small(tokenizer, **change)
