"""Length-dependent methods, their caches, and requests that end elsewhere than they began.

The oracle is the static method that a request of the planned length gets, decoded without a cache;
it is checked against stock transformers elsewhere.
"""

import copy
import pickle
import threading
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import zoo
from conftest import TRAINED, logits, relative, tiny_llama
from transformers import DynamicCache, StaticCache

from hf_rope_ext import (
    MethodParameterError,
    RopeError,
    describe,
    load_pretrained,
    patch_model,
    planned,
    request_plan,
    unpatch_model,
)
from hf_rope_ext.methods import make_method
from hf_rope_ext.models.sites import read_sites

pytestmark = pytest.mark.filterwarnings("ignore::hf_rope_ext.RopeWarning")

FAMILIES = (
    "llama", "gemma3_text", "gpt_neox", "cohere", "deepseek_v3", "gpt_oss", "qwen3", "qwen2_vl",
    "phi3", "glm4", "mistral", "gptj", "falcon_h1", "llama4_text", "qwen3_next",
)  # fmt: skip
SLOWDOWN = [1 + pair / 4 for pair in range(8)]


def methods(pairs=8):
    slow = [1 + 2 * pair / pairs for pair in range(pairs)]
    return {
        "dynamic": {"factor": 4},
        "dynamic_ntk": {"factor": 4},
        "dynamic_linear": {"factor": 4},
        "dynamic_yarn": {"factor": 4},
        "longrope": {"factor": 4, "long_factor": slow},
    }


METHODS = tuple(methods())


def text(rows, length, seed=1):
    return torch.randint(10, 128, (rows, length), generator=torch.Generator().manual_seed(seed))


def dynamic(method="dynamic_yarn", model=None, **settings):
    model = tiny_llama() if model is None else model
    return patch_model(model, method, **{**methods()[method], **settings})


def frozen(method, length, model=None, **knobs):
    """The model with the static method that a request of ``length`` gets."""
    model = tiny_llama() if model is None else model
    geometry = read_sites(model)[0].geometry
    made = make_method(method, **{**methods()[method], **knobs})
    return patch_model(model, made.freeze(geometry, length))


def greedy(model, ids, new, **arguments):
    return model.generate(ids, max_new_tokens=new, min_new_tokens=new, do_sample=False, **arguments)


