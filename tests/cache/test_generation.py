"""Generation: each request is planned for the length that it ends at."""

import threading

import pytest
import torch
import zoo
from conftest import TRAINED, logits, relative, tiny_llama
from decoding import CACHE, FAMILIES, dynamic, frozen, greedy, text, vision_language_inputs
from method_knobs import PER_REQUEST, knobs
from transformers import DynamicCache

from hf_rope_ext import patch_model, planned, request_plan, unpatch_model
from hf_rope_ext.methods import make_method
from hf_rope_ext.models.sites import read_sites

pytestmark = pytest.mark.filterwarnings("ignore::hf_rope_ext.RopeWarning")


@pytest.mark.parametrize("method", PER_REQUEST)
@pytest.mark.parametrize("family", FAMILIES)
def test_cached_greedy_decoding_is_that_of_the_full_forward_at_the_planned_length(family, method):
    model, twin = zoo.build(family), zoo.build(family)
    trained = read_sites(model)[0].geometry.original_max_position_embeddings
    pairs = read_sites(model)[0].geometry.pairs
    prompt, new = trained - 10, 30  # it crosses the trained length on the way
    values = knobs(method, pairs)
    patch_model(model, method, **values)
    made = make_method(method, **values)
    patch_model(twin, made.freeze(read_sites(zoo.build(family))[0].geometry, prompt + new))
    ids = text(1, prompt)

    settings = {"return_dict_in_generate": True, "output_logits": True}
    cached = greedy(model, ids, new, **settings)
    others = [greedy(one, ids, new, use_cache=False, **settings) for one in (model, twin)]

    for other in others:
        assert torch.equal(cached.sequences, other.sequences)
        assert relative(torch.stack(cached.logits), torch.stack(other.logits)) < 1e-4


@pytest.mark.sweep
@pytest.mark.parametrize("method", PER_REQUEST)
def test_an_image_in_the_prompt_is_planned_by_positions(method):
    model, twin = zoo.build("qwen2_vl"), zoo.build("qwen2_vl")
    inputs = vision_language_inputs(model, words=50)
    vision_language_inputs(twin, words=50)
    geometry = read_sites(model)[0].geometry
    positions = 4 + 4 + 50 + 30  # the image takes max(8, 8) / 2
    settings = {"max_new_tokens": 30, "min_new_tokens": 30, "do_sample": False}
    values = knobs(method, geometry.pairs)
    patch_model(model, method, **values)
    patch_model(twin, make_method(method, **values).freeze(geometry, positions))

    found = model.generate(**inputs, **settings, return_dict_in_generate=True)

    assert request_plan(found).lengths.tolist() == [positions]
    assert torch.equal(found.sequences, model.generate(**inputs, **settings, use_cache=False))
    assert torch.equal(found.sequences, twin.generate(**inputs, **settings, use_cache=False))


def test_the_decoding_of_stock_dynamic_does_not_agree_with_its_cache():
    model = tiny_llama({"rope_type": "dynamic", "factor": 4.0})
    ids = text(1, 50)

    assert not torch.equal(greedy(model, ids, 60), greedy(model, ids, 60, use_cache=False))


