"""M-RoPE layouts of our own, against the definitions in their papers."""

import copy
import pickle

import pytest
import torch
import zoo
import zoo_images
from conftest import relative
from decoding import CACHE

from hf_rope_ext import (
    ExportError,
    MethodParameterError,
    MRopeLayout,
    RopeError,
    RopeWarning,
    VisualPositions,
    describe,
    export,
    load_pretrained,
    patch_model,
    unpatch_model,
)
from hf_rope_ext.positions.layouts import LAYOUTS, AppliedLayout, LayoutRule

pytestmark = pytest.mark.filterwarnings("ignore::hf_rope_ext.errors.RopeWarning")

NAMES = ["chunked", "interleaved", "videorope", "hope", "mhrope"]

# of 64 pairs (8 key heads for mhrope), as the papers and the official code have them
OFFICIAL = {
    "chunked": ((16, 24, 24), "t" * 16 + "h" * 24 + "w" * 24),
    "interleaved": ((24, 20, 20), "thw" * 20 + "tttt"),
    # the official code begins with height at pair 0; a known port begins with time
    "videorope": ((16, 24, 24), "hw" * 24 + "t" * 16),
    "hope": ((16, 24, 24), "hw" * 24 + "t" * 16),
    "mhrope": ((2, 3, 3), "tthhhwww"),
}


@pytest.mark.parametrize("name", NAMES)
def test_pairs_have_the_axes_of_the_definition(name):
    section, axes = OFFICIAL[name]
    assert "".join("thw"[row] for row in LAYOUTS[name].assign(*section)) == axes
    pairs = axes if name != "mhrope" else "t" * 16 + "h" * 24 + "w" * 24
    turning = MRopeLayout(name).on(tuple(sorted(pairs, key="thw".index)), heads=8)
    assert "".join(turning.names[row] for row in turning.rows) == axes


def test_a_layout_brings_the_placement_of_its_paper():
    own = {name: MRopeLayout(name).visual_positions for name in NAMES}

    assert own == {
        **dict.fromkeys(NAMES),
        "videorope": VisualPositions(placement="diagonal", stride=2.0),
        "hope": VisualPositions(placement="diagonal"),
    }


@pytest.mark.parametrize("order", [None, [2, 0, 3, 1]])
@pytest.mark.parametrize("rows", [1, 2])
def test_angles_are_those_of_a_loop_over_pairs(order, rows):
    layout = AppliedLayout((0, 1, 2, 1), ("t", "h", "w"))
    positions = torch.randint(0, 99, (3, rows, 5), generator=torch.Generator().manual_seed(0))
    frequencies = torch.rand(rows, 1, 4, generator=torch.Generator().manual_seed(1))
    for inv_freq in (frequencies, frequencies[0, 0]):
        each = inv_freq.expand(rows, 1, 4)
        found = layout.angles(positions, inv_freq, order)
        text = layout.angles(positions[0], inv_freq, order)

        assert found.shape == text.shape == (rows, 5, 4)
        for stored, pair in enumerate(order or range(4)):
            along = positions[layout.rows[pair]]
            assert torch.equal(found[..., stored], along * each[..., 0, stored, None])
            assert torch.equal(text[..., stored], positions[0] * each[..., 0, stored, None])


@pytest.mark.parametrize(
    ("axes", "heads", "rows"),
    [
        ("ttthhhwww", 3, "thw"),
        ("tttttttthw", 4, "tthw"),
        ("tthhhhhhhhhh" + "w" * 12, 8, "thhhwwww"),
        ("thwwwwwwww", 4, "thww"),
    ],
)
def test_heads_are_shared_in_proportion_with_one_for_each_axis(axes, heads, rows):
    layout = MRopeLayout("mhrope").on(tuple(axes), heads)

    assert "".join(layout.names[row] for row in layout.rows) == rows


def test_sections_may_be_uneven():
    assert "".join("thw"[row] for row in LAYOUTS["videorope"].assign(1, 3, 1)) == "hwhht"
    assert "".join("thw"[row] for row in LAYOUTS["interleaved"].assign(1, 2, 1)) == "thwt"
    assert "".join("thw"[row] for row in LAYOUTS["interleaved"].assign(4, 2, 1)) == "thwthtt"
    assert MRopeLayout("mhrope").on("thhhhhhhw", heads=3).rows == (0, 1, 2)


