"""Which length a row is planned for, whatever else the call holds."""

import asyncio
import copy
import pickle
import threading

import pytest
import torch
import zoo
import zoo_images
from conftest import TRAINED, logits, relative, tiny_llama
from decoding import CACHE, dynamic, frozen, greedy, step_by_step, text
from transformers import (
    DynamicCache,
    LlamaForSequenceClassification,
    ModernBertConfig,
    ModernBertModel,
    RoFormerConfig,
    RoFormerModel,
    StaticCache,
)

from hf_rope_ext import RopeError, patch_model, planned, request_plan

SHORT, LONG = 20, 150


def encoder(kind):
    torch.manual_seed(0)
    sizes = {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2, "initializer_range": 0.2}
    heads = {"num_attention_heads": 4, "intermediate_size": 64, "pad_token_id": 0}
    if kind == "roformer":
        return RoFormerModel(RoFormerConfig(**sizes, **heads, max_position_embeddings=256)).eval()
    tokens = {"cls_token_id": 1, "sep_token_id": 2, "bos_token_id": 1, "eos_token_id": 2}
    config = ModernBertConfig(
        **sizes,
        **heads,
        **tokens,
        max_position_embeddings=TRAINED,
        layer_types=["full_attention"] * 2,
    )
    return ModernBertModel(config).eval()


def classifier():
    config = tiny_llama().config
    config.pad_token_id = 0
    torch.manual_seed(0)
    return LlamaForSequenceClassification(config).eval()


MODELS = {
    "causal": tiny_llama,
    "classifier": classifier,
    "modernbert": lambda: encoder("modernbert"),
    "roformer": lambda: encoder("roformer"),
}


def padded_batch(side):
    ids, mask = text(2, LONG), torch.ones(2, LONG, dtype=torch.int64)
    tokens = slice(SHORT, None) if side == "right" else slice(0, LONG - SHORT)
    mask[1, tokens] = 0
    ids[1, tokens] = 0
    return ids, mask, mask[1].bool()


def outputs(model, ids, **arguments):
    with torch.no_grad():
        return model(ids, **arguments)[0]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", MODELS)
def test_padding_does_not_count_as_length(kind, side):
    if kind in ("roformer", "modernbert") and side == "left":
        pytest.skip("its positions count padding on the left, patched or not")
    known = {"original_max_position_embeddings": TRAINED}
    model, stock = dynamic(model=MODELS[kind](), **known), MODELS[kind]()
    ids, mask, own = padded_batch(side)
    given = {"attention_mask": mask}
    if side == "left":
        given["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)

    found = outputs(model, ids, **given)

    whole = kind == "classifier"
    expected = outputs(model, ids[:1])[0]
    assert relative(found[0], expected) < 2e-5
    within = found[1] if whole else found[1, own]
    unpatched = outputs(stock, ids, **given)
    assert torch.equal(within, unpatched[1] if whole else unpatched[1, own])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_count_in_a_cache_either(side):
    model = dynamic()
    ids, mask, own = padded_batch(side)
    positions = (mask.cumsum(1) - 1).clamp(min=0)

    with torch.no_grad():
        out = model(ids, attention_mask=mask, position_ids=positions, use_cache=True)

    assert request_plan(out).lengths.tolist() == [LONG, SHORT]
    alone = logits(tiny_llama(), ids[1:, own])
    assert relative(out.logits[1, own], alone[0]) < 2e-5


@pytest.mark.parametrize("chunk", [None, 16])
def test_a_row_of_a_padded_prompt_is_planned_by_its_own_tokens(chunk):
    model, ids = dynamic(), text(2, 100)
    mask = torch.ones_like(ids)
    mask[1, :70] = 0
    plans = []
    patch_model(model, "dynamic_yarn", factor=8, replace=True, on_plan=plans.append)

    found = greedy(model, ids, 20, attention_mask=mask, prefill_chunk_size=chunk, pad_token_id=0)

    (plan,) = plans
    assert plan.lengths.tolist() == [120, 50]
    for row, first in enumerate((0, 70)):
        with planned(plan.lengths[row].int().item()):
            follow = logits(model, found[row : row + 1, first:])
        assert torch.equal(follow[0, 99 - first : -1].argmax(-1), found[row, 100:])


@pytest.mark.parametrize(
    "drafts", [{"prompt_lookup_num_tokens": 10}, {"prompt_lookup_num_tokens": 3}], ids=["10", "3"]
)
@pytest.mark.parametrize("growth", ["error", "rerotate"])
def test_drafted_tokens_need_no_longer_plan(drafts, growth):
    model, ids = dynamic(on_growth=growth), text(1, 20).repeat(1, 4)
    plain = greedy(model, ids, 40)
    assert torch.equal(greedy(model, ids, 40, **drafts), plain)


def test_positions_that_leap_are_planned_for():
    model, ids = dynamic(), text(1, 22)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :20], **{CACHE: cache}, use_cache=True)
        leap = torch.tensor([[100, 101]])
        model(ids[:, 20:], **{CACHE: cache}, position_ids=leap, use_cache=True)
    assert request_plan(cache).lengths.item() >= 102


