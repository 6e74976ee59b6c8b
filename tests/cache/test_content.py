"""A cache that holds what token ids cannot give back, or what nobody rotated."""

import pytest
import torch
import zoo
import zoo_images
from conftest import TRAINED, relative, tiny_llama
from decoding import CACHE, dynamic, frozen, greedy, text
from peft import (
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from transformers import (
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    StaticCache,
)

from hf_rope_ext import RopeError, patch_model, planned, request_plan

IMAGE = 7
VIRTUAL = 40


def llava(trained=TRAINED):
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        image_size=16, patch_size=8, projection_dim=32,
    )  # fmt: skip
    words = tiny_llama(max_position_embeddings=trained).config
    torch.manual_seed(0)
    towers = {"vision_config": vision, "text_config": words}
    config = LlavaConfig(**towers, image_token_index=IMAGE, vision_feature_layer=-1)
    return LlavaForConditionalGeneration(config).eval()


def chat(seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.cat((text(1, 4), torch.full((1, 4), IMAGE), text(1, 4, seed=2)), dim=1)
    return {"input_ids": ids, "pixel_values": torch.randn(1, 3, 16, 16, generator=generator)}


GREEDY = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}
SECOND = text(1, 20, seed=3)


def turns(model, first, **second):
    """The first scores of a second turn on the cache of the first, and that cache."""
    out = model.generate(**first, max_new_tokens=1, **GREEDY)
    ids = torch.cat((first["input_ids"], SECOND), dim=1)
    out = model.generate(ids, **{CACHE: out[CACHE]}, max_new_tokens=4, **GREEDY, **second)
    return out.logits[0], out[CACHE]


def test_a_longer_chat_does_not_forget_its_image():
    model = dynamic(model=llava(trained=16))
    one, two = (turns(model, chat(seed))[0] for seed in (0, 1))
    assert relative(one, two) > 0.1


def test_a_longer_chat_with_the_same_image_passed_again_is_filled_again():
    model, twin = dynamic(model=llava(trained=16)), llava(trained=16)
    first = chat()

    found, cache = turns(model, first, pixel_values=first["pixel_values"])

    assert request_plan(cache).lengths.item() == 36
    frozen("dynamic_yarn", 36, model=twin)
    whole = {**first, "input_ids": torch.cat((first["input_ids"], SECOND), dim=1)}
    with torch.no_grad():
        assert relative(found, twin(**whole).logits[:, -1]) < 2e-5


def test_a_new_image_does_not_stand_for_the_first():
    model = dynamic(model=llava(trained=16))
    first = chat()
    settings = {"max_new_tokens": 4, "suppress_tokens": [IMAGE], "return_dict_in_generate": True}
    out = model.generate(**first, **settings, do_sample=False)
    keys = out[CACHE].layers[0].keys.clone()
    second = torch.cat((out.sequences, chat()["input_ids"]), dim=1)

    new = {"pixel_values": chat(1)["pixel_values"], CACHE: out[CACHE]}
    model.generate(second, **new, **settings, do_sample=False)

    assert request_plan(out[CACHE]).lengths.item() == 32
    fresh = dynamic(model=llava(trained=16))
    with torch.no_grad(), planned(32):
        expected = fresh(**first, use_cache=True)[CACHE].layers[0].keys
    assert not torch.equal(keys[:, :, :12], out[CACHE].layers[0].keys[:, :, :12])
    assert relative(out[CACHE].layers[0].keys[:, :, :12], expected) < 2e-5


PEFT_WARNS = pytest.mark.filterwarnings(
    "ignore:Position ids are not supported", "ignore:.past_key_values. is deprecated:FutureWarning"
)
LEARNED = {
    "prompt": PromptTuningConfig,
    "p-tuning": PromptEncoderConfig,
    "prefix": PrefixTuningConfig,
}


