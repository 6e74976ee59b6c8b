"""The engine behind `compare` and `evaluate`: models that cheat by design, reports, trouble."""

import errno
import html.parser
import json
import math
import random
from pathlib import Path
from string import ascii_letters
from types import SimpleNamespace

import pytest
import torch
from conftest import logits, tiny_llama
from evaluating import TEXT, Scripted, make_tokenizer, small, wide_llama
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models
from transformers import GenerationConfig, PreTrainedTokenizerFast

from hf_rope_ext import RopeError, patch_model, patched
from hf_rope_ext.evals import answering
from hf_rope_ext.evals.answering import (
    SharedPrefix,
    answer,
    has_fixed_frequencies,
    score_target,
    to_row,
)
from hf_rope_ext.evals.bench import Bench
from hf_rope_ext.evals.compare import compare, evaluate
from hf_rope_ext.evals.documents import build_dataset
from hf_rope_ext.evals.generation import without_habits
from hf_rope_ext.evals.measures import make_measures
from hf_rope_ext.evals.registry import TASKS
from hf_rope_ext.evals.report import Report, load_report
from hf_rope_ext.evals.statistics import (
    base_score,
    effective_length,
    k_max,
    own_effective_length,
    weighted_averages,
    wilson,
)
from hf_rope_ext.evals.text import encode
from hf_rope_ext.evals.writing import make_table, save_report
from hf_rope_ext.methods import Linear, Yarn


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def nothing(done):
    pass


def grid(model, tokenizer, spec, length, samples=1):
    """Score by depth of one cell."""
    bench = Bench(tokenizer, "", length, 64, samples=samples, seed=1)
    (measure,) = make_measures((spec,), bench).values()
    cell = measure.run(model, length, 4, nothing)
    scores = {part["depth"]: part["score"] for part in cell["parts"]}
    return scores, build_dataset(spec.partition(":")[0], tokenizer, [length], samples, seed=1)


@pytest.mark.parametrize("name", ["rope_passkey_ll", "rope_passkey", "rope_needle"])
def test_a_model_that_sees_all_finds_all_and_one_that_forgets_only_what_it_sees(tokenizer, name):
    length, sees = 1000, 350
    everything, documents = grid(Scripted(10**6), tokenizer, name, length)
    recent, _ = grid(Scripted(sees), tokenizer, name, length)

    visible = {}
    for document in documents:
        text = document["prompt"] + document["answer"]
        needle = document["gold"][0]
        after = len(encode(tokenizer, text[text.index(needle) :]))
        assert abs(after - sees) > 40, "the grid must not have a needle at the edge of sight"
        visible[document["depth"]] = float(after < sees)
    assert everything == dict.fromkeys(visible, 1.0)
    assert recent == visible
    assert 0 < sum(visible.values()) < len(visible)


def test_a_random_model_finds_nothing(tokenizer):
    for name in ("rope_passkey_ll", "rope_kv:max_new_tokens=8"):
        scores, _ = grid(wide_llama(), tokenizer, name, 700)
        assert set(scores.values()) == {0.0}


# shared beginnings


def results(model, tokenizer, documents, size):
    rows = [to_row(tokenizer, document, TASKS[document["task"]]) for document in documents]
    return answer(model, tokenizer, rows, size, nothing)


@pytest.mark.parametrize("name", ["rope_passkey_ll", "rope_passkey", "rope_cot_chain_maj"])
def test_shared_beginnings_change_no_answer(tokenizer, name, monkeypatch):
    options = {"max_new_tokens": 6} if name == "rope_cot_chain_maj" else {"depths": [0.3, 0.6, 1.0]}
    documents = build_dataset(name, tokenizer, [420], samples=2, seed=3, **options)
    model = patch_model(wide_llama(), "yarn", factor=8)
    texts = []
    batch_decode = tokenizer.batch_decode

    def keep(*inputs, **named):
        texts.append(batch_decode(*inputs, **named))
        return texts[-1]

    monkeypatch.setattr(tokenizer, "batch_decode", keep, raising=False)
    monkeypatch.setattr("hf_rope_ext.evals.answering._worth_sharing", lambda rows, size: True)
    monkeypatch.setattr("hf_rope_ext.evals.answering.PREFILL", 100)
    shared = results(model, tokenizer, documents, 1)
    generated, texts[:] = sorted(map(tuple, texts)), []
    monkeypatch.setattr("hf_rope_ext.evals.answering._worth_sharing", lambda rows, size: False)
    plain = results(model, tokenizer, documents, 1)

    for one, other in zip(shared, plain, strict=True):
        assert one == pytest.approx(other, rel=1e-4)
    assert generated == sorted(map(tuple, texts))


