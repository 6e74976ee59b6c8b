"""What is not a request of one kind: gradients, towers of their own, caches that are refused."""

import pytest
import torch
import zoo
from checked_requests import EXACT, drawn
from decoding import CACHE
from drawn_models import METHODS, TRAINED, Twin, forget, method_of, patched, stock, twin
from hypothesis import strategies as st
from transformers import DynamicCache

from hf_rope_ext import RopeError, patch_model, planned, request_plan
from hf_rope_ext.models.sites import read_sites

pytestmark = pytest.mark.filterwarnings("ignore")


def words(*shape, seed=0):
    return torch.randint(10, 60, shape, generator=torch.Generator().manual_seed(seed))


def relative(found, right):
    return float((found - right).abs().max() / right.abs().max())


# gradients


@st.composite
def steps(draw):
    return {
        "kind": draw(st.sampled_from(("llama", "gptj", "gemma3", "recurrent_gemma"))),
        "method": draw(st.sampled_from(METHODS)),
        "length": draw(st.integers(4, 40)),
        "more": draw(st.none() | st.integers(0, 30)),
        "checkpointing": draw(st.sampled_from((None, True, False))),
    }


def gradients(model, ids, more, checkpointing):
    model.zero_grad()
    model.train()
    try:
        if checkpointing is not None:
            model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        if more is None:
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        else:
            with planned(ids.shape[1] + more):
                loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
    finally:
        model.gradient_checkpointing_disable()
        model.eval()
    return torch.cat([own.grad.flatten() for own in model.parameters() if own.grad is not None])


@drawn(
    steps(),
    fast=8,
    slow=100,
    examples=[
        # the rotary embedding of a layer, called once more in the backward pass
        {
            "kind": "recurrent_gemma",
            "method": "dynamic_yarn",
            "length": 20,
            "more": 20,
            "checkpointing": is_reentrant,
        }
        for is_reentrant in (True, False)
    ],
)
def test_gradients_are_those_of_the_planned_length(step):
    kind, method, length = step["kind"], step["method"], step["length"]
    ids, more = words(2, length), step["more"]
    for model in (patched(kind, method).model, twin(kind).model):
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0

    found = gradients(patched(kind, method).model, ids, more, step["checkpointing"])
    right = gradients(twin(kind).set_length(method, length + (more or 0)), ids, None, None)

    assert relative(found, right) < 10 * EXACT


# two towers


@st.composite
def translations(draw):
    return {
        "method": draw(st.sampled_from(METHODS)),
        "rows": draw(st.lists(st.integers(1, 40), min_size=1, max_size=3)),
        "new": draw(st.integers(1, 30)),
        "cached": draw(st.booleans()),
    }


@drawn(
    translations(),
    fast=5,
    slow=60,
    examples=[{"method": "dynamic_yarn", "rows": [40, 6], "new": 20, "cached": True}],
)
def test_encoder_and_decoder_are_planned_each_for_its_own_text(request):
    """The encoder by what each row holds, the decoder by its last token."""
    method, rows, new = request["method"], request["rows"], request["new"]
    model, own = _t5gemma(method)
    width = max(rows)
    ids = words(len(rows), width)
    mask = torch.ones_like(ids)
    for number, length in enumerate(rows):
        ids[number, length:] = mask[number, length:] = 0

    out = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=new,
        min_new_tokens=new,
        do_sample=False,
        use_cache=request["cached"],
        return_dict_in_generate=True,
        output_logits=True,
    )

    for number, length in enumerate(rows):
        for site, tokens in zip(own.sites, own.lengths_of(length, new + 1), strict=True):
            own.write(site, method, tokens)
        with torch.no_grad():
            right = own.model(
                input_ids=ids[number : number + 1, :length],
                decoder_input_ids=out.sequences[number : number + 1, :-1],
            ).logits[0]
        found = torch.stack(out.logits, dim=1)[number]
        assert relative(found, right) < EXACT, f"row {number}"


