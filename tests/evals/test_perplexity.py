"""Perplexity engines against scoring each token in a forward of its own."""

import math
import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import logits, tiny_llama
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
)

from hf_rope_ext import RopeError, patch_model
from hf_rope_ext.evals.bench import Bench
from hf_rope_ext.evals.measures import make_measure
from hf_rope_ext.evals.perplexity import LongPerplexity, Perplexity
from hf_rope_ext.evals.registry import make_task
from hf_rope_ext.evals.scoring import score_last

SMALL = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}


@pytest.fixture(scope="module")
def text():
    draw = random.Random(1)
    return torch.tensor([draw.randrange(1, 128) for _ in range(700)])


@pytest.fixture
def model():
    return patch_model(tiny_llama(), "yarn", factor=4)


def nothing(done):
    pass


def bench(text, longest, prefix=(), **settings):
    start = SimpleNamespace(bos_token_id=prefix[0] if prefix else None)
    return Bench(start, text, longest, **settings)


def log_prob(model, context, token):
    """One forward for one token, in float64 from the logits on."""
    return float(torch.log_softmax(logits(model, context[None])[0, -1].double(), -1)[token])


def slices(mode, tokens, length, prefix, stride, places, longest):
    """Yield windows of (start of context, scored token), written as the definitions say."""
    body = length - prefix
    if mode == "truncate":
        for number in range(places):
            start = round(number * (tokens - longest) / (places - 1))
            yield [(start, token) for token in range(start + (not prefix), start + body)]
        return
    yield [(0, token) for token in range(int(not prefix), body)]
    done = body
    while done < tokens:
        end = min(done + stride, tokens)
        yield [(end - body, token) for token in range(done, end)]
        done = end


@pytest.mark.parametrize("prefix", [(), (0,)])
@pytest.mark.parametrize(
    ("mode", "stride"), [("sliding", 24), ("sliding", 7), ("disjoint", None), ("truncate", None)]
)
def test_every_token_is_scored_once_with_its_own_context(model, text, mode, stride, prefix):
    text, length = text[:100], 40
    task = Perplexity(windows=3, mode=mode, stride=stride or 1)

    found = task.measure(bench(text, 80, prefix), model, length, 2, nothing)

    means, total, count, buckets = [], 0.0, 0, {}
    step = stride or length - max(len(prefix), 1)
    for window in slices(mode, len(text), length, len(prefix), step, 3, 80):
        losses = []
        for start, token in window:
            context = torch.cat((torch.tensor(prefix, dtype=torch.int64), text[start:token]))
            losses.append(-log_prob(model, context, text[token]))
            before = len(context)
            buckets.setdefault(2 ** int(math.log2(before)), []).append(losses[-1])
        total, count = total + sum(losses), count + len(losses)
        means.append(sum(losses) / len(losses))
    assert found["tokens"] == count
    assert found["nll"] == pytest.approx(total / count, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-5)
    assert found["yarn_compat"] == pytest.approx(math.exp(sum(means) / len(means)), rel=1e-5)
    assert {one["from"]: one["tokens"] for one in found["buckets"]} == {
        start: len(losses) for start, losses in buckets.items()
    }
    for one in found["buckets"]:
        losses = buckets[one["from"]]
        assert one["nll"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_the_stride_of_the_length_is_disjoint_and_the_last_window_is_full(model, text):
    task = Perplexity(mode="sliding", stride=95)

    same = Perplexity(mode="disjoint").cut(bench(text, 96), 96)

    assert task.cut(bench(text, 96), 96) == same
    assert {window.end - window.begin for window in same} == {96}
    assert same[-1].end == len(text)


def families():
    yield "llama", tiny_llama()
    torch.manual_seed(0)
    yield "gpt_neox", GPTNeoXForCausalLM(GPTNeoXConfig(**SMALL))
    # both change the logits after the head: a cap, a scale
    yield (
        "gemma2",
        Gemma2ForCausalLM(
            Gemma2Config(**SMALL, num_key_value_heads=2, head_dim=16, final_logit_softcapping=3.0)
        ),
    )
    yield "cohere", CohereForCausalLM(CohereConfig(**SMALL, num_key_value_heads=2, logit_scale=0.1))


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "gemma2", "cohere"])
def test_pieces_of_logits_are_those_of_one_forward(name, ids):
    model = patch_model(dict(families())[name].eval(), "linear", factor=4)
    full = torch.log_softmax(logits(model, ids)[:, :-1].double(), -1)
    wanted = full.gather(-1, ids[:, 1:, None])[..., 0]
    heads, layers = [], []
    model.get_output_embeddings().register_forward_pre_hook(
        lambda module, inputs: heads.append(inputs[0].shape[1])
    )
    model.base_model.register_forward_pre_hook(lambda module, inputs: layers.append(1))

    for targets, chunk in ((199, 16), (150, 64), (30, 200)):
        heads.clear(), layers.clear()
        scores = score_last(model, ids, targets, chunk)

        torch.testing.assert_close(scores.log_probs, wanted[:, -targets:], rtol=1e-5, atol=1e-5)
        assert torch.equal(scores.greedy, full.argmax(-1)[:, -targets:] == ids[:, -targets:])
        assert max(heads) <= max(chunk, 31)
    torch.testing.assert_close(logits(model, ids)[:, :-1].double().log_softmax(-1), full)


