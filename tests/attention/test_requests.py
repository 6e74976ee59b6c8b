"""Attention-side methods in every kind of request: padding, packing, caches, and ways to decode."""

import copy
import math

import pytest
import torch
from attention.brute_force import FAMILIES, Rule, expected_logits
from attention.rules import (
    TRUE,
    chunked,
    grouped,
    knobs,
    leaky,
    model_of,
    slope,
    streaming,
    tokens,
)
from conftest import tiny_llama
from decoding import CACHE, greedy
from transformers import DynamicCache, StaticCache
from zoo import TRAINED

from hf_rope_ext import RopeError, patched, planned, request_plan

REQUESTS = ("llama", "glm4", "deepseek_v3")  # layouts: halves, interleaved, the last coordinates
RULES = {
    ("leaky_rerope", "window=10 slowdown=3.5"): leaky(10, 3.5),
    ("dca", "chunk=16 limit=24"): chunked(16, 24),
    ("streaming", "sinks=3 window=12"): streaming(3, 12),
}
EVERY = [(family, *name) for family in REQUESTS for name in RULES]
ON_LLAMA = [("llama", *name) for name in RULES]


def following(total):
    """Methods whose knobs follow the length of the request, for a request of ``total``."""
    ratio = max(total / TRAINED, 1)
    fits = total <= TRAINED
    group = 1 if fits else math.ceil((total - 16) / (0.6 * TRAINED - 16))
    slowdown = 1 if fits else max((total - 32) / (0.75 * TRAINED - 32), 1)
    return {
        "leaky_rerope": leaky(32, slowdown),
        "self_extend": grouped(group, 16),
        "temperature": Rule(lambda m, n: m - n, scale=lambda m: (0.1 * math.log(ratio) + 1) ** 2),
    }


def definition(family, rule, ids, **where):
    return expected_logits(model_of(family), FAMILIES[family], rule, ids, **where)


def assert_close(found, expected, most=1e-4):
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < most * expected.abs().max()


def assert_greedy(family, rule, sequences, prompt):
    """Check that each token after the prompt is the likeliest by the definition."""
    logits = definition(family, rule, sequences)[:, prompt - 1 : -1].clone()
    end = model_of(family).generation_config.eos_token_id
    if isinstance(end, int):  # `greedy` keeps it out
        logits[..., end] = -math.inf
    assert torch.equal(sequences[:, prompt:], logits.argmax(-1))


def run(model, ids, **arguments):
    with torch.no_grad():
        return model(input_ids=ids, **arguments)


def logits_of(model, ids, **arguments):
    return run(model, ids, use_cache=False, **arguments).logits


# padding and packing


def padded(side):
    """A batch of a long and a short row, its mask and positions, and where the short one's are."""
    ids = tokens()
    mask = torch.ones_like(ids)
    own = slice(37, None) if side == "left" else slice(0, -37)
    mask[1] = 0
    mask[1, own] = 1
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    return ids, mask, positions, own


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("family", "name", "own"), EVERY)
def test_a_padded_row_equals_its_single_run_and_the_definition(family, name, own, side):
    ids, mask, positions, kept = padded(side)
    expected = definition(family, RULES[name, own], ids, positions=positions, padding=mask)
    with patched(model_of(family), name, **knobs(own)) as model:
        found = logits_of(model, ids, attention_mask=mask, position_ids=positions)
        alone = logits_of(model, ids[1:, kept])
    assert_close(found[:1], expected[:1])
    assert_close(found[1:, kept], expected[1:, kept])
    assert_close(found[1:, kept], alone, 1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("family", "name", "own"), ON_LLAMA)
def test_positions_that_count_padding_are_taken_as_they_are(family, name, own, side):
    ids, mask, _, kept = padded(side)
    expected = definition(family, RULES[name, own], ids, padding=mask)
    with patched(model_of(family), name, **knobs(own)) as model:
        found = logits_of(model, ids, attention_mask=mask)
    assert_close(found[1:, kept], expected[1:, kept])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("family", "name", "own"), EVERY)