def step_by_step(model, ids, prompt, cache=None):
    """Logits of a loop written by hand, and its cache."""
    found = []
    for first, last in [(0, prompt), *((at, at + 1) for at in range(prompt, ids.shape[1]))]:
        with torch.no_grad():
            out = model(ids[:, first:last], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        found.append(out.logits)
    return torch.cat(found, dim=1), cache


# --- generate ------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_cached_greedy_decoding_is_that_of_the_full_forward_at_the_planned_length(family, method):
    model, twin = zoo.build(family), zoo.build(family)
    trained = read_sites(model)[0].geometry.original_max_position_embeddings
    pairs = read_sites(model)[0].geometry.pairs
    prompt, new = trained - 10, 30  # it crosses the trained length on the way
    knobs = methods(pairs)[method]
    patch_model(model, method, **knobs)
    made = make_method(method, **knobs)
    patch_model(twin, made.freeze(read_sites(zoo.build(family))[0].geometry, prompt + new))
    ids = text(1, prompt)

    settings = {"return_dict_in_generate": True, "output_logits": True}
    cached = greedy(model, ids, new, **settings)
    others = [greedy(one, ids, new, use_cache=False, **settings) for one in (model, twin)]

    for other in others:
        assert torch.equal(cached.sequences, other.sequences)
        assert relative(torch.stack(cached.logits), torch.stack(other.logits)) < 1e-4


def vision_language_inputs(model, words):
    """A prompt of text around an image, which takes fewer positions than tokens."""
    model.config.image_token_id = model.model.config.image_token_id = 9
    kinds = torch.tensor([[0] * 4 + [1] * 16 + [0] * words])
    ids = torch.where(kinds == 1, 9, text(1, kinds.shape[1]))
    pixels = torch.randn(64, 3 * 2 * 16 * 16, generator=torch.Generator().manual_seed(0))
    return {
        "input_ids": ids,
        "mm_token_type_ids": kinds,
        "pixel_values": pixels,
        "image_grid_thw": torch.tensor([[1, 8, 8]]),
    }


@pytest.mark.parametrize("method", METHODS)
def test_an_image_in_the_prompt_is_planned_by_positions(method):
    model, twin = zoo.build("qwen2_vl"), zoo.build("qwen2_vl")
    inputs = vision_language_inputs(model, words=50)
    vision_language_inputs(twin, words=50)
    geometry = read_sites(model)[0].geometry
    positions = 4 + 4 + 50 + 30  # the image takes max(8, 8) / 2
    settings = {"max_new_tokens": 30, "min_new_tokens": 30, "do_sample": False}
    patch_model(model, method, **methods(geometry.pairs)[method])
    patch_model(
        twin, make_method(method, **methods(geometry.pairs)[method]).freeze(geometry, positions)
    )

    found = model.generate(**inputs, **settings, return_dict_in_generate=True)

    assert request_plan(found).lengths.tolist() == [positions]
    assert torch.equal(found.sequences, model.generate(**inputs, **settings, use_cache=False))
    assert torch.equal(found.sequences, twin.generate(**inputs, **settings, use_cache=False))


def test_the_decoding_of_stock_dynamic_does_not_agree_with_its_cache():
    model = tiny_llama({"rope_type": "dynamic", "factor": 4.0})
    ids = text(1, 50)

    assert not torch.equal(greedy(model, ids, 60), greedy(model, ids, 60, use_cache=False))


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

    second = greedy(
        model, longer, 20, past_key_values=first.past_key_values, return_dict_in_generate=True
    )

    assert request_plan(second).lengths.tolist() == [120]
    assert torch.equal(second.sequences, greedy(frozen("dynamic_yarn", 120), longer, 20))


def test_a_chat_that_stays_within_its_plan_keeps_its_cache():
    model, ids = dynamic(), text(1, 70)
    cache = DynamicCache(config=model.config)
    with planned(200), torch.no_grad():
        model(ids[:, :60], past_key_values=cache)
    keys = cache.layers[0].keys

    found = greedy(model, ids, 10, past_key_values=cache)

    assert torch.equal(cache.layers[0].keys[:, :, :60], keys)
    assert torch.equal(found, greedy(frozen("dynamic_yarn", 200), ids, 10))


def test_only_the_new_tokens_of_a_longer_chat_grow_its_cache():
    model, ids = dynamic(), text(1, 130)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :70], past_key_values=cache)

    found = greedy(
        model,
        ids[:, 70:],
        20,
        past_key_values=cache,
        attention_mask=torch.ones_like(ids),
        return_dict_in_generate=True,
    )

    assert request_plan(found).lengths.tolist() == [150]
    assert cache.get_seq_length() == 149


def test_a_prefix_within_the_trained_length_is_kept():
    model, ids = dynamic(), text(1, 40)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :20], past_key_values=cache)
    keys = cache.layers[0].keys

    found = greedy(model, ids, 20, past_key_values=cache)

    assert torch.equal(cache.layers[0].keys[:, :, :20], keys)
    assert torch.equal(found, greedy(tiny_llama(), ids, 20))


def test_a_chunk_of_nothing_but_padding_is_refused():
    batch = text(2, 60)
    mask = torch.ones_like(batch)
    mask[1, :40] = 0

    with pytest.raises(RopeError, match="prefill_chunk_size=16 gives a row"):
        greedy(dynamic(), batch, 10, attention_mask=mask, prefill_chunk_size=16)


# --- short inputs ---------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
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


# --- loops written by hand ------------------------------------------------------------------------


def test_a_planned_loop_equals_the_full_forward():
    ids = text(1, 200)
    with planned(200):
        found, _ = step_by_step(dynamic(), ids, 40)

    assert relative(found, logits(frozen("dynamic_yarn", 200), ids)) < 1e-5


def test_a_cache_of_fixed_size_is_planned_for_its_size():
    model, ids = dynamic(), text(1, 150)
    cache = StaticCache(config=model.config, max_cache_len=180)

    found, _ = step_by_step(model, ids, 40, cache)

    assert relative(found, logits(frozen("dynamic_yarn", 180), ids)) < 1e-5


def test_within_the_trained_length_a_loop_is_bit_identical_to_the_unpatched_one():
    ids = text(1, TRAINED)

    found, cache = step_by_step(dynamic(), ids, 30)

    assert torch.equal(found, step_by_step(tiny_llama(), ids, 30)[0])
    assert request_plan(cache).factors == [1.0]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_rerotated_keys_are_those_of_the_longer_plan(family, method):
    model = zoo.build(family)
    trained = read_sites(model)[0].geometry.original_max_position_embeddings
    knobs = methods(read_sites(model)[0].geometry.pairs)[method]
    patch_model(model, method, **knobs)
    ids = text(2, trained + 12)
    _, grown = step_by_step(model, ids, trained + 9)  # beyond, so that the first step grows it
    capacity = int(request_plan(grown).lengths.max())
    with planned(capacity):
        _, expected = step_by_step(model, ids, trained + 9)

    assert capacity > trained + 12
    held = zip(grown.layers, expected.layers, strict=True)
    first = next(pair for pair in held if isinstance(getattr(pair[0], "keys", None), torch.Tensor))
    for part in ("keys", "values"):
        found, wanted = (getattr(layer, part) for layer in first)
        assert relative(found, wanted) < 1e-4