def test_layers_run_once_for_all_pieces(ids, model):
    ran = []
    model.model.layers[0].register_forward_hook(lambda *_: ran.append(1))

    score_last(model, ids, 150, chunk=16)

    assert len(ran) == 1


def test_the_model_is_left_as_it_was_when_a_piece_fails(ids, model, monkeypatch):
    def fail(module, inputs):
        if inputs[0].shape[1] > 1:
            raise RuntimeError("out of memory")

    before = [len(part._forward_hooks) for part in model.modules()]
    handle = model.lm_head.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        score_last(model, ids, 150, chunk=16)
    handle.remove()

    assert [len(part._forward_hooks) for part in model.modules()] == before
    assert "forward" not in vars(model.model)


def test_longppl_is_the_perplexity_of_tokens_that_a_short_context_makes_unlikely(model, text):
    # half of the text repeats what stood 100 tokens before, which sharp random attention notices
    text = torch.cat((text[:60], text[:60], text[60:90], text[:60]))
    short, length = 40, 100
    task = LongPerplexity(short=short, windows=2, alpha=0.5, beta=-6.0)

    found = task.measure(bench(text, 120), model, length, 1, nothing)

    key, scored = [], 0
    for start in (0, len(text) - 120):
        for place in range(start + short, start + length):
            # contexts of the short model begin anew every quarter of its length
            block = (place - start - short) // (short // 4)
            end = min(start + short + (block + 1) * (short // 4), start + length)
            long = log_prob(model, text[start:place], text[place])
            brief = log_prob(model, text[end - short : place], text[place])
            scored += 1
            if long - brief > 0.5 and long > -6.0:
                key.append(-long)
    assert key
    assert found["key_tokens"] == len(key)
    assert found["tokens"] == scored
    assert found["longppl"] == pytest.approx(math.exp(sum(key) / len(key)), rel=1e-5)
    within = task.measure(bench(text, 120), model, short, 1, nothing)
    assert within == {"longppl": None, "nll": None, "key_tokens": 0, "tokens": 0}


def test_another_model_can_pick_the_key_tokens(model, text):
    judge = tiny_llama()

    own = LongPerplexity(short=40, windows=2, alpha=0.5, beta=-9.0)
    judged = replace(own, evaluator=judge)

    found = judged.measure(bench(text, 200), model, 160, 1, nothing)
    by_judge = own.measure(bench(text, 200), judge, 160, 1, nothing)
    assert found["key_tokens"] == by_judge["key_tokens"]
    assert found["nll"] != by_judge["nll"]


@pytest.mark.parametrize(
    ("knobs", "length", "message"),
    [
        (
            {"mode": "slidng"},
            96,
            "mode must be one of 'last_block', 'sliding', 'disjoint', 'truncate'",
        ),
        ({"stride": 0}, 96, "stride must be an integer of at least 1"),
        ({"windows": 0}, 96, "windows must be an integer of at least 1"),
        ({"targets": 0}, 96, "targets must be an integer of at least 1"),
        ({"tokens": 0}, 96, "tokens must be an integer of at least 1"),
        ({"mode": "sliding", "stride": 128}, 96, "a stride of 128 does not fit in windows of 95"),
        ({"mode": "truncate"}, 1, "a length of 1 leaves no token to score"),
        ({"targets": 96}, 96, "leaves no context before 96 scored tokens"),
        ({"longest": 900}, 96, "the text has 700 tokens, but a length of 900 needs 900"),
    ],
)
def test_what_cannot_be_measured_is_one_clear_error(model, text, knobs, length, message):
    longest = knobs.pop("longest", 200)
    with pytest.raises(RopeError, match=message):
        make_measure("perplexity", knobs, bench(text, longest)).check((length,))


def test_a_short_context_must_be_shorter_than_the_longest_length(text):
    with pytest.raises(RopeError, match="short must be from 8 to less than"):
        make_measure("rope_longppl", {"short": 200}, bench(text, 200))


def windows_of(knobs, text, longest, length, **shared):
    task = make_task("perplexity", **knobs)
    return task.cut(replace(bench(text, longest), **shared), length)


def test_windows_and_targets_are_the_tasks_own_or_those_of_all_tasks(text):
    shared = {"windows": 5, "targets": 7}

    for mode in ("last_block", "truncate"):
        assert len(windows_of({"mode": mode}, text, 100, 50, **shared)) == 5
        assert len(windows_of({"mode": mode, "windows": 2}, text, 100, 50, **shared)) == 2
    for knobs, targets in (({}, 7), ({"targets": 3}, 3)):
        found = windows_of(knobs, text, 100, 50, **shared)
        assert {window.end - window.scored for window in found} == {targets}
    one = windows_of({"windows": 1}, text, 100, 50, **shared)
    assert [window.end for window in one] == [100]


def test_only_the_first_tokens_are_read_where_told(text):
    for knobs in ({"mode": "sliding", "stride": 20}, {"mode": "disjoint"}):
        found = windows_of({**knobs, "tokens": 130}, text, 100, 50)
        assert found[0].begin == 0
        assert found[-1].end == 130
    for mode in ("last_block", "truncate"):
        found = windows_of({"mode": mode, "tokens": 130, "targets": 9}, text, 100, 50)
        assert max(window.end for window in found) <= 130
    sliding = make_task("rope_ppl", stride=20)
    assert len(text) > 320
    assert sliding.cut(bench(text, 80), 50)[-1].end == 4 * 80
    assert make_task("rope_ppl", stride=20, tokens=90).cut(bench(text, 80), 50)[-1].end == 90


def test_a_text_of_exactly_the_longest_length_is_enough(text):
    for name, knobs in (
        ("perplexity", {}),
        ("rope_ppl", {"stride": 20}),
        ("rope_longppl", {"short": 9}),
    ):
        measure = make_measure(name, knobs, bench(text[:100], 100))
        assert measure.units(100) >= 1
        with pytest.raises(RopeError, match="the text has 99 tokens"):
            make_measure(name, knobs, bench(text[:99], 100))


@pytest.mark.parametrize(
    ("prefix", "short", "fine"),
    [
        ((), 8, True),
        ((), 7, False),
        ((0,), 9, True),
        ((0,), 8, False),
        ((), 99, True),
        ((), 100, False),
        ((), "50", False),
    ],
)
def test_a_short_context_has_room_for_eight_tokens_and_is_shorter_than_the_long_one(
    text, prefix, short, fine
):
    def make():
        make_measure("rope_longppl", {"short": short}, bench(text, 100, prefix))

    if fine:
        make()
        return
    with pytest.raises(RopeError, match="short must be from"):
        make()


def test_the_short_context_is_half_the_trained_length_and_never_less_than_eight(model, text):
    for trained, short in ((64, 32), (20, 10), (10, 8)):
        shared = replace(bench(text, 100), trained=trained)
        found = LongPerplexity(windows=1).measure(shared, model, 100, 1, nothing)
        told = LongPerplexity(windows=1, short=short).measure(shared, model, 100, 1, nothing)
        assert found == told
        assert found["tokens"] == 100 - short


def test_progress_counts_each_window_once(model, text):
    for task in (LongPerplexity(short=40, windows=3), Perplexity(windows=3, targets=8)):
        done = []
        task.measure(bench(text, 200), model, 100, 2, done.append)
        assert sum(done) == task.units(bench(text, 200), 100) == 3


def test_the_trained_length_is_where_the_cost_is_measured(text):
    measure = make_measure("rope_short", {"windows": 2}, replace(bench(text, 200), trained=50))

    assert measure.lengths((100, 200)) == (50,)
    assert measure.units(50) == 2