def test_a_padded_batch_goes_on_from_its_cache(family, name, own, side):
    ids, mask, _, _ = padded(side)
    more = tokens(length=12, seed=1)
    whole = torch.cat((ids, more), 1)
    seen = torch.cat((mask, torch.ones_like(more)), 1)
    positions = (seen.cumsum(-1) - 1).clamp(min=0)
    expected = definition(family, RULES[name, own], whole, positions=positions, padding=seen)
    found, cache = [], None
    with patched(model_of(family), name, **knobs(own)) as model:
        for start, stop in [(0, 90), (90, 97), *((n, n + 1) for n in range(97, 102))]:
            output = run(
                model,
                whole[:, start:stop],
                attention_mask=seen[:, :stop],
                position_ids=positions[:, start:stop],
                use_cache=True,
                **{CACHE: cache},
            )
            cache = output[CACHE]
            found.append(output.logits)
    counts = seen.bool()
    assert_close(torch.cat(found, 1)[counts], expected[counts])


@pytest.mark.parametrize(("family", "name", "own"), EVERY)
def test_packed_documents_equal_themselves_alone(family, name, own):
    ids = tokens(1)
    positions = torch.cat([torch.arange(size) for size in (40, 5, 45)])[None]
    with patched(model_of(family), name, **knobs(own)) as model:
        found = logits_of(model, ids, position_ids=positions)
    expected = [definition(family, RULES[name, own], one) for one in ids.split((40, 5, 45), 1)]
    assert_close(found, torch.cat(expected, 1))


@pytest.mark.parametrize("kind", ["bool", "additive", "lowest", "by head"])
@pytest.mark.parametrize(("family", "name", "own"), EVERY)
def test_a_mask_of_four_dimensions_says_what_is_seen(family, name, own, kind):
    ids, mask, positions, kept = padded("left")
    sees = torch.ones(90, 90, dtype=torch.bool).tril() & mask.bool()[:, None, None, :]
    sees = sees | torch.eye(90, dtype=torch.bool)
    expected = definition(family, RULES[name, own], ids, positions=positions, padding=mask)
    if kind == "by head":
        sees = sees.expand(-1, 4, -1, -1)
    if kind in ("additive", "lowest"):
        least = -math.inf if kind == "additive" else torch.finfo(torch.float32).min
        sees = torch.zeros(sees.shape).masked_fill(~sees, least)
    with patched(model_of(family), name, **knobs(own)) as model:
        found = logits_of(model, ids, attention_mask=sees, position_ids=positions)
    assert_close(found[:1], expected[:1])
    assert_close(found[1:, kept], expected[1:, kept])


def test_what_a_mask_adds_is_added_in_every_band():
    ids = tokens(1, 60)
    bias = torch.randn(1, 4, 60, 60, generator=torch.Generator().manual_seed(0))
    bias = bias.masked_fill(~torch.ones(60, 60, dtype=torch.bool).tril(), -math.inf)
    model = model_of("llama")
    expected = logits_of(model, ids, attention_mask=bias)
    with patched(model, "leaky_rerope", window=10, slowdown=1):
        found = logits_of(model, ids, attention_mask=bias)
    assert_close(found, expected, 1e-5)


# what changes nothing