def test_a_shared_beginning_runs_once(tokenizer):
    documents = build_dataset("rope_passkey_ll", tokenizer, [800], samples=4, seed=3)
    model = patch_model(wide_llama(), "yarn", factor=16)
    ran = []
    model.model.layers[0].register_forward_pre_hook(
        lambda module, inputs, named: ran.append(inputs[0].shape[1]), with_kwargs=True
    )

    results(model, tokenizer, documents, 1)

    rows = sorted(encode(tokenizer, d["prompt"] + d["answer"] + d["target"]) for d in documents)
    edges = {tuple(row[: end + 1]) for row in rows for end in range(len(row))}
    # each different beginning once, and the few tokens whose logits are asked for again
    assert len(edges) <= sum(ran) <= len(edges) + 8 * len(rows)
    assert sum(ran) < 0.75 * sum(map(len, rows))


def test_frequencies_that_follow_the_length_share_nothing(tokenizer):
    documents = build_dataset("rope_passkey_ll", tokenizer, [420], samples=1, seed=3)
    model = patch_model(wide_llama(), "dynamic_yarn", factor=8)

    assert not SharedPrefix(model).usable
    alone = [results(model, tokenizer, [one], 1)[0] for one in documents]
    for one, other in zip(results(model, tokenizer, documents, 8), alone, strict=True):
        assert one == pytest.approx(other, rel=1e-4)
    assert SharedPrefix(wide_llama()).usable
    assert not SharedPrefix(tiny_llama({"rope_type": "dynamic", "factor": 2.0})).usable


def test_an_adapted_model_gets_the_prefix_of_its_row_too():
    model = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"]))
    shared = SharedPrefix(model)
    ids = list(range(10, 60))

    with torch.no_grad():
        shared.fill(ids, 1)
        found = shared.fill([*ids, 3, 4], 2)
        expected = model(input_ids=torch.tensor([[*ids, 3, 4]])).logits[0, -2:]

    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_batches_of_unlike_rows_score_as_single_ones(tokenizer):
    model = patch_model(wide_llama(), "linear", factor=8)
    documents = [
        *build_dataset("rope_copy", tokenizer, [200, 300], samples=2),
        *build_dataset("rope_sort", tokenizer, [250], samples=2),
    ]

    together = results(model, tokenizer, documents, 6)

    for one, document in zip(together, documents, strict=True):
        assert one == pytest.approx(results(model, tokenizer, [document], 1)[0], rel=1e-4)


@pytest.mark.parametrize("method", ["linear", "dynamic_yarn"])
def test_a_batch_holds_rows_that_are_answered_alike(tokenizer, monkeypatch, method):
    model = patch_model(wide_llama(), method, factor=12)
    documents = [
        *build_dataset("rope_kv", tokenizer, [400, 500], samples=1, max_new_tokens=3, depths=[0.5]),
        *build_dataset("rope_kv", tokenizer, [450], samples=3, max_new_tokens=5, depths=[0.5]),
        *build_dataset("rope_copy", tokenizer, [300], samples=3),
        *build_dataset("rope_cot_chain_maj", tokenizer, [500], samples=2, max_new_tokens=4, n=3),
    ]
    random.Random(0).shuffle(documents)
    calls, done = [], []

    def generate(input_ids, attention_mask, generation_config, **_):
        lengths = attention_mask.sum(1).tolist()
        count = generation_config.num_return_sequences
        calls.append((generation_config.max_new_tokens, count, lengths))
        assert generation_config.do_sample == (count == 3)
        return input_ids.repeat_interleave(count, dim=0)

    monkeypatch.setattr(model, "generate", generate)
    monkeypatch.setattr("hf_rope_ext.evals.answering._worth_sharing", lambda rows, size: False)
    model.model.register_forward_pre_hook(
        lambda module, inputs, named: calls.append((0, 1, [0] * len(named["input_ids"]))),
        with_kwargs=True,
    )
    rows = [to_row(tokenizer, document, TASKS[document["task"]]) for document in documents]

    answer(model, tokenizer, rows, 2, done.append)

    assert sum(done) == len(documents) == sum(len(lengths) for _, _, lengths in calls)
    for _, count, lengths in calls:
        assert len(lengths) <= (1 if count == 3 else 2)
        assert lengths == sorted(lengths, reverse=True)
        assert method == "linear" or len(set(lengths)) == 1
    sizes = [(new, count, len(lengths)) for new, count, lengths in calls]
    asked = [document["max_new_tokens"] for document in documents]
    assert asked.count(3) == 2
    if method == "linear":  # lengths differ, and padding is no matter
        assert sizes.count((3, 1, 2)) == 1
        assert sorted(size for new, _, size in sizes if new == 5) == [1, 2]
    else:
        assert sizes.count((3, 1, 1)) == 2
    assert sizes.count((4, 3, 1)) == 2
    first = calls[0][2]
    assert first == [0] or max(first) == max(max(lengths) for _, _, lengths in calls)


