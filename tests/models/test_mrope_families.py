"""Every family whose positions have axes: images, caches, legacy configs, and what is left alone.

Stock transformers is the oracle where it runs; else the textbook numbers written into a stock model
by hand (in stock.py), loops over pairs in float64, and decoding without a cache.
"""

import copy
import json
import math
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import zoo
import zoo_images
from conftest import relative
from decoding import CACHE
from method_knobs import FREQUENCY_METHODS, PER_REQUEST, knobs
from stock import NATIVE, arguments, build_by_hand, build_stock, frequencies, pairs
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig, StaticCache
from transformers.models.llama.modeling_llama import LlamaModel

from hf_rope_ext import (
    RopeError,
    export,
    load_pretrained,
    patch_model,
    planned,
    request_plan,
    unpatch_model,
)
from hf_rope_ext.methods import make_method
from hf_rope_ext.models.find import find_rotaries
from hf_rope_ext.models.host import LAST_TESTED
from hf_rope_ext.models.sites import read_sites
from hf_rope_ext.rotary.extended import ExtendedRotary
from hf_rope_ext.saving.loading import read_config

TRAINED = zoo.TRAINED


# before these releases of transformers: stock scales the pairs of Cohere Compass in another order
# than it stores them, NeoMME's rotary embedding takes no positions of text, and that of Cosmos 3
# Edge has a matrix of axes and pairs
SINCE = {"cohere_compass": "5.21", "neomme": "5.19", "cosmos3_edge": "5.17"}


def is_comparable(model_type: str) -> bool:
    """Whether the installed release has a type, and can be what it is compared with."""
    known = model_type in zoo.MODEL_TYPES
    return known and transformers.__version__ >= SINCE.get(model_type, "5")


FAMILIES = sorted(filter(is_comparable, zoo_images.FAMILIES))
GENERATING = [name for name in FAMILIES if name != "neomme"]  # an encoder
# their stock code takes no scaling
BY_HAND = {"cosmos3_edge", "ernie4_5_vl_moe"}