@pytest.mark.parametrize(
    ("name", "own", "length"),
    [
        ("rerope", "window=40", 40),
        ("leaky_rerope", "window=40 slowdown=3.0", 40),
        ("leaky_rerope", "slowdown=1.0", 90),
        ("leaky_rerope", "factor=1", 90),
        ("leaky_rerope", "", 64),
        ("self_extend", "window=40 group=5", 40),
        ("self_extend", "group=1 window=10", 90),
        ("self_extend", "", 64),
        ("dca", "chunk=40 limit=50", 50),
        ("dca", "", 64),
        ("string", "shift=40 window=10", 40),
        ("string", "shift=20 window=20", 90),
        ("streaming", "sinks=4 window=36", 36),
        ("piecewise", "slowdown=1.0", 90),
        ("piecewise", "slowdown=4.0", 65),
        ("power", "exponent=0", 90),
        ("ramp", "slope=0", 90),
        ("logn", "", 64),
        ("temperature", "factor=1", 90),
        ("temperature", "", 64),
        ("llama4", "scale=0", 90),
        ("yarn+leaky_rerope", "slowdown=1 factor=1", 90),
    ],
)
@pytest.mark.parametrize("family", REQUESTS)
def test_what_moves_nothing_leaves_the_logits_alone(family, name, own, length):
    ids = tokens(length=length)
    expected = logits_of(model_of(family), ids)
    with patched(model_of(family), name, **knobs(own)) as model:
        assert_close(logits_of(model, ids), expected, 1e-5)


# ways to decode


WAYS = {
    "dynamic": {},
    "static": {"cache_implementation": "static"},
    "lookup": {"prompt_lookup_num_tokens": 3},
    "chunks": {"prefill_chunk_size": 16},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("family", "name", "own"), EVERY)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_greedy_decoding_is_that_of_the_definition(family, name, own, way):
    ids = tokens(1, 60)
    with patched(model_of(family), name, **knobs(own)) as model:
        found = greedy(model, ids, 20, pad_token_id=0, **WAYS[way])
    assert_greedy(family, RULES[name, own], found, 60)


@pytest.mark.parametrize("way", ["dynamic", "static"])
@pytest.mark.parametrize("name", following(TRAINED))
@pytest.mark.parametrize("family", REQUESTS)
def test_knobs_follow_the_length_that_a_request_ends_at(family, name, way):
    ids = tokens(1, 60)
    rule = following(80)[name]
    with patched(model_of(family), name) as model:
        found = greedy(model, ids, 20, return_dict_in_generate=True, **WAYS[way])
    assert request_plan(found).lengths.tolist() == [80]
    assert_greedy(family, rule, found.sequences, 60)
    expected, plain = (definition(family, one, found.sequences) for one in (rule, TRUE))
    assert (expected - plain).abs().max() > 1e-3


@pytest.mark.parametrize("way", ["dynamic", "static"])
@pytest.mark.parametrize(
    ("name", "own", "rule"),
    [
        *[(*name, rule) for name, rule in RULES.items()],
        ("leaky_rerope", "", None),
        ("alibi", "", Rule(lambda m, n: 0, slope=slope)),
    ],
)
def test_each_row_of_a_padded_batch_is_decoded_as_if_alone(name, own, rule, way):
    ids, mask, _, kept = padded("left")
    with patched(model_of("llama"), name, **knobs(own)) as model:
        found = greedy(model, ids, 10, attention_mask=mask, **WAYS[way])
    for row, text in ((found[:1], ids[:1]), (found[1:, kept], ids[1:, kept])):
        own_rule = rule or following(row.shape[1])[name]
        assert_greedy("llama", own_rule, row, text.shape[1])


@pytest.mark.parametrize(("family", "name", "own"), ON_LLAMA)
def test_an_assistant_changes_nothing(family, name, own):
    ids = tokens(1, 60)
    with patched(model_of(family), name, **knobs(own)) as model:
        found = [
            greedy(model, ids, 20, assistant_model=assistant)
            for assistant in (model, copy.deepcopy(model))
        ]
    for one in found:
        assert_greedy(family, RULES[name, own], one, 60)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize(("name", "own"), [*RULES, ("leaky_rerope", "")])