def test_a_prefix_is_kept_where_it_is_an_eighth_of_the_row_and_never_to_its_end():
    model = tiny_llama()
    ran = []
    model.model.layers[0].register_forward_pre_hook(
        lambda module, inputs, named: ran.append(inputs[0].shape[1]), with_kwargs=True
    )
    shared = SharedPrefix(model)
    first = list(range(1, 65))

    for row, last, runs in (
        (first, 1, 64),
        ([*first[:8], *[0] * 56], 1, 56),  # 8 of 64 tokens are shared: just enough
        ([*first[:7], *[99] * 57], 1, 64),  # 7 are not
        ([*first[:7], *[99] * 57], 3, 3),  # the same row again: what is asked for runs again
        ([*first[:7], *[99] * 50], 1, 1),  # a shorter row that the cache covers
    ):
        with torch.no_grad():
            found = shared.fill(row, last)
            expected = model(input_ids=torch.tensor([row])).logits[0, -last:]
        assert ran.pop(0) == runs
        ran.clear()
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_a_long_row_is_filled_in_pieces(monkeypatch):
    monkeypatch.setattr("hf_rope_ext.evals.answering.PREFILL", 10)
    model = tiny_llama()
    ran = []
    model.model.layers[0].register_forward_pre_hook(
        lambda module, inputs, named: ran.append(inputs[0].shape[1]), with_kwargs=True
    )
    row = list(range(32))

    with torch.no_grad():
        for last, pieces in ((2, [10, 10, 12]), (1, [10, 10, 10, 2])):
            ran.clear()
            found = SharedPrefix(model).fill(row, last)
            assert ran == pieces
            expected = model(input_ids=torch.tensor([row])).logits[0, -last:]
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_a_document_that_just_fits_its_length_is_served_and_one_token_more_is_not(tokenizer):
    for name in ("rope_copy", "rope_kv"):
        (document,) = build_dataset(
            name, tokenizer, [500], 1, **({"depths": [1]} if "kv" in name else {})
        )
        document["length"] = needed = document["tokens"] + (
            document["max_new_tokens"]
            if document["kind"] == "generate"
            else len(
                encode(tokenizer, document["prompt"] + document["answer"] + document["target"])
            )
            - document["tokens"]
        )
        assert to_row(tokenizer, document, TASKS[name]).ids
        document["length"] = needed - 1
        with pytest.raises(RopeError, match=rf"takes {needed} tokens, more than its length"):
            to_row(tokenizer, document, TASKS[name])


@pytest.mark.parametrize(
    ("rope", "fixed"),
    [
        ({}, True),
        ({"rope_type": "linear", "factor": 2.0}, True),
        ({"rope_type": "dynamic", "factor": 2.0}, False),
        ({"rope_type": "longrope", "factor": 2.0, "short_factor": [1.0] * 8,
          "long_factor": [2.0] * 8, "original_max_position_embeddings": 64}, False),
    ],
)  # fmt: skip
def test_only_frequencies_that_never_change_allow_padding_and_shared_prefixes(rope, fixed):
    assert has_fixed_frequencies(tiny_llama(rope)) == fixed
    if fixed:
        with patched(
            tiny_llama(rope),
            "dynamic_yarn",
            factor=2,
            replace=True,
            original_max_position_embeddings=64,
        ) as model:
            assert not has_fixed_frequencies(model)
    with patched(
        tiny_llama(rope), "yarn", factor=2, replace=True, original_max_position_embeddings=64
    ) as model:
        assert has_fixed_frequencies(model)