pytestmark = [
    pytest.mark.filterwarnings("ignore::hf_rope_ext.errors.RopeWarning"),
    # stock: an image's grid of tensors is floored
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def frequency_sets(model: nn.Module) -> Iterator[tuple[str | None, int, float, list[int]]]:
    """Layer type (or None), number of pairs, base and sections of each set of frequencies."""
    (rotary,) = find_rotaries(model)
    for label in rotary.labels:
        rope = rotary.parameters(label)
        count = rotary.live(label).shape[-1]
        yield label, count, float(rope["rope_theta"]), rope.get("mrope_section", [0, 0])


def cos_and_sin(model: nn.Module, positions: Tensor, label: str | None) -> tuple[Tensor, Tensor]:
    """What a patched model's rotary embedding returns."""
    (rotary,) = [part for part in model.modules() if isinstance(part, ExtendedRotary)]
    given = () if label is None else (label,)
    return rotary(torch.zeros(1, 1, 1), positions, *given)


# --- the layout of each family, pair by pair -----------------------------------------------------


def layout(model_type: str, section: list[int], width: int) -> list[tuple[int, int]]:
    """Pair and axis of every coordinate of cos and sin, as the families' papers and code say."""
    count = width // 2
    halves = [(coordinate % count) for coordinate in range(width)]
    neighbours = [coordinate // 2 for coordinate in range(width)]
    bounds = [sum(section[: axis + 1]) for axis in range(len(section))]
    if model_type == "hunyuan_vl":  # the sections are of coordinates, twice as wide
        return [
            (pair, next(axis for axis, end in enumerate(bounds) if coordinate < 2 * end))
            for coordinate, pair in enumerate(halves)
        ]
    if model_type == "neomme":  # rows and columns take turns
        return [(pair, pair % 2) for pair in halves]
    if model_type == "ernie4_5_vl_moe":  # height and width take turns, then time
        height, width_, _ = section
        return [(pair, 1 + pair % 2 if pair < height + width_ else 0) for pair in neighbours]
    chunked = {"qwen2_vl", "qwen2_5_vl", "qwen2_5_omni_thinker", "paddleocr_vl", "glm4v_moe"}
    glm = {"glm4v", "glm46v", "glm_ocr", "glmga"}
    if model_type in chunked | glm | {"glm_image"}:
        axis_of = [
            next(axis for axis, end in enumerate(bounds) if pair < end) for pair in range(count)
        ]
        return [(pair, axis_of[pair]) for pair in (neighbours if model_type in glm else halves)]
    interleaved = [0] * count  # time, height and width take turns, as long as the latter last
    for axis in (1, 2):
        for pair in range(axis, min(3 * section[axis], count), 3):
            interleaved[pair] = axis
    return [(pair, interleaved[pair]) for pair in halves]


POSITIONS = torch.tensor([[3, 70, 99, 41], [5, 90, 12, 41], [7, 50, 64, 41], [11, 20, 33, 41]])


def trained_frequencies(base: float, count: int) -> Any:
    return base ** (-np.arange(0, 2 * count, 2) / (2 * count))


def require_whole(model: nn.Module, label: str | None, base: float, pair_of: list[int]) -> None:
    """Skip where stock leaves a part of cos and sin to the attention, as in 5.16."""
    (rotary,) = find_rotaries(model)
    places = torch.ones(len(rotary.parameters(label).get("mrope_section", [0, 0])), 1, 1)
    given = () if label is None else (label,)
    cos, _ = rotary.original(torch.zeros(1, 1, 1), places, *given)
    whole = np.cos(trained_frequencies(base, len(pair_of) // 2))[pair_of]
    if cos.shape == (1, 1, len(pair_of)) and np.allclose(cos[0, 0], whole, rtol=0, atol=1e-5):
        return
    assert transformers.__version__ < "5.17"
    pytest.skip("the attention completes what the rotary embedding returns")


def test_no_family_is_left_out_on_the_release_tested():
    assert sorted(zoo_images.FAMILIES) == FAMILIES or transformers.__version__ != LAST_TESTED


@pytest.mark.parametrize("model_type", FAMILIES)
def test_each_coordinate_turns_by_its_own_pair_and_axis(model_type):
    model = zoo.build(model_type)
    for label, count, base, section in frequency_sets(model):
        trained = trained_frequencies(base, count)
        turns_by = layout(model_type, section, 2 * count)
        require_whole(model, label, base, [pair for pair, _ in turns_by])
        positions = POSITIONS[: len(section), None, :]
        for name in NATIVE:
            labels = {} if label is None else {"layer_types": [label]}
            patch_model(model, name, **knobs(name, count), **labels)
            cos, sin = cos_and_sin(model, positions, label)
            unpatch_model(model)

            inv_freq, scaling = frequencies(name, base, trained)
            for found, function in ((cos[0], math.cos), (sin[0], math.sin)):
                for token in range(positions.shape[-1]):
                    for coordinate, (pair, axis) in enumerate(turns_by):
                        angle = int(positions[axis, 0, token]) * float(inv_freq[pair])
                        distance = float(found[token, coordinate]) - scaling * function(angle)
                        assert abs(distance) < 2e-5, (name, token, coordinate)


def plain_rope(count: int, base: float) -> nn.Module:
    """A Llama of the same pairs, base and trained length."""
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=2 * count,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        head_dim=2 * count,
        max_position_embeddings=TRAINED,
        rope_parameters={"rope_type": "default", "rope_theta": base},
    )
    return LlamaModel(config)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_text_alone_is_one_dimensional_rope_bit_for_bit(model_type):
    model = zoo.build(model_type)
    # one row beyond the trained length and one within it
    ids = torch.stack((torch.arange(100), torch.arange(100) // 2))
    for label, count, base, section in frequency_sets(model):
        plain = plain_rope(count, base)
        pair_of = [pair for pair, _ in layout(model_type, section, 2 * count)]
        require_whole(model, label, base, pair_of)
        for name in FREQUENCY_METHODS:
            own = {**knobs(name, count), "probe": False}
            labels = {} if label is None else {"layer_types": [label]}
            patch_model(model, name, **own, **labels)
            patch_model(plain, name, **own)
            flat = cos_and_sin(model, ids, label)
            expanded = cos_and_sin(model, ids.expand(len(section), -1, -1), label)
            expected = cos_and_sin(plain, ids, None)
            unpatch_model(model)
            unpatch_model(plain)

            for one, other, reference in zip(flat, expanded, expected, strict=True):
                assert torch.equal(one, other), name
                assert torch.equal(one, reference[..., pair_of]), name


# --- images, against stock -----------------------------------------------------------------------

NEW = torch.randint(10, 128, (1, 4), generator=torch.Generator().manual_seed(5))


def kept(scores: Tensor, inputs: dict[str, Any]) -> Tensor:
    """Scores of what is not padding."""
    return scores * inputs["attention_mask"].bool()[..., None]


def by_hand(model: nn.Module, inputs: dict[str, Any], new: Tensor = NEW) -> Tensor:
    """Scores of a loop written by hand, token by token behind a prompt."""
    with torch.no_grad():
        out = model(**inputs, use_cache=True)
        found = [out.logits[:, -1:]]
        for token in new.split(1, dim=1):
            out = model(input_ids=token, **{CACHE: out[CACHE]}, use_cache=True)
            found.append(out.logits)
    return torch.cat(found, dim=1)


def write(model: nn.Module, inputs: dict[str, Any], new: int, **settings: Any) -> Any:
    """What `generate` writes greedily, and with what scores."""
    return model.generate(
        **inputs,
        max_new_tokens=new,
        min_new_tokens=new,
        do_sample=False,
        suppress_tokens=zoo_images.SPECIAL,
        return_dict_in_generate=True,
        output_logits=True,
        **settings,
    )


def expected_model(model_type: str, method: str, count: int) -> nn.Module:
    if model_type in BY_HAND:
        return build_by_hand(model_type, method)
    stock = build_stock(model_type, method, count)
    assert stock is not None
    return stock


def others(model: nn.Module) -> dict[str, Tensor]:
    """Every tensor but the frequencies of the text."""
    text = {f"{rotary.path}." for rotary in find_rotaries(model)}
    return {
        name: tensor.clone()
        for name, tensor in [*model.named_buffers(), *model.named_parameters()]
        if not any(name.startswith(path) for path in text)
    }


@pytest.mark.parametrize("method", ["yarn", "linear", "llama3"])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_patched_equals_stock_on_images(model_type, method, tmp_path):
    model = zoo.build(model_type)
    expected = expected_model(model_type, method, min(pairs(model)))
    batch = zoo_images.image_inputs(model, padded=True)
    single = zoo_images.image_inputs(model)
    trained, tensors = zoo.run(model, **batch), others(model)
    patch_model(model, method, **arguments(model, model_type))

    found = zoo.run(model, **batch)
    assert relative(kept(found, batch), kept(trained, batch)) > 0.05
    assert relative(kept(found, batch), kept(zoo.run(expected, **batch), batch)) < 1e-5
    if model_type in GENERATING:
        assert relative(by_hand(model, single), by_hand(expected, single)) < 1e-5
    if model_type in GENERATING and method == "yarn":
        sequences = [write(one, batch, 4).sequences for one in (model, expected)]
        assert torch.equal(*sequences)
    untouched = dict([*model.named_buffers(), *model.named_parameters()])
    assert all(torch.equal(untouched[name], tensor) for name, tensor in tensors.items())

    before = zoo.text_config(zoo.build(model_type).config)
    model.save_pretrained(tmp_path)
    reloaded = (load_pretrained if model_type in BY_HAND else type(model).from_pretrained)(tmp_path)
    assert relative(zoo.run(reloaded.eval(), **batch), found) < 1e-5
    written = dict(export(model).config) if model_type not in BY_HAND else None
    for config in (model.config, reloaded.config):
        assert sections(zoo.text_config(config).rope_parameters) == sections(before.rope_parameters)
    if written is not None:
        for name in ("thinker_config", "text_config"):
            written = written.get(name, written)
        assert sections(written["rope_parameters"]) == sections(before.rope_parameters)


def sections(rope: dict[str, Any]) -> list[Any]:
    """What says how axes are laid out, by layer type where parameters are nested."""
    nested = [value for value in rope.values() if isinstance(value, dict)] or [rope]
    return [{key: own.get(key) for key in ("mrope_section", "mrope_interleaved")} for own in nested]


NEW_TOKENS = 6  # enough to cross the trained length

# --- caches --------------------------------------------------------------------------------------


def positions_of(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """The positions that the rotary embedding of the text gets, ``(axes, batch, seq)``."""
    seen = []
    (rotary,) = find_rotaries(model)

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(kwargs["position_ids"] if "position_ids" in kwargs else args[1])

    handle = rotary.original.register_forward_pre_hook(hook, with_kwargs=True)
    zoo.run(model, **inputs)
    handle.remove()
    return seen[0]


def prompt_near_the_trained_length(model: nn.Module, **settings: Any) -> dict[str, Any]:
    """A prompt that ends a few positions before the trained length, where it is not longer."""
    some = 20
    last = int(positions_of(model, zoo_images.image_inputs(model, words=some))[..., -1].max())
    return zoo_images.image_inputs(model, words=max(some + TRAINED - 4 - last, 1), **settings)


@pytest.mark.parametrize("model_type", sorted(set(GENERATING) - {"glm_image"}))
def test_cached_generation_with_images_is_that_without_a_cache(model_type):
    model = zoo.build(model_type)
    inputs = prompt_near_the_trained_length(model, padded=True)
    # the longest position of each row and one more
    ends = positions_of(model, inputs).amax(dim=(0, 2)) + 1 + NEW_TOKENS
    assert ends[0] > TRAINED > ends[1]
    (count,) = pairs(model)
    for name in ("yarn", *PER_REQUEST):
        patch_model(model, name, **knobs(name, count))

        found = write(model, inputs, NEW_TOKENS)
        expected = write(model, inputs, NEW_TOKENS, use_cache=False)

        if name != "yarn":  # each row by its own positions
            assert request_plan(found).lengths.tolist() == ends.tolist()
        assert torch.equal(found.sequences, expected.sequences), name
        assert relative(torch.stack(found.logits), torch.stack(expected.logits)) < 1e-4, name
        unpatch_model(model)


@pytest.mark.parametrize("method", PER_REQUEST)
def test_an_image_is_drawn_as_a_forward_over_all_of_it_would(method):
    """glm_image takes the positions of what it draws from its notes, only with a cache."""
    model, twin = zoo.build("glm_image"), zoo.build("glm_image")
    inputs = prompt_near_the_trained_length(model)
    prompt = positions_of(model, inputs)
    patch_model(model, method, **knobs(method))
    found = write(model, inputs, 6)
    length = int(prompt.max()) + 1 + 6
    made = make_method(method, **knobs(method))
    patch_model(twin, made.freeze(read_sites(zoo.build("glm_image"))[0].geometry, length))
    rows, columns = zoo_images.IMAGE_GRID
    drawn = [(0, row, column) for row in range(rows) for column in range(columns)][:5]
    positions = torch.cat((prompt, int(prompt.max()) + 1 + torch.tensor(drawn).T[:, None]), dim=-1)

    del inputs["attention_mask"]
    inputs["input_ids"] = found.sequences[:, :-1]
    expected = zoo.run(twin, **inputs, position_ids=positions)[0, -6:]

    assert request_plan(found).lengths.tolist() == [length]
    for step, scores in enumerate(found.logits):
        assert relative(scores[0], expected[step]) < 1e-4


def first_keys(cache: Any) -> Tensor:
    """Keys of the first attention layer, which turning has to get exactly right."""
    held = [getattr(layer, "keys", None) for layer in cache.layers]
    return next(keys for keys in held if isinstance(keys, Tensor) and keys.ndim == 4)


@pytest.mark.parametrize("model_type", sorted(set(GENERATING) - {"glm_image", "hunyuan_vl"}))
def test_keys_of_images_are_turned_axis_by_axis(model_type):
    model = zoo.build(model_type)
    inputs = prompt_near_the_trained_length(model)
    tokens = inputs["input_ids"].shape[1]
    patch_model(model, "dynamic_yarn", factor=4)

    with torch.no_grad():
        cache = model(**inputs, use_cache=True)[CACHE]
        before = request_plan(cache).lengths.item()
        for token in NEW.repeat(1, 3).split(1, dim=1):
            model(input_ids=token, **{CACHE: cache}, use_cache=True)
        length = int(request_plan(cache).lengths)
        assert length > max(before, TRAINED)
        unpatch_model(model)
        geometry = read_sites(model)[0].geometry
        patch_model(model, make_method("dynamic_yarn", factor=4).freeze(geometry, length))
        expected = first_keys(model(**inputs, use_cache=True)[CACHE])

    assert relative(first_keys(cache)[:, :, :tokens], expected) < 1e-5


def test_keys_whose_pairs_turn_by_two_axes_are_not_turned():
    model = zoo.build("hunyuan_vl")
    inputs = prompt_near_the_trained_length(model)
    patch_model(model, "dynamic_yarn", factor=4)
    text = {"input_ids": inputs["input_ids"]}
    longer = NEW.repeat(1, 3)

    by_hand(model, text, longer)  # text alone has one position on all axes
    with pytest.raises(RopeError, match=r"two coordinates of a pair.*planned\(max_length\)"):
        by_hand(model, inputs, longer)
    with planned(inputs["input_ids"].shape[1] + longer.shape[1]):
        by_hand(model, inputs, longer)


def far_ahead(length: int = 10) -> Tensor:
    """Positions of a video that takes far more of them than tokens, behind 20 of text."""
    positions = 20 + torch.arange(length).expand(3, 1, -1).clone()
    positions[0] = 20 + 15 * torch.arange(length)
    return positions


def test_a_later_call_may_have_more_positions_than_tokens():
    model = zoo.build("qwen2_5_vl").model.language_model
    ids = torch.randint(10, 128, (1, 30), generator=torch.Generator().manual_seed(2))
    patch_model(model, "dynamic_yarn", factor=4)

    with torch.no_grad():
        cache = model(input_ids=ids[:, :20], use_cache=True)[CACHE]
        model(input_ids=ids[:, 20:], position_ids=far_ahead(), **{CACHE: cache})
        length = int(request_plan(cache).lengths)
        unpatch_model(model)
        geometry = read_sites(model)[0].geometry
        patch_model(model, make_method("dynamic_yarn", factor=4).freeze(geometry, length))
        text = torch.arange(20).expand(3, 1, -1)
        positions = torch.cat((text, far_ahead()), dim=-1)
        expected = model(input_ids=ids, position_ids=positions, use_cache=True)[CACHE]

    assert length >= 20 + 15 * 9 + 1
    assert relative(first_keys(cache), first_keys(expected)) < 1e-5


@pytest.mark.parametrize(
    ("settings", "room", "message"),
    [
        ({"on_growth": "error"}, None, r"this call needs room for 30, at positions up to 155"),
        ({}, 100, r"go beyond those that the cache of fixed size was planned for"),
    ],
)
def test_more_positions_than_planned_are_refused_where_keys_stay(settings, room, message):
    model = zoo.build("qwen2_5_vl").model.language_model
    ids = torch.randint(10, 128, (1, 30), generator=torch.Generator().manual_seed(2))
    patch_model(model, "dynamic_yarn", factor=4, **settings)
    cache = StaticCache(config=model.config, max_cache_len=room) if room else DynamicCache()

    with torch.no_grad():
        model(input_ids=ids[:, :20], **{CACHE: cache}, use_cache=True)
        with pytest.raises(RopeError, match=message):
            model(input_ids=ids[:, 20:], position_ids=far_ahead(), **{CACHE: cache})


def test_a_cache_of_fixed_size_is_planned_for_positions_beyond_its_size():
    model = zoo.build("qwen2_5_omni_thinker")
    inputs = zoo_images.image_inputs(model, words=2)
    positions = int(positions_of(model, inputs).max()) + 1
    tokens = inputs["input_ids"].shape[1]
    patch_model(model, "dynamic_yarn", factor=4)
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=tokens + 6)

    with torch.no_grad():
        model(**inputs, **{CACHE: cache})

    assert positions > tokens + 6
    assert request_plan(cache).lengths.tolist() == [positions + 6]


# --- what one request leaves behind --------------------------------------------------------------

TEXT = torch.randint(10, 128, (1, 30), generator=torch.Generator().manual_seed(3))


def unrelated(model: nn.Module) -> Tensor:
    """Scores of a text decoded by hand."""
    return by_hand(model, {"input_ids": TEXT[:, :20]}, TEXT[:, 20:])


def test_stock_models_carry_the_positions_of_one_request_into_the_next():
    model = zoo.build("qwen2_vl")
    before = unrelated(model)

    zoo.run(model, **zoo_images.image_inputs(model))

    assert relative(unrelated(model), before) > 0.1


@pytest.mark.parametrize("model_type", GENERATING)
def test_a_patched_model_does_not(model_type):
    model = zoo.build(model_type)
    patch_model(model, "dynamic_yarn" if model_type != "hunyuan_vl" else "yarn", factor=4)
    inputs = zoo_images.image_inputs(model)
    text = {"input_ids": TEXT}
    scores, written = unrelated(model), write(model, text, 6).sequences
    images = by_hand_between(model, inputs, lambda: None)

    zoo.run(model, **inputs)
    assert torch.equal(unrelated(model), scores)
    # two conversations in turn
    assert torch.equal(by_hand_between(model, inputs, lambda: write(model, text, 1)), images)
    # generate that goes on from a cache
    with planned(TEXT.shape[1] + 6):
        first = write(model, text, 3)
    write(model, inputs, 1)
    rest = {"input_ids": first.sequences, CACHE: first[CACHE]}
    assert torch.equal(write(model, rest, 3).sequences, written)


def by_hand_between(model: nn.Module, inputs: dict[str, Any], other: Callable[[], Any]) -> Tensor:
    """Scores of a token behind a prompt, with another request in between."""
    length = inputs["input_ids"].shape[1]
    with torch.no_grad():
        with planned(length + 1):
            cache = model(**inputs, use_cache=True)[CACHE]
        other()
        return model(input_ids=NEW[:, :1], **{CACHE: cache}, use_cache=True).logits


@pytest.mark.parametrize("model_type", ["qwen2_vl", "qwen3_vl", "glm4v", "qwen2_5_omni_thinker"])
def test_generate_goes_on_from_a_cache_with_images(model_type):
    model = zoo.build(model_type)
    inputs = zoo_images.image_inputs(model)
    length = inputs["input_ids"].shape[1]
    patch_model(model, "dynamic_yarn", factor=4)
    expected = write(model, inputs, 6).sequences
    with planned(length + 6):
        first = write(model, inputs, 3)
    write(model, {"input_ids": TEXT}, 1)

    rest = {"input_ids": first.sequences, CACHE: first[CACHE]}
    assert torch.equal(write(model, rest, 3).sequences, expected)


def test_a_cache_with_images_is_not_filled_again_without_them():
    model = zoo.build("qwen2_vl")
    inputs = zoo_images.image_inputs(model)
    tokens = inputs["input_ids"].shape[1]
    patch_model(model, "dynamic_yarn", factor=4)
    first = write(model, inputs, 3)
    keys = first_keys(first[CACHE])[:, :, :tokens].clone()

    rest = {"input_ids": first.sequences, CACHE: first[CACHE]}
    write(model, rest, 6)

    length = int(request_plan(first[CACHE]).lengths)
    after = first_keys(first[CACHE])[:, :, :tokens]
    unpatch_model(model)
    geometry = read_sites(model)[0].geometry
    patch_model(model, make_method("dynamic_yarn", factor=4).freeze(geometry, length))
    with torch.no_grad():
        fresh = first_keys(model(**inputs, use_cache=True)[CACHE])
    assert not torch.equal(after, keys)
    assert relative(after, fresh) < 1e-5


def test_positions_given_by_hand_leave_no_note():
    model = zoo.build("qwen2_vl")
    patch_model(model, "yarn", factor=4)
    zoo.run(model, **zoo_images.image_inputs(model))
    prompt = {"input_ids": TEXT[:, :20]}

    given = by_hand(model, {**prompt, "position_ids": torch.arange(20).expand(3, 1, -1)})

    assert torch.equal(given, by_hand(model, prompt))


def test_notes_survive_copying_and_end_with_the_patch():
    model = zoo.build("qwen2_vl")
    inputs = zoo_images.image_inputs(model)
    patch_model(model, "yarn", factor=4)
    copied = pickle.loads(pickle.dumps(copy.deepcopy(model)))

    for one in (model, copied):
        before = unrelated(one)
        write(one, inputs, 2)
        assert torch.equal(unrelated(one), before)
    unpatch_model(model)

    assert not [hook for part in model.modules() for hook in part._forward_pre_hooks]
    assert not [name for name in vars(model) if "prepare" in name]


# --- omni models, and older checkpoints ----------------------------------------------------------


@pytest.mark.parametrize("model_type", ["qwen2_5_omni", "qwen3_omni_moe"])
def test_only_the_thinker_of_an_omni_model_is_extended(model_type):
    model = zoo.build(model_type)
    (rotary,) = find_rotaries(model)
    modules = {path: part for path, part in model.named_modules() if path != rotary.path}
    tensors = {
        name: tensor.clone()
        for name, tensor in [*model.named_buffers(), *model.named_parameters()]
        if not name.startswith(rotary.path)
    }
    configs = [model.config.talker_config.to_dict(), model.config.to_dict()]

    patch_model(model, "yarn", factor=4)
    write(model.thinker, zoo_images.image_inputs(model.thinker), 2)

    assert rotary.path.startswith("thinker.")
    assert isinstance(model.get_submodule(rotary.path), ExtendedRotary)
    assert all(model.get_submodule(path) is part for path, part in modules.items())
    after = dict([*model.named_buffers(), *model.named_parameters()])
    assert all(torch.equal(after[name], tensor) for name, tensor in tensors.items())
    assert model.config.talker_config.to_dict() == configs[0]
    assert model.config.thinker_config.text_config.rope_parameters["rope_type"] == "yarn"
    unpatch_model(model)
    assert model.config.to_dict() == configs[1]


def older(settings: dict[str, Any], kind: dict[str, Any], *, beside: bool) -> dict[str, Any]:
    """A config as checkpoints had it before `rope_parameters`, its scaling beside the text's."""
    settings = copy.deepcopy(settings)
    text = settings
    for name in ("thinker_config", "text_config"):
        text = text.get(name, text)
    rope = text.pop("rope_parameters")
    if any(isinstance(value, dict) for value in rope.values()):  # never was otherwise
        text["rope_parameters"] = {
            label: own and {**{k: v for k, v in own.items() if k != "rope_type"}, **kind}
            for label, own in rope.items()
        }
        return settings
    owner = settings if beside else text
    owner["rope_theta"] = rope.pop("rope_theta")
    if "partial_rotary_factor" in rope:
        owner["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
    del rope["rope_type"]
    owner["rope_scaling"] = {**rope, **kind}
    return settings


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": TRAINED}


@pytest.mark.parametrize("model_type", sorted(set(FAMILIES) - {"neomme"}))
def test_m_rope_is_read_as_older_checkpoints_say_it(model_type, tmp_path):
    model = zoo.build(model_type)
    inputs, chosen = zoo_images.image_inputs(model), arguments(model, model_type)
    expected = zoo.run(model, **inputs)
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    settings = json.loads(path.read_text())

    for kind, beside in (({"type": "mrope"}, False), ({"type": "mrope"}, True)):
        path.write_text(json.dumps(older(settings, kind, beside=beside)))
        loaded = load_pretrained(tmp_path)
        assert torch.equal(zoo.run(loaded, **inputs), expected)
        read = zoo.text_config(read_config(tmp_path)[0]).rope_parameters
        assert read == zoo.text_config(loaded.config).rope_parameters
    if model_type in BY_HAND:
        return
    path.write_text(json.dumps(older(settings, {"type": "mrope", **YARN}, beside=False)))
    loaded = load_pretrained(tmp_path)
    patch_model(model, "yarn", **chosen)
    assert relative(zoo.run(loaded, **inputs), zoo.run(model, **inputs)) < 1e-5
    for one in (loaded, model):
        patch_model(one, "linear", **chosen, replace=True)
    assert torch.equal(zoo.run(loaded, **inputs), zoo.run(model, **inputs))


@pytest.mark.parametrize("model_type", ["qwen3_vl", "glm4v"])
def test_stock_does_not_read_it(model_type, tmp_path):
    model = zoo.build(model_type)
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(older(settings, {"type": "mrope"}, beside=False)))

    with pytest.raises(KeyError, match="mrope"):
        type(model).from_pretrained(tmp_path)