def test_beams_are_those_of_decoding_without_a_cache(name, own, cache):
    ids, mask, _, _ = padded("left")
    settings = {"num_beams": 3, "num_return_sequences": 2, "attention_mask": mask}
    with patched(model_of("llama"), name, **knobs(own)) as model:
        found = greedy(model, ids, 8, **settings, **WAYS[cache])
        assert torch.equal(found, greedy(model, ids, 8, **settings, use_cache=False))


# one cache, used on


@pytest.mark.parametrize("build", [DynamicCache, StaticCache])
@pytest.mark.parametrize(("family", "name", "own"), EVERY)
def test_a_chat_goes_on_from_its_cache(family, name, own, build):
    first, more = tokens(1, 50), tokens(1, 15, seed=1)
    with patched(model_of(family), name, **knobs(own)) as model:
        size = {"max_cache_len": 100} if build is StaticCache else {}
        cache = build(config=model.config, **size)
        turn = greedy(model, first, 10, **{CACHE: cache})
        whole = torch.cat((turn, more), 1)
        # a generated token may be the one for padding, which transformers would leave out
        mask = torch.ones_like(whole)
        found = greedy(model, whole, 10, attention_mask=mask, **{CACHE: cache})
    assert_greedy(family, RULES[name, own], found[:, :60], 50)
    assert_greedy(family, RULES[name, own], found, 75)


@pytest.mark.parametrize(("name", "own"), [*RULES, ("leaky_rerope", "")])
def test_a_cropped_cache_goes_on(name, own):
    ids, other = tokens(length=80), tokens(length=15, seed=1)
    whole = torch.cat((ids[:, :65], other), 1)
    rule = RULES.get((name, own), following(80)["leaky_rerope"])
    with patched(model_of("llama"), name, **knobs(own)) as model, planned(80):
        cache = run(model, ids[:, :70], use_cache=True)[CACHE]
        run(model, ids[:, 70:71], use_cache=True, **{CACHE: cache})
        cache.crop(-6)
        found = run(model, other, use_cache=True, **{CACHE: cache}).logits
    assert_close(found, definition("llama", rule, whole)[:, 65:])


@pytest.mark.parametrize("move", ["reorder", "select", "repeat"])
@pytest.mark.parametrize(("name", "own"), [*RULES, ("leaky_rerope", "")])
def test_rows_of_a_cache_move_with_their_positions(name, own, move):
    ids, mask, _, _ = padded("left")
    rows = {"reorder": [1, 0], "select": [1], "repeat": [0, 0, 1, 1]}[move]
    more = tokens(len(rows), 4, seed=1)
    seen = torch.cat((mask[rows], torch.ones_like(more)), 1)
    positions = (seen.cumsum(-1) - 1).clamp(min=0)
    whole = torch.cat((ids[rows], more), 1)
    with patched(model_of("llama"), name, **knobs(own)) as model, planned(94):
        where = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
        cache = run(model, ids, use_cache=True, **where)[CACHE]
        if move == "reorder":
            cache.reorder_cache(torch.tensor(rows))
        elif move == "select":
            cache.batch_select_indices(torch.tensor(rows))
        else:
            cache.batch_repeat_interleave(2)
        where = {"attention_mask": seen, "position_ids": positions[:, -4:]}
        found = run(model, more, use_cache=True, **where, **{CACHE: cache}).logits
    for row, number in enumerate(rows):
        kept = slice(None if number == 0 else 37, None)
        rule = RULES.get((name, own)) or following(whole[row, kept].shape[0])[name]
        expected = definition("llama", rule, whole[row : row + 1, kept])
        assert_close(found[row : row + 1], expected[:, -4:])


# growth


@pytest.mark.parametrize("name", following(TRAINED))
@pytest.mark.parametrize("family", REQUESTS)
def test_a_planned_loop_is_that_of_the_definition(family, name):
    ids, cache, found = tokens(), None, []
    with patched(model_of(family), name) as model, planned(90):
        for start, stop in [(0, 50), (50, 85), *((n, n + 1) for n in range(85, 90))]:
            output = run(model, ids[:, start:stop], use_cache=True, **{CACHE: cache})
            cache = output[CACHE]
            found.append(output.logits)
    assert_close(torch.cat(found, 1), definition(family, following(90)[name], ids))