def learned(kind, patch_first, method="dynamic_yarn", **settings):
    """A model with virtual tokens, and one with the plan of a request frozen."""
    extra = {"encoder_hidden_size": 16} if kind == "p-tuning" else {}
    config = LEARNED[kind](task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL, **extra)
    base = tiny_llama()
    base.generation_config.eos_token_id = None
    if patch_first:
        patch_model(base, method, factor=8, **settings)
    model = get_peft_model(base, config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for own in model.prompt_encoder.parameters():
            own.copy_(torch.randn(own.shape, generator=generator) * 0.3)
    if not patch_first and method is not None:
        patch_model(model, method, factor=8, **settings)
    return model


def greedy_without_cache(model, ids, new, length):
    for _ in range(new):
        with torch.no_grad(), planned(length):
            scores = model(input_ids=ids).logits
        ids = torch.cat((ids, scores[:, -1:].argmax(-1)), dim=1)
    return ids


@PEFT_WARNS
@pytest.mark.parametrize("patch_first", [True, False], ids=["patch-peft", "peft-patch"])
@pytest.mark.parametrize("kind", LEARNED)
@pytest.mark.parametrize("prompt", [10, 60])
def test_virtual_tokens_count_as_length(kind, patch_first, prompt):
    plans = []
    model = learned(kind, patch_first, on_plan=plans.append)
    twin = learned(kind, patch_first=False)
    ids, length = text(1, prompt), prompt + 20 + VIRTUAL

    found = model.generate(input_ids=ids, max_new_tokens=20, do_sample=False)

    assert [plan.lengths.tolist() for plan in plans] == [[length]]
    assert torch.equal(found, greedy_without_cache(twin, ids, 20, length))


@PEFT_WARNS
def test_an_adapter_with_virtual_tokens_generates_without_a_cache_too():
    model, ids = learned("prefix", patch_first=True), text(1, 60)
    cached = model.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
    found = model.generate(input_ids=ids, max_new_tokens=4, do_sample=False, use_cache=False)
    assert torch.equal(found, cached)


@PEFT_WARNS
@pytest.mark.parametrize("cached", ["dynamic", "none"])
@pytest.mark.parametrize("kind", LEARNED)
def test_rows_with_virtual_tokens_are_planned_by_the_positions_that_they_get(kind, cached):
    """PEFT ignores positions behind learned embeddings, so padding takes some there."""
    plans = []
    model, ids = learned(kind, patch_first=True, on_plan=plans.append), text(2, 60)
    mask = torch.ones_like(ids)
    mask[1, :50] = 0
    settings = {"use_cache": cached != "none", "do_sample": False, "pad_token_id": 0}
    model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=2, **settings)
    short = 10 if kind == "prefix" else 60
    assert plans[0].lengths.tolist() == [60 + VIRTUAL + 2, short + VIRTUAL + 2]


@PEFT_WARNS
def test_a_learned_prefix_takes_the_place_of_a_fixed_cache():
    model, ids = learned("prefix", patch_first=True), text(1, 60)
    settings = {"max_new_tokens": 4, "do_sample": False}
    expected = model.generate(input_ids=ids, **settings)
    cache = StaticCache(config=model.config, max_cache_len=128)
    assert torch.equal(model.generate(input_ids=ids, **{CACHE: cache}, **settings), expected)


@PEFT_WARNS
@pytest.mark.parametrize("kind", LEARNED)
def test_virtual_tokens_in_chunks_are_refused(kind):
    model = learned(kind, patch_first=True)
    with pytest.raises(RopeError, match="prefill_chunk_size=8 with the 40 virtual tokens"):
        model.generate(input_ids=text(1, 30), max_new_tokens=4, prefill_chunk_size=8)


@PEFT_WARNS
def test_learned_keys_are_not_rotated_when_a_plan_grows():
    model, twin = learned("prefix", patch_first=False), learned("prefix", patch_first=False)
    ids = text(1, 100)
    with torch.no_grad():
        cache = model(input_ids=ids[:, :30], use_cache=True)[CACHE]
        model.base_model(ids[:, 30:60], **{CACHE: cache}, use_cache=True)
        grown = request_plan(cache).lengths.item()
        with planned(int(grown)):
            whole = twin(input_ids=ids[:, :60], use_cache=True)[CACHE]
    assert grown > 60 + VIRTUAL
    keys = [held.layers[0].keys for held in (cache, whole)]
    assert relative(*keys) < 2e-5