def test_rerotation_turns_each_row_and_its_padding_by_their_own_positions():
    model = dynamic()
    batch, mask = text(2, 100), torch.ones(2, 100, dtype=torch.int64)
    mask[1, :70] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    caches = []
    for length in (None, 300):
        with torch.no_grad(), planned(length) if length else nullcontext():
            out = model(batch, attention_mask=mask, position_ids=positions, use_cache=True)
            more = torch.cat([mask, torch.ones(2, 1, dtype=torch.int64)], dim=1)
            cache = out.past_key_values
            last = torch.tensor([[100], [30]])
            grown = model(text(2, 1), attention_mask=more, position_ids=last, past_key_values=cache)
            caches.append(grown.past_key_values)
    found, wanted = caches

    assert request_plan(found).lengths.tolist() == [104, 34]
    assert request_plan(wanted).lengths.tolist() == [300, 230]
    again = dynamic()
    with planned(104), torch.no_grad():
        out = again(batch, attention_mask=mask, position_ids=positions, use_cache=True)
    assert relative(found.layers[0].keys[:, :, :100], out.past_key_values.layers[0].keys) < 1e-5


def test_rerotation_turns_an_image_by_its_own_axes():
    grown, expected = [], []
    for capacity, kept in ((None, grown), (86, expected)):
        model = zoo.build("qwen2_vl")
        inputs = vision_language_inputs(model, words=60)
        patch_model(model, "dynamic_yarn", factor=4)
        with torch.no_grad(), planned(capacity) if capacity else nullcontext():
            cache = model(**inputs, use_cache=True).past_key_values
            model(text(1, 1), past_key_values=cache)
        kept.append(cache)
    (found,), (wanted,) = grown, expected

    assert request_plan(found).lengths.tolist() == request_plan(wanted).lengths.tolist() == [74]
    assert relative(found.layers[0].keys, wanted.layers[0].keys) < 1e-5


def test_a_cache_that_was_cut_back_grows_by_the_positions_it_still_holds():
    ids, caches = text(1, 110), []
    for capacity in (None, 114):
        model = dynamic()
        with torch.no_grad(), planned(capacity) if capacity else nullcontext():
            cache = model(ids[:, :100], use_cache=True).past_key_values
            cache.crop(-30)
            model(ids[:, 70:], past_key_values=cache)
        caches.append(cache)
    found, wanted = caches

    assert request_plan(found).lengths.tolist() == request_plan(wanted).lengths.tolist() == [114]
    assert relative(found.layers[0].keys, wanted.layers[0].keys) < 1e-5


def test_outgrowing_a_plan_can_be_an_error_and_changes_nothing():
    model, ids = dynamic(on_growth="error"), text(1, 100)
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        before = cache.layers[0].keys.clone()
        with pytest.raises(RopeError, match="planned for 100 tokens"):
            model(ids[:, :1], past_key_values=cache)

    assert torch.equal(cache.layers[0].keys, before)
    assert logits(model, ids).isfinite().all()


def test_freezing_keeps_the_first_plan():
    ids = text(1, 150)

    found, cache = step_by_step(dynamic(on_growth="freeze"), ids, 100)

    assert request_plan(cache).lengths.tolist() == [100]
    assert relative(found, logits(frozen("dynamic_yarn", 100), ids)) < 1e-5


def test_growth_goes_in_geometric_steps():
    plans = []
    model = dynamic(on_plan=lambda plan: plans.append(plan.lengths.tolist()))

    step_by_step(model, text(1, 250), 30)

    assert plans == [
        [30],
        [64],
        [71],
        [78],
        [86],
        [94],
        [104],
        [114],
        [125],
        [138],
        [151],
        [166],
        [183],
        [201],
        [221],
        [244],
        [268],
    ]