def test_a_fixed_cache_is_planned_anew_after_a_reset():
    model, ids = dynamic(), text(1, 100)
    cache = StaticCache(config=model.config, max_cache_len=128)
    greedy(model, ids[:, :10], 5, **{CACHE: cache})
    cache.reset()

    with torch.no_grad():
        found = model(ids, **{CACHE: cache}).logits

    assert relative(found, logits(frozen("dynamic_yarn", 128), ids)) < 2e-5


@pytest.mark.parametrize("change", ["reorder", "select", "repeat"])
def test_a_plan_follows_the_rows_of_its_cache(change):
    model, ids = dynamic(), text(2, 150)
    positions = torch.arange(150).expand(2, -1).clone()
    positions[1] += 60
    with torch.no_grad(), planned(150):
        cache = model(ids[:, :149], position_ids=positions[:, :149], use_cache=True)[CACHE]
        expected = logits(model, ids, position_ids=positions)[:, -1]
    rows = {"reorder": [1, 0], "select": [1], "repeat": [0, 0, 1, 1]}[change]
    if change == "reorder":
        cache.reorder_cache(torch.tensor(rows))
    elif change == "select":
        cache.batch_select_indices(torch.tensor(rows))
    else:
        cache.batch_repeat_interleave(2)

    with torch.no_grad():
        step = {CACHE: cache, "position_ids": positions[rows, 149:]}
        found = model(ids[rows, 149:], **step).logits[:, -1]

    assert relative(found, expected[rows]) < 2e-5


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_the_plan_of_a_copied_cache_follows_the_copy_alone(duplicate):
    model, ids = dynamic(), text(2, 100)
    positions = torch.arange(100).expand(2, -1).clone()
    positions[1] += 60
    with torch.no_grad():
        cache = model(ids, position_ids=positions, use_cache=True)[CACHE]
    copied = duplicate(cache)

    copied.batch_select_indices(torch.tensor([1]))
    copied.reset()

    assert request_plan(copied) is None
    assert request_plan(cache).lengths.tolist() == [100, 160]


def test_a_block_holds_for_its_own_task_alone():
    model, ids = dynamic(), text(1, 10)
    lengths = {}

    async def plan(name, length, wait):
        with planned(length) if length else torch.no_grad():
            await asyncio.sleep(wait)
            lengths[name] = request_plan(model(ids, use_cache=True)).lengths.item()
            await asyncio.sleep(2 * wait)
        lengths[f"{name} afterwards"] = request_plan(model(ids, use_cache=True)).lengths.item()

    async def serve():
        tasks = (plan("a", 120, 0.01), plan("b", 0, 0.02), plan("c", 90, 0.015))
        await asyncio.gather(*tasks)

    asyncio.run(serve())
    assert lengths == {
        "a": 120, "b": 10, "c": 90, "a afterwards": 10, "b afterwards": 10, "c afterwards": 10
    }  # fmt: skip


def test_blocks_that_overlap_leave_nothing_behind():
    model, ids = dynamic(), text(1, 10)
    first, second = planned(120), planned(90)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert request_plan(model(ids, use_cache=True)).lengths.item() == 90
    second.__exit__(None, None, None)
    assert request_plan(model(ids, use_cache=True)).lengths.item() == 10


def test_another_model_called_in_generate_is_planned_for_its_own_call():
    model, judge, ids = dynamic(), dynamic(), text(1, 30)
    seen = []

    def score(tokens, scores):
        seen.append(request_plan(judge(tokens[:, :5], use_cache=True)).lengths.item())
        return scores

    greedy(model, ids, 60, logits_processor=[score])
    assert set(seen) == {5.0}


def test_a_thread_does_not_see_the_block_of_another():
    model, ids = dynamic(), text(1, 10)
    lengths = []

    def run():
        lengths.append(request_plan(model(ids, use_cache=True)).lengths.item())

    with planned(120):
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        run()
    assert lengths == [10, 120]


@pytest.mark.parametrize("name", ["generate_batch", "init_continuous_batching"])
def test_continuous_batching_is_refused_at_the_call(name):
    with pytest.raises(RopeError, match=f"{name} keeps the rows of all requests"):
        getattr(dynamic(), name)([[1, 2, 3]])