def test_samples_depend_on_the_seed_alone_and_leave_the_generator_alone(tokenizer, monkeypatch):
    said = []
    monkeypatch.setattr(
        tokenizer, "batch_decode", lambda ids, **_: said.append(ids.tolist()) or [""] * len(ids),
        raising=False,
    )  # fmt: skip

    def samples(seed, index=0, generator=0):
        documents = build_dataset(
            "rope_cot_chain_maj", tokenizer, [500], samples=2, seed=seed, max_new_tokens=4, n=3
        )
        model = wide_llama()
        torch.manual_seed(generator)
        said.clear()
        results(model, tokenizer, [documents[index]], 1)
        (drawn,) = said
        return drawn

    first = samples(3)

    assert len({tuple(answer) for answer in first}) == 3
    assert samples(3, generator=77) == first
    assert samples(4) != first
    assert samples(3, index=1) != first


def test_sampling_leaves_the_generator_as_it_was(tokenizer):
    documents = build_dataset("rope_cot_chain_maj", tokenizer, [500], samples=1, max_new_tokens=4)
    model = wide_llama()
    torch.manual_seed(77)
    before = torch.get_rng_state()

    results(model, tokenizer, documents, 1)

    assert torch.equal(torch.get_rng_state(), before)


@given(st.lists(st.integers(0, 1), max_size=9), st.lists(st.integers(0, 1), max_size=9))
def test_what_two_rows_share_is_counted_from_their_start(one, other):
    shared = 0
    while shared < min(len(one), len(other)) and one[shared] == other[shared]:
        shared += 1

    assert answering._common(one, other) == shared


def test_a_target_is_right_if_each_token_is_and_costs_their_mean():
    log_probs = torch.tensor([-1.0, -2.0, -6.0], dtype=torch.float64)

    half = score_target(log_probs, torch.tensor([True, False, True]))

    assert half == {"score": 0.0, "token_accuracy": pytest.approx(2 / 3), "nll": 3.0}
    assert score_target(log_probs, torch.tensor([True] * 3))["score"] == 1.0


# answers are the most likely tokens, whatever the checkpoint is used to

HABITS = {
    "none": {},
    "repetition_penalty": {"repetition_penalty": 5.0},
    "encoder_repetition_penalty": {"encoder_repetition_penalty": 5.0},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 1},
    "suppress_tokens": {"suppress_tokens": list(range(0, 500, 2))},
    "begin_suppress_tokens": {"begin_suppress_tokens": list(range(0, 500, 2))},
    "bad_words_ids": {"bad_words_ids": [[number] for number in range(0, 500, 3)]},
    "min_new_tokens": {"min_new_tokens": 12},
    "forced_eos_token_id": {"forced_eos_token_id": 9},
    "sequence_bias": {"sequence_bias": [[[number], 20.0] for number in range(9)]},
    "num_beams": {"num_beams": 4},
    "sampling": {"do_sample": True, "temperature": 3.0, "top_k": 5, "top_p": 0.5},
    "exponential_decay_length_penalty": {"exponential_decay_length_penalty": [1, 1.5]},
}


def most_likely(model, ids, count, ends):
    """Greedy decoding, written out."""
    row = list(ids)
    for _ in range(count):
        row.append(int(logits(model, torch.tensor([row]))[0, -1].argmax()))
        if row[-1] in ends:
            break
    return row[len(ids) :]