def test_another_methods_cache_is_refused():
    ids = text(1, 80)
    with torch.no_grad():
        stranger = tiny_llama()(ids, use_cache=True).past_key_values
        other = dynamic("dynamic_ntk")(ids, use_cache=True).past_key_values
        with pytest.raises(RopeError, match="holds 80 tokens that were not computed under"):
            dynamic()(ids[:, :1], past_key_values=stranger)
        with pytest.raises(RopeError, match="filled under DynamicNTK"):
            dynamic()(ids[:, :1], past_key_values=other)


def test_another_batch_is_refused():
    model = dynamic()
    positions = torch.arange(80).expand(3, -1)
    with torch.no_grad():
        cache = model(text(3, 80), position_ids=positions, use_cache=True).past_key_values
        cache.batch_select_indices(torch.tensor([0, 1]))
        with pytest.raises(RopeError, match="planned for 3 rows, but 2 came"):
            model(text(2, 1), position_ids=torch.full((2, 1), 80), past_key_values=cache)


def test_a_reset_or_cropped_cache_is_planned_and_recorded_anew():
    model, ids = dynamic(), text(1, 100)
    with torch.no_grad():
        cache = model(text(1, 150), use_cache=True).past_key_values
        cache.reset()
        model(ids, past_key_values=cache)
        assert request_plan(cache).lengths.tolist() == [100]
        cache.crop(-30)
        model(ids[:, 70:], past_key_values=cache)
    expected = logits(model, ids)

    with torch.no_grad():
        again = model(ids[:, -1:], past_key_values=_cropped(cache)).logits
    assert relative(again[:, -1], expected[:, -1]) < 1e-5


def _cropped(cache):
    cache.crop(-1)
    return cache


# --- the policy -----------------------------------------------------------------------------------


def test_buckets_round_the_planned_length_up():
    model = dynamic(buckets=2)
    found = greedy(model, text(1, 70), 20, return_dict_in_generate=True)

    assert request_plan(found).lengths.tolist() == [128]
    assert torch.equal(found.sequences, greedy(frozen("dynamic_yarn", 128), text(1, 70), 20))
    assert torch.equal(logits(model, text(1, 60)), logits(tiny_llama(), text(1, 60)))


def test_a_length_that_is_a_bucket_stays_in_it():
    model = dynamic("dynamic", buckets=1.25)
    for power in range(12):
        length = torch.tensor([[[TRAINED * 1.25**power]]], dtype=torch.float64)
        policy = model.model.rotary_emb.rotations[None].policy
        assert policy.round_up(length, TRAINED).item() == pytest.approx(length.item(), rel=1e-12)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "dynamic", "factor": 4.0},
        {
            "rope_type": "longrope",
            "factor": 4.0,
            "short_factor": [1.0] * 8,
            "long_factor": SLOWDOWN,
            "original_max_position_embeddings": TRAINED,
        },
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_stock_behaviour_can_be_had_on_purpose(rope):
    knobs = {key: rope[key] for key in rope if key in ("factor", "short_factor", "long_factor")}
    model = patch_model(tiny_llama(), rope["rope_type"], compat="transformers", **knobs)
    stock = tiny_llama(rope)

    for length in (200, 100, 40, 90, 64, 30):  # what it remembers included
        ids = text(2, length)
        assert relative(logits(model, ids), logits(stock, ids)) < 1e-4
    assert torch.equal(greedy(model, text(1, 50), 60), greedy(stock, text(1, 50), 60))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"on_growth": "ignore"}, "on_growth must be one of 'rerotate', 'error', 'freeze'"),
        ({"buckets": 1.0}, "buckets must be a finite number greater than 1"),
        ({"buckets": "2"}, "buckets must be a finite number greater than 1"),
        ({"compat": "vllm"}, "compat must be one of None, 'transformers'"),
        ({"on_plan": 3}, "on_plan must be a function"),
        ({"compat": "transformers", "on_growth": "error"}, "on_growth has no effect with compat"),
        ({"compat": "transformers", "buckets": 2}, "buckets has no effect with compat"),
    ],
)
def test_a_wrong_policy_is_refused_before_anything_changes(settings, message):
    model = tiny_llama()

    with pytest.raises(MethodParameterError, match=message):
        dynamic(model=model, **settings)

    assert type(model.model.rotary_emb).__name__ == "LlamaRotaryEmbedding"
    assert "generate" not in vars(model)


def test_a_static_method_has_no_policy():
    with pytest.raises(MethodParameterError, match="on_growth is for methods that follow"):
        patch_model(tiny_llama(), "yarn", factor=4, on_growth="error")


def test_a_wrong_planned_length_is_refused():
    for wrong in (0, -1, 2.5, "100", True):
        with (
            pytest.raises(RopeError, match="max_length must be a positive integer"),
            planned(wrong),
        ):
            pass