@pytest.mark.parametrize("model_type", ["qwen2_5_vl", "qwen3_vl", "ernie4_5_vl_moe", "qwen3_5"])
@pytest.mark.parametrize("name", ["chunked", "interleaved", "videorope", "hope"])
def test_cosines_are_those_of_a_loop_over_pairs(model_type, name):
    model = zoo.build(model_type)
    text = model.model.language_model
    patch_model(model, "ntk", factor=4, mrope_layout=name)
    rotation = text.rotary_emb.rotations[None]
    geometry = rotation.geometry
    counts = {"qwen2_5_vl": (2, 3, 3), "qwen3_vl": (4, 2, 2), "qwen3_5": (2, 1, 1)}
    rows = LAYOUTS[name].assign(*counts.get(model_type, (2, 3, 3)))
    positions = torch.tensor([[[3, 70, 200]], [[5, 90, 100]], [[7, 50, 150]]])

    cos, _ = text.rotary_emb(torch.zeros(1, 3, 1), positions)

    base = geometry.base * 4 ** (geometry.rotary_dim / (geometry.rotary_dim - 2))
    step = 2 if model_type == "ernie4_5_vl_moe" else 1  # it repeats every cosine next to itself
    for pair, row in enumerate(rows):
        for token, position in enumerate(positions[row, 0].tolist()):
            frequency = base ** (-2 * pair / geometry.rotary_dim)
            if name == "hope" and row == 0:
                frequency = 0.0
            angle = torch.tensor(position * frequency, dtype=torch.float64)
            assert abs(float(cos[0, token, step * pair]) - float(angle.cos())) < 1e-4


def test_a_new_layout_is_one_entry(monkeypatch):
    rule = LayoutRule(lambda t, h, w: (2,) * w + (1,) * h + (0,) * t, resting=1)
    monkeypatch.setitem(LAYOUTS, "backwards", rule)
    model = zoo.build("qwen3_vl")  # 4, 2 and 2 pairs

    patch_model(model, "none", mrope_layout="backwards")

    frequencies, _ = model.model.language_model.rotary_emb.plan(None, torch.tensor([[9]]))
    assert (frequencies.flatten() == 0).tolist() == [False] * 2 + [True] * 2 + [False] * 4
    assert describe(model).visual_positions is None


def test_the_time_of_hope_rests_at_every_length():
    model = zoo.build("qwen3_vl")
    patch_model(model, "dynamic_yarn", factor=4, mrope_layout="hope")
    for length in (10, 1000):
        frequencies, _ = model.model.language_model.rotary_emb.plan(
            None, torch.tensor([[length - 1]])
        )
        assert (frequencies.flatten() == 0).tolist() == [False] * 4 + [True] * 4