@pytest.mark.filterwarnings("ignore")  # transformers says that some habits are for sampling
@pytest.mark.parametrize("adapt", [False, True])
@pytest.mark.parametrize("habit", HABITS)
def test_an_answer_is_the_most_likely_one_whatever_the_checkpoint_is_used_to(
    tokenizer, monkeypatch, habit, adapt
):
    plain = wide_llama()
    documents = build_dataset("rope_kv", tokenizer, [500], samples=2, max_new_tokens=16)[:3]
    rows = [encode(tokenizer, document["prompt"] + document["answer"]) for document in documents]
    ends = [most_likely(plain, rows[0], 9, [])[-1], 7]
    expected = [most_likely(plain, row, 16, ends) for row in rows]
    assert len({len(answer) for answer in expected}) > 1, "one must end before the others"
    model = wide_llama()
    model.generation_config = GenerationConfig(eos_token_id=ends, **HABITS[habit])
    own = model.generation_config
    if adapt:
        model = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    said = []
    monkeypatch.setattr(
        tokenizer,
        "batch_decode",
        lambda ids, **_: said.extend(ids.tolist()) or [""] * len(ids),
        raising=False,
    )

    results(model, tokenizer, documents, 3)

    assert sorted(answer[: length_of(answer, ends)] for answer in said) == sorted(expected)
    assert model.generation_config is own


def length_of(answer, ends):
    return next((at + 1 for at, token in enumerate(answer) if token in ends), len(answer))


def test_the_habits_of_a_checkpoint_are_put_back_after_an_error():
    model = wide_llama()
    model.generation_config = own = GenerationConfig(repetition_penalty=2.0, bos_token_id=5)
    model.generation_config.my_models_own = 3

    def fail():
        with without_habits(model):
            assert model.generation_config.repetition_penalty is None
            assert model.generation_config.bos_token_id == 5
            assert model.generation_config.my_models_own == 3
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert model.generation_config is own


# evaluate and compare


def linear(factor):
    rope = {"rope_type": "linear", "factor": factor}
    return tiny_llama(rope, vocab_size=512, max_position_embeddings=512)


def test_a_model_that_does_not_tell_its_trained_length_is_measured_in_tokens(tokenizer, tmp_path):
    """Linear scaling hides what was trained; the oracle is the same scaling as a patch."""
    tasks = ["rope_copy", "perplexity", "rope_longppl:windows=1:short=50:alpha=-99:beta=-99"]
    ask = {"tokenizer": tokenizer, "lengths": [100, 200], "samples": 1, "text": TEXT}

    found = evaluate(linear(8.0), tasks=tasks, **ask)
    with patched(wide_llama(), "linear", factor=8) as model:
        expected = evaluate(model, tasks=tasks, **ask)

    assert found.trained == 0
    for cell, wanted in zip(found.cells, expected.cells, strict=True):
        assert cell["length"] == wanted["length"]
        if wanted["nll"] is not None:  # no token needs a longer context than the short one itself
            assert cell["nll"] == pytest.approx(wanted["nll"], rel=1e-4)
    files = save_report(found, tmp_path)
    page = Page((tmp_path / "report.html").read_text())
    assert {path.suffix for path in files} == {".json", ".csv", ".png", ".html"}
    assert "Trained for" not in " ".join(page.words)
    headings = [str(column.header) for column in make_table(found, "perplexity").columns]
    assert headings == ["method", "100", "200"]
    headings = [str(column.header) for column in make_table(expected, "perplexity").columns]
    assert headings == ["method", "100 (1.5625x)", "200 (3.125x)"]


def test_what_needs_the_trained_length_asks_for_it(tokenizer):
    ask = {"tokenizer": tokenizer, "samples": 1, "text": TEXT}
    for tasks, lengths in (
        (["rope_copy"], ["2x"]),
        (["rope_short"], [200]),
        (["rope_longppl"], [200]),
    ):
        with pytest.raises(RopeError, match="trained length, which is not in the config"):
            evaluate(linear(8.0), tasks=tasks, lengths=lengths, **ask)
        told = evaluate(
            linear(8.0),
            tasks=tasks,
            lengths=lengths,
            original_max_position_embeddings=100,
            **ask,
        )
        assert told.trained == 100
        assert [cell["length"] for cell in told.cells] == [100 if "rope_short" in tasks else 200]
    with pytest.raises(RopeError, match=r"beyond the 512 positions .* a larger factor, or pass"):
        evaluate(linear(8.0), tasks=["rope_copy"], lengths=[513], **ask)