def test_chunks_and_turns_with_images_are_planned_by_positions():
    model = zoo.build("qwen2_vl")
    inputs = zoo_images.image_inputs(model)
    patch_model(model, "dynamic_yarn", factor=4, original_max_position_embeddings=30)
    out = greedy(model, inputs.pop("input_ids"), 3, **inputs, return_dict_in_generate=True)
    planned_for = request_plan(out[CACHE]).lengths.item()
    positions = int(model.model.rope_deltas) + out.sequences.shape[1]
    assert planned_for == positions

    second = torch.cat((out.sequences, text(1, 5)), dim=1)
    out = greedy(model, second, 4, **{CACHE: out[CACHE]}, return_dict_in_generate=True)

    assert request_plan(out[CACHE]).lengths.item() == positions + 9


@pytest.mark.parametrize("family", ["qwen2_vl", "glm4v"])
def test_a_cache_that_is_filled_again_has_the_positions_of_its_images(family):
    model = zoo.build(family)
    inputs = zoo_images.image_inputs(model, words=40)
    patch_model(model, "dynamic_yarn", factor=4)
    out = model.generate(**inputs, max_new_tokens=1, **GREEDY)
    new = torch.cat((inputs["input_ids"], text(1, 30)), dim=1)
    kinds = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, 30))
    inputs |= {"input_ids": new, "mm_token_type_ids": kinds, "attention_mask": None}

    found = model.generate(**inputs, **{CACHE: out[CACHE]}, max_new_tokens=3, **GREEDY)

    expected = model.generate(**inputs, max_new_tokens=3, **GREEDY)
    assert request_plan(found).lengths.item() == request_plan(expected).lengths.item()
    assert torch.equal(torch.stack(found.logits), torch.stack(expected.logits))


@pytest.mark.parametrize("method", ["none", "dynamic_yarn"])
def test_deltas_set_by_hand_stay(method):
    model, stock = zoo.build("qwen2_vl"), zoo.build("qwen2_vl")
    patch_model(model, method, **({} if method == "none" else {"factor": 4}))
    ids = text(1, 12)
    found = []
    for one in (model, stock):
        with torch.no_grad():
            cache = one(input_ids=ids[:, :10], use_cache=True)[CACHE]
            one.model.rope_deltas = torch.tensor([[3]])
            found.append(one(input_ids=ids[:, 10:], **{CACHE: cache}).logits)
    assert torch.equal(*found)


def test_a_note_is_kept_from_a_tuple_too():
    model, stock = zoo.build("qwen2_vl"), zoo.build("qwen2_vl")
    patch_model(model, "none")
    inputs = zoo_images.image_inputs(model)
    found = []
    for one in (model, stock):
        with torch.no_grad():
            out = one(**inputs, use_cache=True, return_dict=False)
            cache = next(part for part in out if hasattr(part, "get_seq_length"))
            if one is model:
                one(input_ids=text(1, 10))
            found.append(one(input_ids=text(1, 2), **{CACHE: cache}).logits)
    assert torch.equal(*found)


def test_beams_over_rows_with_images_keep_their_notes():
    model = zoo.build("qwen2_vl")
    patch_model(model, "dynamic_yarn", factor=4)
    inputs = zoo_images.image_inputs(model, words=60, padded=True)
    settings = {"num_beams": 3, "max_new_tokens": 4, "suppress_tokens": zoo_images.SPECIAL}

    found = model.generate(**inputs, **settings, do_sample=False)

    row = {name: value[:1] for name, value in inputs.items() if len(value) == 2}
    alone = model.generate(**{**inputs, **row}, **settings, do_sample=False)
    assert torch.equal(found[:1], alone)