def test_the_policy_is_saved_and_restored(tmp_path):
    dynamic(buckets=2, on_growth="freeze").save_pretrained(tmp_path)

    policy = load_pretrained(tmp_path).model.rotary_emb.rotations[None].policy

    assert (policy.buckets, policy.on_growth) == (2, "freeze")
    dynamic(compat="transformers").save_pretrained(tmp_path)
    again = load_pretrained(tmp_path).model.rotary_emb.rotations[None].policy
    assert again.compat == "transformers"


def test_describe_says_what_a_request_is_planned_for():
    model = dynamic()
    found = greedy(model, text(1, 100), 28, return_dict_in_generate=True)

    site = describe(model, found.past_key_values).sites[0]

    assert site.attention_scaling == pytest.approx(0.1 * torch.tensor(2.0).log().item() + 1)
    assert describe(model).sites[0].attention_scaling > site.attention_scaling


# --- the machinery --------------------------------------------------------------------------------


def test_undoing_leaves_no_hook_and_no_method_behind():
    model = dynamic()
    unpatch_model(model)

    assert not {"generate", "_prepare_cache_for_generation"} & set(vars(model))
    for name in ("_forward_hooks", "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"):
        assert not getattr(model.model, name)


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))]
)
def test_a_copy_plans_for_itself(duplicate):
    model = dynamic()
    ids = text(1, 80)
    expected = greedy(model, ids, 40)

    copied = duplicate(model)
    unpatch_model(model)

    assert torch.equal(greedy(copied, ids, 40), expected)
    assert torch.equal(greedy(unpatch_model(copied), ids, 20), greedy(tiny_llama(), ids, 20))


def test_generation_through_an_adapter_is_planned():
    from peft import LoraConfig, get_peft_model

    ids = text(1, 60)
    adapted = get_peft_model(dynamic(), LoraConfig(r=2, target_modules=["q_proj"]))

    found = adapted.generate(input_ids=ids, max_new_tokens=40, min_new_tokens=40, do_sample=False)

    assert torch.equal(found, greedy(frozen("dynamic_yarn", 100), ids, 40))


def test_a_failed_forward_leaves_no_request_behind():
    model, ids = dynamic(), text(1, 100)
    expected = logits(model, ids)
    with pytest.raises(IndexError):
        model(torch.full((1, 100), 10_000))

    assert torch.equal(logits(model, ids), expected)


def test_a_paged_cache_is_refused():
    with pytest.raises(RopeError, match="cannot serve a paged cache"):
        dynamic().model(text(1, 10), cache=SimpleNamespace())


@pytest.mark.parametrize("method", METHODS)
def test_making_a_plan_never_waits_for_the_device(method):
    """A value fetched from the device would break the graph."""
    torch._dynamo.reset()
    model, ids = dynamic(method, buckets=2), text(2, 150)
    whole = torch.compile(model, fullgraph=True, backend="eager")

    with torch.no_grad():
        found = whole(ids, use_cache=False).logits

    assert torch.equal(found, logits(model, ids))


def test_the_decode_step_compiles_whole_and_does_not_compile_again_as_it_grows():
    torch._dynamo.reset()
    model, ids = dynamic(), text(1, 120)
    cache = StaticCache(config=model.config, max_cache_len=130)
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    expected, _ = step_by_step(model, ids, 40, StaticCache(config=model.config, max_cache_len=130))
    step = torch.compile(model, fullgraph=True, backend=backend)
    with torch.no_grad():
        model(ids[:, :40], past_key_values=cache)
        found = [
            step(
                ids[:, at : at + 1], past_key_values=cache, position_ids=torch.tensor([[at]])
            ).logits
            for at in range(40, 120)
        ]

    assert len(graphs) <= 2
    assert relative(torch.cat(found, dim=1), expected[:, 40:]) < 1e-5


def test_a_growing_cache_in_a_planned_loop_compiles_whole():
    torch._dynamo.reset()
    model, ids = dynamic(), text(1, 120)
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    step = torch.compile(model, fullgraph=True, backend=backend, dynamic=True)
    with torch.no_grad(), planned(120):
        expected, _ = step_by_step(model, ids, 40)
        cache = model(ids[:, :40], use_cache=True).past_key_values
        found = [step(ids[:, at : at + 1], past_key_values=cache).logits for at in range(40, 120)]

    assert len(graphs) <= 3
    assert relative(torch.cat(found, dim=1), expected[:, 40:]) < 1e-5