GROWN = math.ceil(TRAINED * 1.1 ** math.ceil(math.log(90 / TRAINED, 1.1)))
"""Where a plan that 90 tokens outgrow grows to: the next step of 1.1."""


@pytest.mark.parametrize("name", following(TRAINED))
def test_a_loop_that_outgrows_its_plan_stops_or_goes_on_as_it_was_told(name):
    ids = tokens(1, 90)
    model = model_of("llama")

    def last(**policy):
        with patched(model, name, **policy):
            cache = run(model, ids[:, :70], use_cache=True)[CACHE]
            output = run(model, ids[:, 70:], use_cache=True, **{CACHE: cache})
            return output.logits, request_plan(cache).lengths.item()

    with pytest.raises(RopeError, match="was planned for 70 tokens under"):
        last(on_growth="error")

    frozen, length = last(on_growth="freeze")
    assert length == 70
    assert_close(frozen, definition("llama", following(70)[name], ids)[:, 70:])

    grown, length = last(on_growth="rerotate")
    assert length == GROWN
    assert (grown - frozen).abs().max() > 1e-3


@pytest.mark.parametrize("name", following(TRAINED))
def test_a_model_of_one_layer_grows_exactly(name):
    """Its keys come from embeddings, which no plan changes."""
    ids = tokens(1, 90)
    model = tiny_llama(num_hidden_layers=1)
    expected = expected_logits(model, FAMILIES["llama"], following(GROWN)[name], ids)
    with patched(model, name, on_growth="rerotate"):
        cache = run(model, ids[:, :70], use_cache=True)[CACHE]
        found = run(model, ids[:, 70:], use_cache=True, **{CACHE: cache}).logits
    assert_close(found, expected[:, 70:])


@pytest.mark.parametrize("name", following(TRAINED))
def test_buckets_plan_for_the_next_one(name):
    ids = tokens(1, 90)
    with patched(model_of("llama"), name, buckets=2) as model:
        found = greedy(model, ids[:, :80], 10)
    assert_greedy("llama", following(128)[name], found, 80)


# what raises


@pytest.mark.parametrize("build", [DynamicCache, StaticCache])
@pytest.mark.parametrize(("family", "name", "own"), EVERY)
def test_a_cache_that_was_filled_unpatched_is_refused(family, name, own, build):
    ids, model = tokens(1, 20), model_of(family)
    cache = build(config=model.config, **({"max_cache_len": 40} if build is StaticCache else {}))
    run(model, ids[:, :10], use_cache=True, **{CACHE: cache})
    with patched(model, name, **knobs(own)):
        with pytest.raises(RopeError, match="holds 10 tokens that were not computed under"):
            run(model, ids[:, 10:], use_cache=True, **{CACHE: cache})
        assert int(cache.get_seq_length()) == 10


def test_a_cache_of_other_knobs_is_refused():
    ids, model = tokens(1, 20), model_of("llama")
    with patched(model, "rerope", window=10):
        cache = run(model, ids[:, :10], use_cache=True)[CACHE]
    with (
        patched(model, "rerope", window=11),
        pytest.raises(RopeError, match="was filled under ReRoPE"),
    ):
        run(model, ids[:, 10:], use_cache=True, **{CACHE: cache})


@pytest.mark.parametrize("name", ["sdpa", "eager"])
def test_an_attention_that_is_set_after_the_patch_is_refused_at_the_call(name):
    model = copy.deepcopy(model_of("llama"))
    with patched(model, "rerope", window=10):
        model.set_attn_implementation(name)
        with pytest.raises(RopeError, match=f"attention was set to {name!r} after"):
            run(model, tokens(1, 20))