@pytest.mark.parametrize("method", ["none", "linear", "linear by axis", "dynamic_yarn"])
def test_heads_with_axes_attend_as_a_loop_over_heads_does(method):
    """Attention weights of the first layer, from its projections, head by head in float64."""
    torch.manual_seed(0)
    model = zoo.build("qwen2_5_vl")
    model.set_attn_implementation("eager")
    inputs = zoo_images.image_inputs(model, words=20)
    positions, _ = model.model.get_rope_index(
        **{name: value for name, value in inputs.items() if not name.startswith("pixel")}
    )
    layout = MRopeLayout("mhrope", (0, 1, 1))
    factors = {"h": 1.0, "w": 4.0} if method == "linear by axis" else {"h": 4.0, "w": 4.0}
    factor = {"none": None, "linear by axis": factors}.get(method, 4.0)
    patch_model(model, method.split()[0], factor=factor, mrope_layout=layout)
    attention = model.model.language_model.layers[0].self_attn
    seen = {}
    for name in ("q_proj", "k_proj"):
        getattr(attention, name).register_forward_hook(
            lambda module, args, output, name=name: seen.__setitem__(name, output.double())
        )

    with torch.no_grad():
        weights = model(**inputs, output_attentions=True).attentions[0][0].double()

    rotation = model.model.language_model.rotary_emb.rotations[None]
    plan = rotation.method.freeze(rotation.geometry, int(positions.max()) + 1)
    plan = plan.plan(rotation.geometry)
    trained = rotation.geometry.inv_freq()
    queries, keys = (seen[name][0].unflatten(-1, (-1, 16)) for name in ("q_proj", "k_proj"))
    length = queries.shape[0]
    for head in range(4):
        axis = (1, 2)[head // 2]  # two queries to each of the two key heads
        frequencies = plan.inv_freq
        if method == "linear by axis":
            frequencies = trained / factors["thw"[axis]]
        angles = positions[axis, 0].double()[:, None] * frequencies
        query, key = (
            turned(one, angles) * plan.attention_scaling
            for one in (queries[:, head], keys[:, head // 2])
        )
        scores = query @ key.T / 4
        hidden = torch.ones(length, length).triu(1).bool()
        expected = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        assert (weights[head] - expected).abs().max() < 1e-5


def turned(vectors, angles):
    """Rotate (i, i + d/2) by the angle of pair i."""
    one, other = vectors.chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((one * cos - other * sin, other * cos + one * sin), dim=-1)


@pytest.mark.parametrize("model_type", ["qwen2_5_vl", "qwen3_vl", "glm4v", "ernie4_5_vl_moe"])
@pytest.mark.parametrize("name", ["chunked", "interleaved", "videorope", "mhrope"])
def test_text_is_bit_for_bit_as_it_was_and_images_are_not(model_type, name):
    model = zoo.build(model_type)
    text, image = zoo.inputs(model), zoo_images.image_inputs(model)
    before = zoo.run(model, **text), zoo.run(model, **image)
    own = {"qwen2_5_vl": "chunked", "glm4v": "chunked", "qwen3_vl": "interleaved"}
    layout = MRopeLayout(name, (0, 1, 1)) if name == "mhrope" else name

    patch_model(model, "none", mrope_layout=layout)

    assert torch.equal(zoo.run(model, **text), before[0])
    unchanged = torch.equal(zoo.run(model, **image), before[1])
    if name != "videorope":  # which comes with positions of its own
        assert unchanged == (name == own.get(model_type))
    unpatch_model(model)
    assert torch.equal(zoo.run(model, **image), before[1])


@pytest.mark.sweep
@pytest.mark.parametrize("name", NAMES)
def test_it_trains_copies_and_keeps_its_cache(name):
    model = zoo.build("qwen2_5_vl")
    model.generation_config.suppress_tokens = zoo_images.SPECIAL
    inputs = zoo_images.image_inputs(model)
    layout = MRopeLayout(name, (0, 1, 1)) if name == "mhrope" else name
    patch_model(model, "yarn", factor={"t": 4}, mrope_layout=layout)
    expected = zoo.run(model, **inputs)

    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(zoo.run(copied, **inputs), expected)
    settings = {"max_new_tokens": 8, "do_sample": False}
    cached = model.generate(**inputs, **settings)
    assert torch.equal(cached, model.generate(**inputs, **settings, use_cache=False))
    model.train()
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    query = model.model.language_model.layers[0].self_attn.q_proj.weight
    assert query.grad.isfinite().all()
    assert query.grad.abs().max() > 0


def test_saved_it_is_restored_and_a_stock_tool_stops(tmp_path):
    from transformers import AutoModelForImageTextToText

    model = zoo.build("qwen2_5_vl")
    inputs = zoo_images.image_inputs(model)
    patch_model(model, "linear", factor=2, mrope_layout=MRopeLayout("videorope", (4, 2, 2)))
    expected = zoo.run(model, **inputs)

    model.save_pretrained(tmp_path)

    assert torch.equal(zoo.run(load_pretrained(tmp_path), **inputs), expected)
    with pytest.raises(ValueError, match=r"hf_rope_ext\.load_pretrained"):
        AutoModelForImageTextToText.from_pretrained(tmp_path)
    with pytest.raises(ExportError, match="no form for mrope_layout"):
        export(model, "vllm")


def test_describe_and_a_warning_say_that_it_has_to_be_trained():
    model = zoo.build("qwen2_5_vl")
    with pytest.warns(RopeWarning, match="'videorope' is not the layout the model was trained"):
        patch_model(model, "none", mrope_layout="videorope")

    found = describe(model)

    assert found.mrope_layout == {"name": "videorope", "section": None}
    assert found.visual_positions["placement"] == "diagonal"
    assert found.sites[0].sound
    assert "mrope_layout: name='videorope'" in str(found)


@pytest.mark.sweep
@pytest.mark.parametrize("name", ["chunked", "videorope", "hope", "mhrope"])
def test_it_compiles(name):
    model = zoo.build("qwen3_vl")
    inputs = zoo_images.image_inputs(model)
    layout = MRopeLayout(name, (0, 1, 1)) if name == "mhrope" else name
    patch_model(model, "yarn", factor={"t": 4}, mrope_layout=layout)
    expected = zoo.run(model, **inputs)
    text = model.model.language_model

    # heads with axes leave the graph for a moment
    text.forward = torch.compile(text.forward, backend="eager", fullgraph=name != "mhrope")

    assert relative(zoo.run(model, **inputs), expected) < 1e-5


@pytest.mark.parametrize("method", ["yarn", "dynamic_yarn"])
def test_heads_with_axes_are_described_once(method):
    model = zoo.build("qwen2_5_vl")
    patch_model(model, method, factor=4, mrope_layout=MRopeLayout("mhrope", (0, 1, 1)))

    (site,) = describe(model).sites

    assert (site.pairs, site.largest_slowdown) == (8, pytest.approx(4))
    assert site.sound


def test_a_text_model_by_itself_is_given_the_positions_of_a_layout():
    whole = zoo.build("qwen2_5_vl")
    inputs = zoo_images.image_inputs(whole)
    text, reference = whole.model.language_model, zoo.build("qwen2_5_vl")
    patch_model(reference, "none", mrope_layout="videorope")
    positions, _ = reference.model.get_rope_index(
        **{name: value for name, value in inputs.items() if not name.startswith("pixel")}
    )

    patch_model(text, "none", mrope_layout="videorope")

    assert describe(text).visual_positions is None
    expected = reference.model.language_model
    arguments = {"input_ids": inputs["input_ids"], "position_ids": positions}
    assert torch.equal(zoo.run(text, **arguments), zoo.run(expected, **arguments))


def test_a_cache_by_heads_cannot_be_turned():
    model = zoo.build("qwen2_5_vl")
    layout = MRopeLayout("mhrope", (0, 1, 1))
    patch_model(model, "dynamic_yarn", factor=4, mrope_layout=layout)
    ids = torch.randint(10, 128, (1, 100))
    with torch.no_grad():
        cache = model(ids[:, :64], use_cache=True)[CACHE]
        with pytest.raises(RopeError, match="heads with different axes"):
            model(ids[:, 64:], **{CACHE: cache})


WRONG = {
    "an unknown name": ("spiral", "must be one of 'chunked', 'interleaved'"),
    "no name": (["chunked"], r"must be one of .* got \['chunked'\]"),
    "a section that does not sum": (
        MRopeLayout("interleaved", (2, 2, 2)),
        r"section \[2, 2, 2\] sums to 6, but the model has 8 pairs",
    ),
    "heads that do not sum": (
        MRopeLayout("mhrope", (2, 3, 3)),
        r"sums to 8, but the model has 2 key heads",
    ),
    "fewer heads than axes": ("mhrope", "2 key heads cannot be shared among 3 axes"),
}


@pytest.mark.parametrize("case", WRONG)
def test_bad_layouts_are_one_error_and_nothing_changes(case):
    layout, message = WRONG[case]
    model = zoo.build("qwen2_5_vl")
    with pytest.raises(MethodParameterError, match=message):
        patch_model(model, "none", mrope_layout=layout)
    assert "ExtendedRotary" not in repr(model)


@pytest.mark.parametrize("section", [(1, 2), (1.0, 2, 3), "thw", (1, -1, 2), 3])
def test_a_section_is_three_whole_numbers(section):
    with pytest.raises(MethodParameterError, match="three whole numbers"):
        MRopeLayout("chunked", section)


def test_models_with_other_axes_are_refused(llama):
    for model in (llama, zoo.build("hunyuan_vl")):
        with pytest.raises(MethodParameterError, match="each turn by one of several"):
            patch_model(model, "none", mrope_layout="chunked")
    with pytest.raises(MethodParameterError, match="those of this one turn by h, w"):
        patch_model(zoo.build("neomme"), "none", mrope_layout="chunked")


def test_the_layout_a_model_has_changes_nothing():
    model = zoo.build("qwen3_vl")
    inputs = zoo_images.image_inputs(model)
    patch_model(model, "yarn", factor=2)
    expected = zoo.run(model, **inputs)
    patch_model(model, "yarn", factor=2, mrope_layout="interleaved", replace=True)
    assert relative(zoo.run(model, **inputs), expected) == 0.0
    assert model.config.text_config.rope_parameters["rope_type"] == "yarn"