@pytest.mark.parametrize("nothing", [None, 3, "cache", (torch.ones(1),)])
def test_a_plan_is_asked_of_a_cache_alone(nothing):
    with pytest.raises(RopeError, match="request_plan takes a cache, or a model's output"):
        request_plan(nothing)


def test_a_cache_of_the_unpatched_model_is_continued_within_the_trained_length():
    model, ids = tiny_llama(), text(1, 60)
    _, cache = step_by_step(model, ids[:, :30], 30)
    expected = logits(model, ids)
    dynamic(model=model)

    with torch.no_grad():
        found = model(ids[:, 30:], **{CACHE: cache}).logits
        assert relative(found, expected[:, 30:]) < 2e-5
        with pytest.raises(RopeError, match="30 tokens that were not computed under"):
            model(text(1, 30), **{CACHE: cache})


@pytest.mark.parametrize("passed", ["whole", "new", "new with positions"])
def test_a_second_turn_is_planned_for_its_final_length(passed):
    model, ids = dynamic(), text(1, 90)
    first = greedy(model, ids[:, :70], 5, return_dict_in_generate=True)
    held = first[CACHE].get_seq_length()
    ids = torch.cat((first.sequences, ids[:, 75:]), dim=1)
    given = {CACHE: first[CACHE], "return_dict_in_generate": True}
    if passed != "whole":
        given["attention_mask"] = torch.ones_like(ids)
    if passed == "new with positions":
        given["position_ids"] = torch.arange(held, 90)[None]

    out = greedy(model, ids if passed == "whole" else ids[:, held:], 10, **given)

    assert request_plan(out).lengths.tolist() == [100]


@pytest.mark.parametrize("given", [True, False])
def test_a_first_chunk_of_nothing_but_padding_is_refused(given):
    model, ids = dynamic(), text(2, 40)
    mask = torch.ones_like(ids)
    mask[1, :20] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache = DynamicCache(config=model.config)
    first = {"attention_mask": mask[:, :16], "position_ids": positions[:, :16]}
    first |= {CACHE: cache} if given else {"use_cache": True}
    with planned(100), pytest.raises(RopeError, match="row 1 has nothing but padding in the first"):
        model(ids[:, :16], **first)
    assert cache.get_seq_length() == 0
    assert request_plan(cache) is None


@pytest.mark.parametrize("new", [1, 40])
@pytest.mark.parametrize("chunk", [None, 16])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_turn_that_outgrows_a_fixed_cache_is_refused_before_it_starts(family, chunk, new):
    model, ids = dynamic(model=zoo.build(family)), text(1, 110)
    cache = StaticCache(config=model.config, max_cache_len=200)
    with planned(70), torch.no_grad():
        model(ids[:, :70], **{CACHE: cache}, use_cache=True)
    keys = [layer.keys.clone() for layer in cache.layers]
    turn = {"attention_mask": torch.ones(1, 70 + new), "prefill_chunk_size": chunk, CACHE: cache}

    with pytest.raises(RopeError, match="beyond those that the cache of fixed size was planned"):
        greedy(model, ids[:, 70 : 70 + new], 20, **turn)

    kept = zip(keys, cache.layers, strict=True)
    assert all(torch.equal(before, layer.keys) for before, layer in kept)


def test_a_cache_with_positions_of_its_own_is_not_filled_again_from_ids():
    model, ids = dynamic(on_growth="freeze"), text(1, 90)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :20], **{CACHE: cache}, use_cache=True)
        leap = torch.arange(40, 60)[None]
        model(ids[:, 20:40], **{CACHE: cache}, position_ids=leap, use_cache=True)
    keys = cache.layers[0].keys.clone()

    greedy(model, ids, 10, **{CACHE: cache})

    assert torch.equal(cache.layers[0].keys[:, :, :40], keys)
    assert request_plan(cache).lengths.item() == 20


@pytest.mark.filterwarnings("ignore:Qwen2.5-VL's model card advises against YaRN")
def test_a_loop_behind_a_long_video_is_planned_for_the_positions_that_it_reaches():
    """The model counts on from its last frame, which is further than the text behind it."""
    model = dynamic(model=zoo.build("qwen2_5_vl"))
    inputs = zoo_images.image_inputs(model, words=2)
    ids, more, reached = inputs["input_ids"], 40, []
    text_model = model.model.language_model
    text_model.register_forward_pre_hook(
        lambda module, args, given: reached.append(int(given["position_ids"].max())),
        with_kwargs=True,
    )
    with torch.no_grad(), planned(ids.shape[1] + more):
        cache = model(**inputs, use_cache=True)[CACHE]
        for token in range(10, 10 + more):
            model(torch.tensor([[token]]), **{CACHE: cache})
    assert reached[0] + more == reached[-1] > TRAINED
    assert request_plan(cache).lengths.tolist() == [reached[-1] + 1]