def test_a_comparison_on_such_a_model_starts_from_the_length_it_is_told(tokenizer):
    ask = {"tasks": ("rope_short",), "lengths": (64,), "windows": 2, "methods": {"yarn": Yarn(4)}}

    found = compare(
        small(
            tokenizer, model=linear(8.0), replace=True, original_max_position_embeddings=64, **ask
        )
    )

    assert found.cells == compare(small(tokenizer, model=wide_llama(), **ask)).cells


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer": None}, "tokenizer must be the model's tokenizer"),
        ({"original_max_position_embeddings": 1}, "original_max_position_embeddings must be"),
        ({"original_max_position_embeddings": "64"}, "original_max_position_embeddings must be"),
    ],
)
def test_what_cannot_be_compared_is_told_before_anything_runs(tokenizer, change, message):
    with pytest.raises(RopeError, match=message):
        small(**{"tokenizer": tokenizer, **change})


def test_a_length_beyond_what_the_model_reads_is_refused_unless_asked_for(tokenizer):
    ask = {"tokenizer": tokenizer, "tasks": ["rope_copy"], "samples": 1}

    with pytest.raises(RopeError, match=r"128 is beyond the 64 positions.*factor=2"):
        evaluate(wide_llama(), lengths=["2x"], **ask)
    with patched(wide_llama(), "yarn", factor=2) as model:
        found = evaluate(model, lengths=["2x"], **ask)
    assert [cell["length"] for cell in found.cells] == [128]
    assert found.methods == ["yarn"]
    assert evaluate(wide_llama(), lengths=["2x"], beyond=True, **ask).cells


@pytest.fixture(scope="module")
def report(tokenizer):
    torch.manual_seed(0)
    return compare(small(tokenizer))


def test_every_task_has_its_cells_and_compare_equals_evaluate(tokenizer, report):
    assert len(report.cells) == 2 * (2 + 2 + 1 + 2)
    assert report.lengths("rope_short") == [64]
    with patched(wide_llama(), Yarn(8)) as model:
        alone = evaluate(
            model,
            tokenizer,
            ["rope_passkey_ll:depths=[0,1]", "rope_add"],
            [420],
            samples=2,
            seed=0,
        )
    for cell in alone.cells:
        assert report.cell("yarn", cell["task"], 420) == cell


def test_numbers_are_the_means_of_documents_with_their_interval(tokenizer, report):
    label = "rope_add"
    documents = build_dataset("rope_add", tokenizer, [420], samples=2, seed=0)
    with patched(wide_llama(), Yarn(8)) as model:
        scores = [one["score"] for one in results(model, tokenizer, documents, 1)]
    cell = report.cell("yarn", label, 420)

    assert cell["n"] == 4
    assert cell["score"] == sum(scores) / 4
    assert (cell["low"], cell["high"]) == wilson(cell["score"], 4)
    assert {part["group"]: part["n"] for part in cell["parts"]} == {"inside": 2, "beyond": 2}


def test_the_time_limit_keeps_what_is_finished_and_the_next_run_goes_on(
    tokenizer, report, tmp_path, monkeypatch
):
    clock = iter(range(0, 10_000, 10))
    monkeypatch.setattr(
        "hf_rope_ext.evals.compare.time", SimpleNamespace(monotonic=lambda: next(clock))
    )

    cut = compare(small(tokenizer), tmp_path, max_minutes=1.5)

    assert 0 < len(cut.cells) < len(report.cells)
    assert len(cut.cells) + len(cut.missing) == len(report.cells)
    assert (
        "did not\nfinish in time"
        in next(p for p in save_report(cut, tmp_path) if p.suffix == ".html").read_text()
    )
    assert load_report(tmp_path) == cut
    assert compare(small(tokenizer), tmp_path).cells == report.cells


def test_a_full_disk_is_one_error_and_finished_cells_are_kept(tokenizer, tmp_path, monkeypatch):
    written = []
    open_path = Path.open

    def open_or_fail(self, mode="r", *inputs, **named):
        if self.name == "cells.jsonl" and mode == "a":
            if len(written) == 2:
                raise OSError(errno.ENOSPC, "No space left on device")
            written.append(1)
        return open_path(self, mode, *inputs, **named)

    monkeypatch.setattr(Path, "open", open_or_fail)
    with pytest.raises(RopeError, match=r"No space left on device\. Finished cells are kept"):
        compare(small(tokenizer), tmp_path)

    monkeypatch.undo()
    again = []
    compare(small(tokenizer), tmp_path, lambda cell, done, total: again.append(cell))
    lines = (tmp_path / "cells.jsonl").read_text().splitlines()
    kept = [json.loads(line)["cell"] for line in lines[1:3]]
    assert not [cell for cell in again if vars(cell) in kept]