class _Translator(Twin):
    def lengths_of(self, encoded, decoded):
        return [encoded if "encoder" in site.path else decoded for site in self.sites]


_TRANSLATORS = {}


def _t5gemma(method):
    if method not in _TRANSLATORS:
        model = zoo.build("t5gemma")
        model.generation_config.eos_token_id = None
        pairs = read_sites(model)[0].geometry.pairs
        patch_model(model, method_of(method, pairs), original_max_position_embeddings=TRAINED)
        _TRANSLATORS[method] = (model, _Translator("t5gemma"))
    return _TRANSLATORS[method]


# what is set by hand stays, what cannot be served is refused


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_deltas_set_by_hand_count_as_in_the_unpatched_model(kind, method):
    found = []
    for model in (patched(kind, method).model, stock(kind)):
        model.model.rope_deltas = None
        with torch.no_grad():
            cache = model(input_ids=words(1, 6), use_cache=True)[CACHE]
            model.model.rope_deltas = torch.tensor([[3]])
            found.append(model(input_ids=words(1, 4, seed=1), **{CACHE: cache}).logits)
        model.model.rope_deltas = None
    assert torch.equal(*found)


@pytest.mark.parametrize("method", METHODS)
def test_rows_of_a_continuous_batch_are_right_or_refused(method):
    own, ids = patched("llama", method), [[11, 12, 13], list(range(10, 50))]
    try:
        found = own.model.generate_batch(ids, max_new_tokens=4)
    except RopeError:
        found = None
    if found is not None:
        for row, result in zip(ids, found.values(), strict=True):
            alone = twin("llama").set_length(method, len(row) + 4)
            right = alone.generate(torch.tensor([row]), max_new_tokens=4, do_sample=False)
            assert right[0, len(row) :].tolist() == result.generated_tokens
    assert torch.equal(
        own.model(words(1, TRAINED)).logits, stock("llama")(words(1, TRAINED)).logits
    )


def test_nothing_on_a_cache_stops_those_who_walk_over_its_attributes():
    from torch.utils._pytree import tree_map

    model = patched("llama", "dynamic_yarn").model
    with torch.no_grad(), planned(40):
        cache = model(words(1, 20), use_cache=True)[CACHE]
    for holder in (cache, *cache.layers):
        for name, value in list(vars(holder).items()):
            assert not hasattr(value, "__dataclass_fields__") or not hasattr(value, "__dict__")
            setattr(holder, name, tree_map(lambda leaf: leaf, value))
    with torch.no_grad():
        found = model(words(1, 4, seed=1), **{CACHE: cache}).logits
        right = twin("llama").set_length("dynamic_yarn", 40)(
            torch.cat((words(1, 20), words(1, 4, seed=1)), dim=1)
        )
    assert relative(found, right.logits[:, 20:]) < EXACT
    assert request_plan(cache).lengths.tolist() == [40]


def test_a_cache_that_hides_its_keys_is_served_within_its_plan_or_refused():
    """A quantized cache needs another package, so one stands for it that shows no keys."""

    class Hidden(DynamicCache):
        pass

    model, ids = patched("llama of one layer", "dynamic_yarn").model, words(1, 50)
    cache = Hidden(config=model.config)
    for layer in cache.layers:
        layer._quantized_keys = None
    with torch.no_grad(), planned(30):
        model(ids[:, :20], **{CACHE: cache})
        held = cache.layers[0].keys.clone()
    with torch.no_grad():
        with pytest.raises(RopeError, match="quantized keys"):
            model(ids[:, 20:], **{CACHE: cache})
        assert torch.equal(held, cache.layers[0].keys)
        assert request_plan(cache).lengths.tolist() == [30]
        found = model(ids[:, 20:30], **{CACHE: cache}).logits
    right = twin("llama of one layer").set_length("dynamic_yarn", 30)(ids[:, :30]).logits
    assert relative(found, right[:, 20:]) < EXACT
    forget()