@pytest.mark.sweep
@pytest.mark.parametrize(
    "arguments",
    [
        {"num_beams": 3},
        {"num_beams": 2, "num_return_sequences": 2},
        {"prompt_lookup_num_tokens": 3},
        {"cache_implementation": "static"},
        # transformers moves these with CUDA streams
        pytest.param({"cache_implementation": "offloaded"}, marks=pytest.mark.gpu),
        pytest.param({"cache_implementation": "offloaded_static"}, marks=pytest.mark.gpu),
        {"prefill_chunk_size": 16},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:.*")
def test_every_way_to_decode_agrees_with_the_static_twin(arguments):
    offloads = "offloaded" in arguments.get("cache_implementation", "")
    device = "cuda" if offloads else "cpu"
    ids = text(1, 60).to(device)

    found = greedy(dynamic().to(device), ids, 40, **arguments)

    twin = frozen("dynamic_yarn", 100).to(device)
    assert torch.equal(found, greedy(twin, ids, 40, **arguments))


def test_sampling_several_sequences_agrees_with_the_static_twin():
    ids = text(2, 60)
    drawn = []
    for model in (dynamic(), frozen("dynamic_yarn", 100)):
        torch.manual_seed(3)
        drawn.append(model.generate(ids, max_new_tokens=40, do_sample=True, num_return_sequences=3))

    assert torch.equal(*drawn)


def test_an_assistant_that_is_patched_too_changes_nothing():
    ids = text(1, 60)
    assistant = dynamic(model=tiny_llama(num_hidden_layers=1))

    found = greedy(dynamic(), ids, 40, assistant_model=assistant)

    assert torch.equal(found, greedy(frozen("dynamic_yarn", 100), ids, 40))


def test_generation_through_an_adapter_is_planned():
    from peft import LoraConfig, get_peft_model

    ids = text(1, 60)
    adapted = get_peft_model(dynamic(), LoraConfig(r=2, target_modules=["q_proj"]))

    found = adapted.generate(input_ids=ids, max_new_tokens=40, min_new_tokens=40, do_sample=False)

    assert torch.equal(found, greedy(frozen("dynamic_yarn", 100), ids, 40))


def test_rows_of_a_padded_batch_are_planned_one_by_one():
    long, short = text(1, 100), text(1, 20, seed=2)
    batch = torch.cat([long, torch.cat([torch.zeros(1, 80, dtype=torch.int64), short], dim=1)])
    mask = torch.ones_like(batch)
    mask[1, :80] = 0

    model = dynamic()
    together = greedy(model, batch, 30, attention_mask=mask, return_dict_in_generate=True)

    assert torch.equal(together.sequences[:1], greedy(dynamic(), long, 30))
    assert torch.equal(together.sequences[1:, 80:], greedy(tiny_llama(), short, 30))
    assert request_plan(together).lengths.tolist() == [130, 50]
    assert request_plan(together).factors == [130 / TRAINED, 1.0]


@pytest.mark.parametrize("family", ["gemma3_text", "qwen2_vl", "deepseek_v3"])
def test_a_short_row_beside_a_long_one_equals_its_single_run(family):
    model = zoo.build(family)
    trained = read_sites(model)[0].geometry.original_max_position_embeddings
    patch_model(model, "dynamic_yarn", factor=4)
    short, length = text(1, 20, seed=2), 3 * trained
    batch = torch.cat([text(1, length), torch.nn.functional.pad(short, (length - 20, 0))])
    mask = torch.ones_like(batch)
    mask[1, :-20] = 0

    together = greedy(model, batch, 10, attention_mask=mask)

    assert torch.equal(together[1:, -30:], greedy(model, short, 10))


def test_a_plan_holds_for_the_life_of_the_cache_and_a_longer_chat_is_prefilled_again():
    model = dynamic()
    first = greedy(model, text(1, 70), 20, return_dict_in_generate=True)
    longer = torch.cat([first.sequences, text(1, 10, seed=5)], dim=1)

    second = greedy(model, longer, 20, **{CACHE: first[CACHE]}, return_dict_in_generate=True)

    assert request_plan(second).lengths.tolist() == [120]
    assert torch.equal(second.sequences, greedy(frozen("dynamic_yarn", 120), longer, 20))


def test_a_chat_that_stays_within_its_plan_keeps_its_cache():
    model, ids = dynamic(), text(1, 70)
    cache = DynamicCache(config=model.config)
    with planned(200), torch.no_grad():
        model(ids[:, :60], **{CACHE: cache})
    keys = cache.layers[0].keys

    found = greedy(model, ids, 10, **{CACHE: cache})

    assert torch.equal(cache.layers[0].keys[:, :, :60], keys)
    assert torch.equal(found, greedy(frozen("dynamic_yarn", 200), ids, 10))


def test_only_the_new_tokens_of_a_longer_chat_grow_its_cache():
    model, ids = dynamic(), text(1, 130)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :70], **{CACHE: cache})

    found = greedy(
        model,
        ids[:, 70:],
        20,
        **{CACHE: cache},
        attention_mask=torch.ones_like(ids),
        return_dict_in_generate=True,
    )

    assert request_plan(found).lengths.tolist() == [150]
    assert cache.get_seq_length() == 149


def test_a_prefix_within_the_trained_length_is_kept():
    model, ids = dynamic(), text(1, 40)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :20], **{CACHE: cache})
    keys = cache.layers[0].keys

    found = greedy(model, ids, 20, **{CACHE: cache})

    assert torch.equal(cache.layers[0].keys[:, :, :20], keys)
    assert torch.equal(found, greedy(tiny_llama(), ids, 20))


def test_a_chunk_of_nothing_but_padding_is_planned_from_the_whole_prompt():
    batch = text(2, 60)
    mask = torch.ones_like(batch)
    mask[1, :40] = 0

    model = dynamic()
    expected = greedy(model, batch, 10, attention_mask=mask)
    found = greedy(model, batch, 10, attention_mask=mask, prefill_chunk_size=16)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("method", PER_REQUEST)
def test_what_fits_is_bit_identical_to_the_unpatched_model_whatever_ran_before(method):
    model = dynamic(method, **({"attention_factor": 1.0} if method == "longrope" else {}))
    short, plain = text(2, 40), tiny_llama()

    before = logits(model, short)
    logits(model, text(1, 250))
    after = logits(model, short)

    assert torch.equal(before, logits(plain, short))
    assert torch.equal(after, before)
    assert torch.equal(greedy(model, short, 24), greedy(plain, short, 24))


def test_two_threads_on_one_model_do_not_mix():
    model = dynamic()
    requests = {length: text(1, length, seed=length) for length in (30, 90, 150, 210)}
    alone = {length: greedy(model, ids, 20) for length, ids in requests.items()}
    found = {}

    def run(length):
        for _ in range(3):
            found.setdefault(length, []).append(greedy(model, requests[length], 20))

    threads = [threading.Thread(target=run, args=(length,)) for length in requests]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert all(torch.equal(alone[length], one) for length in requests for one in found[length])


@pytest.mark.parametrize("method", ["yarn", "dynamic_yarn"])
def test_phi_keeps_its_cache_where_a_request_grows_beyond_the_trained_length(method):
    """Stock Phi drops it there, for its LongRoPE; before transformers 5.20 without filling it."""
    model = zoo.build("phi3")
    seen = []
    patch_model(model, method, factor=4)
    hook = model.model.embed_tokens.register_forward_pre_hook(
        lambda module, args: seen.append(args[0].shape[1])
    )

    greedy(model, text(1, TRAINED - 4), 8)

    hook.remove()
    assert seen == [TRAINED - 4, *[1] * 7]
    assert model.config.original_max_position_embeddings == TRAINED
    unpatch_model(model)
    assert "prepare_inputs_for_generation" not in vars(model)