class Page(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.links, self.open, self.words = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.links += [v for name, v in attributes if name in ("src", "href", "xlink:href")]
        if tag not in ("meta", "line", "polyline", "br", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.links += [v for name, v in attributes if name in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def test_the_page_needs_no_network_and_names_everything(tokenizer, report, tmp_path):
    named = json.loads(json.dumps(report.settings))
    named["model"]["name"] = "<script>alert(1)</script>"
    files = save_report(Report(named, report.environment, report.cells), tmp_path)
    text = (tmp_path / "report.html").read_text()

    page = Page(text)
    words = " ".join(" ".join(page.words).split())

    assert page.links == []
    assert page.open == []
    assert "url(" not in text
    assert "@import" not in text
    assert "<script" not in text
    for part in ("none", "yarn", "<script>alert(1)</script>", "420", "rope_longppl", "Depth"):
        assert part in words
    assert {path.name for path in files} >= {
        "rope_passkey_ll_depths_0_1.png",
        "rope_passkey_ll_depths_0_1_depths.png",
        "rope_short.png",
    }


def fake(scores, methods=("none", "yarn"), task="rope_kv", trained=4096):
    cells = [
        {"method": m, "task": task, "length": n, "score": v, "n": 10, "low": 0.0, "high": 1.0}
        for m in methods
        for n, v in scores[m].items()
    ]
    settings = {
        "model": {"trained_length": trained},
        "methods": {m: {"name": m} for m in methods},
        "tasks": {task: "score"},
        "lengths": sorted(scores[methods[0]]),
    }
    return Report(settings, {}, cells)


def test_the_summary_says_how_far_a_method_reads():
    report = fake(
        {
            "none": {2048: 0.9, 4096: 1.0, 8192: 0.1, 16384: 0.0},
            "yarn": {2048: 0.95, 4096: 0.9, 8192: 0.86, 16384: 0.3},
        }
    )

    found = report.summary()["rope_kv"]

    assert found["none"] == {"effective_length": 4096, "own_effective_length": 4096, "k_max": 4096}
    assert found["yarn"] == {"effective_length": 8192, "own_effective_length": 8192, "k_max": 16384}


# statistics


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("count", [1, 10, 500])
def test_intervals_are_wilsons(share, count):
    """Its ends are the p at which (share - p)**2 = z**2 p (1 - p) / n."""
    z = 1.959963984540054
    for end in wilson(share, count):
        assert (share - end) ** 2 == pytest.approx(z * z * end * (1 - end) / count, abs=1e-12)
    low, high = wilson(share, count)
    assert 0 <= low <= share <= high <= 1


def test_intervals_are_scipys():
    stats = pytest.importorskip("scipy.stats", reason="the oracle; comes with .[eval]")
    for hits, count in ((0, 10), (3, 10), (10, 10), (77, 500)):
        expected = stats.binomtest(hits, count).proportion_ci(method="wilson")
        assert wilson(hits / count, count) == pytest.approx(tuple(expected), abs=1e-12)


LENGTHS = [4096, 8192, 16384, 32768, 65536, 131072]


@pytest.mark.parametrize(
    ("row", "effective", "rising", "falling"),
    [
        # Llama-3.1-70B and GPT-4-1106 in the README of NVIDIA/RULER
        ([96.5, 95.8, 95.4, 94.8, 88.4, 66.6], 65536, 85.5, 93.7),
        ([96.6, 96.3, 95.2, 93.2, 87.0, 81.2], 65536, 89.0, 94.1),
    ],
)
def test_rulers_own_table_is_reproduced(row, effective, rising, falling):
    scores = {length: value / 100 for length, value in zip(LENGTHS, row, strict=True)}

    assert effective_length(scores) == effective
    found = weighted_averages(scores)
    assert [100 * one for one in found] == pytest.approx([rising, falling], abs=0.06)


def test_bars_count_from_the_shortest_length_without_a_gap():
    scores = {1: 1.0, 2: 0.1, 4: 0.9, 8: 0.2}

    assert k_max(scores) == 1
    assert k_max({1: 0.2, 2: 0.2, 4: 0.19}) == 2
    assert k_max({1: 0.0}) is None
    assert effective_length(scores) == 4
    assert effective_length({1: 0.856}) is None
    assert base_score(scores, trained=2) == 1.0
    assert base_score({4: 0.5, 8: 0.7}, trained=2) == 0.5
    assert own_effective_length({1: 0.9, 2: 0.77, 4: 0.76}, 0.9) == 2
    assert own_effective_length({1: 0.0}, 0.0) is None


def test_weighted_averages_of_one_score_are_that_score():
    draw = random.Random(0)
    for _ in range(20):
        value, count = draw.random(), draw.randrange(1, 9)
        found = weighted_averages({2**n: value for n in range(count)})
        assert all(math.isclose(one, value) for one in found)


# bad input


@pytest.mark.parametrize(
    ("tasks", "changes", "message"),
    [
        (("rope_passky",), {}, "unknown task 'rope_passky'. Did you mean 'rope_passkey'"),
        (("rope_ppl:mode=slide",), {}, "mode must be one of"),
        (("rope_ppl:foo=1",), {}, "rope_ppl has no option 'foo'"),
        (("rope_ppl",), {"text": ""}, "need a long text"),
        (("rope_short",), {"text": "too short"}, "tokens, but a length of"),
        (("rope_kv",), {"lengths": (64,)}, "is too short for the task"),
        (("rope_ruler",), {}, "data must be a local JSON file"),
        (("rope_longppl:short=2",), {}, "short must be from"),
    ],
)
def test_bad_tasks_are_one_error_before_anything_is_measured(tokenizer, tasks, changes, message):
    with pytest.raises(RopeError, match=message):
        compare(small(tokenizer, tasks=tasks, **changes))


@pytest.mark.parametrize("unknown", ["<unk>", None])
@pytest.mark.parametrize("task", ["passkey", "rope_passkey", "rope_passkey_ll", "rope_add"])
def test_a_tokenizer_that_cannot_write_the_answer_is_refused(task, unknown):
    letters = ["<unk>", *sorted(set(TEXT + ascii_letters) - set("0123456789"))]
    backend = Tokenizer(
        models.BPE(dict(zip(letters, range(99), strict=False)), [], unk_token=unknown)
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token=unknown)

    with pytest.raises(RopeError, match=rf"{task}: this tokenizer has no tokens for the answer"):
        compare(small(tokenizer, tasks=(task,), lengths=(700,)))


def test_groups_stand_for_their_tasks(tokenizer):
    bench = Bench(tokenizer, TEXT, 700, 64)

    assert list(make_measures(("rope_babi",), bench)) == [f"rope_babi_qa{n}" for n in (1, 2, 3)]
    found = make_measures(("rope_ruler_offline:samples=3",), bench)
    assert len(found) == 11
    assert {measure.units(700) for measure in found.values()} == {3}
    assert len(make_measures(("rope_kv", "passkey:samples=2"), bench)) == 2


def test_documents_of_another_tokenizer_are_refused(tokenizer):
    documents = build_dataset("rope_copy", tokenizer, [200], samples=1)
    documents[0]["length"] = 100

    with pytest.raises(RopeError, match="built for another tokenizer"):
        results(wide_llama(), tokenizer, documents, 1)


def test_a_cell_is_measured_under_the_method_it_names(tokenizer):
    methods = {"a": Linear(2), "b": Linear(8)}

    found = compare(small(tokenizer, methods=methods, tasks=("rope_short",), lengths=(64,)))

    for label, factor in (("a", 2), ("b", 8)):
        measure = small(tokenizer, tasks=("rope_short",), lengths=(64,)).measures["rope_short"]
        model = patch_model(wide_llama(), "linear", factor=factor)
        expected = measure.run(model, 64, 1, nothing)["perplexity"]
        assert found.value(label, "rope_short", 64) == pytest.approx(expected)
    assert found.value("a", "rope_short", 64) != found.value("b", "rope_short", 64)
