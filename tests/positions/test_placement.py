"""Where the tokens of images and videos are placed."""

import copy
import math
import pickle
import warnings

import pytest
import torch
import zoo
import zoo_images
from hypothesis import given, settings
from hypothesis import strategies as st
from method_knobs import knobs

from hf_rope_ext import (
    MethodParameterError,
    RopeError,
    RopeWarning,
    UnsupportedModelError,
    VisualPositions,
    available_methods,
    load_pretrained,
    patch_model,
    patched,
    place_visual_tokens,
    request_length,
    unpatch_model,
)

pytestmark = pytest.mark.filterwarnings("ignore::hf_rope_ext.errors.RopeWarning")

PLACED = [
    name for name in zoo_images.FAMILIES if name not in ("glm_image", "minicpmv4_7", "neomme")
]


def stock_positions(before, grid, after, *, step=1, next_text="spatial"):
    """Positions of text, a block of frames and text, as transformers lays them out, and kinds."""
    frames, rows, columns = grid
    own = [(place,) * 3 for place in range(before)]
    own += [
        (before + step * k, before + row, before + column)
        for k in range(frames)
        for row in range(rows)
        for column in range(columns)
    ]
    start = before + max(rows, columns)
    if next_text == "max":
        start = max(max(place) for place in own) + 1
    own += [(start + place,) * 3 for place in range(after)]
    kinds = [0] * before + [2] * (frames * rows * columns) + [0] * after
    return torch.tensor(own).T[:, None], torch.tensor([kinds])


def placed(positions, kinds, rule, **arguments):
    return place_visual_tokens(positions, kinds, rule, **arguments)[:, 0].T.tolist()


@settings(max_examples=40, deadline=None)
@given(
    before=st.integers(1, 5),
    frames=st.integers(1, 3),
    rows=st.integers(1, 3),
    columns=st.integers(1, 3),
    dense=st.sampled_from([2, 4, 8]),
    next_text=st.sampled_from(["spatial", "max"]),
)
def test_frames_held_longer_straddle_the_place_of_the_frame_they_were(
    before, frames, rows, columns, dense, next_text
):
    """Each frame shown `dense` times: the mean of a frame's places is the trained place."""
    trained, _ = stock_positions(before, (frames, rows, columns), 4, next_text=next_text)
    longer = stock_positions(before, (frames * dense, rows, columns), 4, next_text=next_text)

    found = place_visual_tokens(*longer, VisualPositions(factor={"t": dense}), next_text=next_text)

    block = slice(before, before + dense * frames * rows * columns)
    shape = (3, frames, dense, rows * columns)
    mean = found[:, 0, block].reshape(shape).double().mean(dim=2).flatten(1)
    expected = trained[:, 0, before : before + frames * rows * columns].double()
    torch.testing.assert_close(mean, expected)
    if frames > 1 or next_text == "spatial":  # one trained frame has no step to go by
        torch.testing.assert_close(found[:, 0, block.stop :].double(), trained[:, 0, -4:].double())


@settings(max_examples=40, deadline=None)
@given(
    before=st.integers(1, 5),
    rows=st.integers(1, 3),
    columns=st.integers(1, 3),
    larger=st.sampled_from([2, 3]),
)
def test_a_larger_frame_is_placed_over_the_trained_one(before, rows, columns, larger):
    trained, _ = stock_positions(before, (2, rows, columns), 4)
    whole = stock_positions(before, (2, rows * larger, columns * larger), 4)

    found = place_visual_tokens(*whole, VisualPositions(factor={"h": larger, "w": larger}))

    for axis, size in ((1, rows), (2, columns)):
        places = found[axis, 0, before:-4].double()
        assert float(places.mean()) == pytest.approx(before + (size - 1) / 2, abs=1e-5)
        assert float(places.max()) < before + size - 0.5
    torch.testing.assert_close(found[:, 0, -4:].double(), trained[:, 0, -4:].double())


def test_plain_division_and_steps_of_several_positions():
    positions, kinds = stock_positions(2, (3, 1, 1), 1, step=4)
    plain = VisualPositions(factor={"t": 2}, centred=False)
    assert [place[0] for place in placed(positions, kinds, plain)] == [0, 1, 2, 4, 6, 3]
    # half a step of 4 is 2: (0 + 2) / 2 - 2 = -1
    centred = VisualPositions(factor={"t": 2})
    assert [place[0] for place in placed(positions, kinds, centred)] == [0, 1, 1, 3, 5, 3]


def test_text_behind_steps_of_several_positions():
    """3 frames, twice as many as trained, are 1.5 trained ones: the last is at 1.5 * 4 - 4 = 2."""
    video = stock_positions(2, (3, 1, 1), 1, step=4, next_text="max")
    rule = VisualPositions(factor={"t": 2})
    assert placed(*video, rule, next_text="max")[-1] == [2 + 2 + 1] * 3


def test_videorope_is_diagonal():
    """t = c + 2 k, h = t + row - floor((H - 1) / 2), text behind the last t (arXiv:2502.05173)."""
    grid = frames, rows, columns = 3, 4, 5
    positions, kinds = stock_positions(6, grid, 3)

    found = placed(positions, kinds, VisualPositions(placement="diagonal", stride=2.0))

    expected = [[place] * 3 for place in range(6)]
    for k in range(frames):
        time = 6 + 2 * k
        expected += [
            [time, time + row - (rows - 1) // 2, time + column - (columns - 1) // 2]
            for row in range(rows)
            for column in range(columns)
        ]
    expected += [[6 + 2 * (frames - 1) + 1 + place] * 3 for place in range(3)]
    assert found == expected


def test_space_can_start_again_with_every_image():
    positions, kinds = stock_positions(6, (2, 2, 3), 2)
    found = placed(positions, kinds, VisualPositions(placement="reset"))
    assert found[6:18] == [
        [6 + k, row, column] for k in range(2) for row in range(2) for column in range(3)
    ]
    assert found[18:] == [[9, 9, 9], [10, 10, 10]]


def test_the_text_behind_can_follow_another_rule():
    positions, kinds = stock_positions(1, (5, 2, 2), 1)
    for next_text, start in {"spatial": 3, "max": 6, "time": 6, "tokens": 21}.items():
        rule = VisualPositions(next_text=next_text)
        assert placed(positions, kinds, rule)[-1] == [start] * 3


def test_a_stride_is_between_frames_alone():
    positions, kinds = stock_positions(3, (2, 2, 3), 1)
    found = placed(positions, kinds, VisualPositions(stride=3.0))
    assert found[3:15] == [
        [3 + 3 * k, 3 + row, 3 + column]
        for k in range(2)
        for row in range(2)
        for column in range(3)
    ]
    assert found[15] == [6] * 3


@pytest.mark.parametrize("before", [0, 4])
def test_a_family_whose_text_counts_tokens_is_told_by_it(before):
    positions, kinds = stock_positions(before, (2, 2, 2), 2)
    tokens = before + 8
    positions[:, 0, tokens:] = torch.tensor([tokens, tokens + 1])

    found = placed(positions, kinds, VisualPositions(factor=2.0), next_text="tokens")
    assert found[tokens:] == [[tokens] * 3, [tokens + 1] * 3]
    found = placed(positions, kinds, VisualPositions(next_text="max"), next_text="tokens")
    assert found[tokens:] == [[before + 2] * 3, [before + 3] * 3]
    with pytest.raises(RopeError, match="text resumes at"):
        placed(positions, kinds, VisualPositions(factor=2.0), next_text="spatial")


def test_every_block_of_a_row_is_moved_by_those_before_it():
    first, kinds = stock_positions(1, (1, 4, 4), 2)
    second, more = stock_positions(int(first[0, 0, -1]) + 1, (1, 2, 4), 1)
    cut = int(first[0, 0, -1]) + 1
    positions = torch.cat((first, second[:, :, cut:]), dim=2)
    kinds = torch.cat((kinds, more[:, cut:]), dim=1)

    found = placed(positions, kinds, VisualPositions(factor={"h": 4, "w": 2}, centred=False))

    one = [[1, 1 + row / 4, 1 + column / 2] for row in range(4) for column in range(4)]
    two = [[5, 5 + row / 4, 5 + column / 2] for row in range(2) for column in range(4)]
    assert found == [[0] * 3, *one, [3] * 3, [4] * 3, *two, [7] * 3]


def test_factors_are_those_of_the_axes_a_model_has():
    given = {"t": 4}
    rule = VisualPositions(factor=given)
    given["t"] = given["x"] = 8

    assert rule.factors(("t", "h", "w")) == (4.0, 1.0, 1.0)
    assert rule.factors(("h", "t")) == (1.0, 4.0)
    assert VisualPositions(factor=2).factors(("h", "w")) == (2.0, 2.0)
    assert VisualPositions(placement="reset").factors(("h", "w")) == (1.0, 1.0)
    for wrong in (
        rule,
        VisualPositions(placement="diagonal"),
        VisualPositions(next_text="time"),
    ):
        with pytest.raises(MethodParameterError, match=r"no axis 't'.*have 'h', 'w'"):
            wrong.factors(("h", "w"))


def test_a_diagonal_of_larger_frames_is_divided_about_its_middle():
    positions, kinds = stock_positions(3, (1, 3, 5), 0)
    rule = VisualPositions(placement="diagonal", factor={"h": 2, "w": 4})

    found = placed(positions, kinds, rule)[3:]

    assert found == [
        [3, 3 + (row - 1) / 2, 3 + (column - 2) / 4] for row in range(3) for column in range(5)
    ]


def test_space_starts_again_without_an_axis_of_time_too():
    positions, kinds = stock_positions(3, (1, 2, 2), 1)
    rule = VisualPositions(placement="reset")

    found = placed(positions[1:], kinds, rule, axes=("h", "w"))

    assert found[3:] == [[0, 0], [0, 1], [1, 0], [1, 1], [5, 5]]


def test_padding_behind_a_block_stays_where_it_is():
    positions, kinds = stock_positions(2, (1, 4, 4), 1)
    padded = torch.cat((positions, torch.ones(3, 1, 2, dtype=torch.int64)), dim=2)
    kinds = torch.cat((kinds, torch.zeros(1, 2, dtype=torch.int64)), dim=1)
    mask = torch.tensor([[1] * 19 + [0] * 2])

    found = placed(padded, kinds, VisualPositions(factor=2.0), attention_mask=mask)

    assert found[18:] == [[4] * 3, [1] * 3, [1] * 3]


def test_shapes_that_do_not_match_are_refused():
    positions, kinds = stock_positions(1, (1, 2, 2), 1)
    for wrong in (positions[:2], positions[:, :, 1:], positions.repeat(1, 2, 1)):
        with pytest.raises(RopeError, match=r"t, h, w have shape \(axes, batch, seq\)"):
            place_visual_tokens(wrong, kinds, VisualPositions())


def test_whole_positions_stay_whole_and_padding_is_left_alone():
    positions, kinds = stock_positions(2, (2, 2, 2), 2)
    padded = torch.cat((torch.full((3, 1, 3), 1), positions), dim=2)
    mask = torch.tensor([[0] * 3 + [1] * positions.shape[2]])
    kinds = torch.cat((torch.zeros(1, 3, dtype=torch.int64), kinds), dim=1)

    same = place_visual_tokens(padded, kinds, VisualPositions(), attention_mask=mask)
    moved = place_visual_tokens(padded, kinds, VisualPositions(factor=2.0), attention_mask=mask)

    assert torch.equal(same, padded)
    assert same.dtype == padded.dtype
    assert moved.dtype == torch.float32
    assert (moved[:, :, :3] == 1).all()


def test_positions_of_another_rule_are_an_error():
    positions, kinds = stock_positions(2, (5, 2, 2), 2, next_text="max")
    with pytest.raises(RopeError, match="follow another rule"):
        place_visual_tokens(positions, kinds, VisualPositions(factor={"t": 2}))
    with pytest.raises(RopeError, match=r"got \(2, 1, 24\) and \(1, 24\)"):
        place_visual_tokens(positions[1:], kinds, VisualPositions())
    for needs_time in (VisualPositions(next_text="time"), VisualPositions(placement="diagonal")):
        with pytest.raises(MethodParameterError, match="there is no axis 't'"):
            place_visual_tokens(positions[1:], kinds, needs_time, axes=("h", "w"))


def index_arguments(inputs):
    return {name: value for name, value in inputs.items() if not name.startswith("pixel")}


def indexed(model):
    """The part of a model that places tokens."""
    return next(part for part in model.modules() if hasattr(type(part), "get_rope_index"))


@pytest.mark.parametrize("model_type", PLACED)
@pytest.mark.parametrize("padded", [False, True])
def test_the_rule_of_every_family_is_known(model_type, padded):
    """Placed without a change, the tokens stand where the family has them, and so does the rest."""
    model = zoo.build(model_type)
    inputs = zoo_images.image_inputs(model, padded=padded)
    part = indexed(model)
    names = {"video_second_per_grid": "second_per_grids"}
    arguments = {names.get(name, name): value for name, value in index_arguments(inputs).items()}
    positions, deltas = part.get_rope_index(**arguments)

    patch_model(model, "none", visual_positions=VisualPositions())
    found, found_deltas = part.get_rope_index(**arguments)

    kept = inputs["attention_mask"].bool()
    assert torch.equal(found[:, kept], positions[:, kept])
    assert torch.equal(found_deltas.flatten(), deltas.flatten().to(found_deltas))


# one of each way to index positions: what `generate` does with them is the same code in all
GENERATED = ("qwen2_5_vl", "qwen3_vl", "glm4v", "ernie4_5_vl_moe", "hunyuan_vl")


@pytest.mark.parametrize(
    "model_type",
    [pytest.param(one, marks=[] if one in GENERATED else pytest.mark.slow) for one in PLACED],
)
def test_a_placed_image_is_seen_by_forward_and_generate(model_type):
    model = zoo.build(model_type)
    inputs = zoo_images.image_inputs(model)
    before = zoo.run(model, **inputs)
    patch_model(model, "dynamic_yarn", factor=4, visual_positions=VisualPositions(factor=2.0))
    after = zoo.run(model, **inputs)
    assert (after - before).abs().max() > 1e-2

    model.generation_config.suppress_tokens = zoo_images.SPECIAL
    settings = {"max_new_tokens": 6, "do_sample": False}
    cached = model.generate(**inputs, **settings)
    assert torch.equal(cached, model.generate(**inputs, **settings, use_cache=False))
    unpatch_model(model)
    assert torch.equal(zoo.run(model, **inputs), before)
    assert "get_rope_index" not in indexed(model).__dict__


def test_it_is_the_positions_that_move():
    """The patched forward equals the stock one on positions made by hand."""
    model = zoo.build("qwen2_vl")
    inputs = zoo_images.image_inputs(model)
    positions, _ = model.model.get_rope_index(**index_arguments(inputs))
    rule = VisualPositions(factor={"t": 4, "h": 2})
    by_hand = place_visual_tokens(positions, inputs["mm_token_type_ids"], rule)
    expected = zoo.run(model, **inputs, position_ids=by_hand)

    patch_model(model, "none", visual_positions=rule)

    assert torch.equal(zoo.run(model, **inputs), expected)
    ids, *others = index_arguments(inputs).items()
    assert torch.equal(model.model.get_rope_index(ids[1], **dict(others))[0], by_hand)
    # fewer positions are needed: that is what a length-dependent method and a report go by
    length = request_length(model, **inputs)
    assert length.positions == math.ceil(by_hand.max()) + 1


@pytest.mark.sweep
@pytest.mark.parametrize("name", available_methods())
def test_it_composes_with_every_method(name):
    model = zoo.build("qwen2_vl")
    inputs = zoo_images.image_inputs(model)
    positions, _ = model.model.get_rope_index(**index_arguments(inputs))
    rule = VisualPositions(factor={"t": 4, "w": 2})
    by_hand = place_visual_tokens(positions, inputs["mm_token_type_ids"], rule)
    with patched(model, name, **knobs(name)):
        expected = zoo.run(model, **inputs, position_ids=by_hand)

    patch_model(model, name, **knobs(name), visual_positions=rule)

    assert torch.equal(zoo.run(model, **inputs), expected)


def test_a_placement_of_another_paper_has_to_be_trained():
    """Of ERNIE the pairs are VideoRoPE's already, the positions are not."""
    for model_type, arguments in {
        "qwen2_vl": {"visual_positions": VisualPositions(placement="reset")},
        "ernie4_5_vl_moe": {"mrope_layout": "videorope"},
    }.items():
        with pytest.warns(RopeWarning, match="is not the placement the model was trained with"):
            patch_model(zoo.build(model_type), "none", **arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the model's own grid, stretched, has not
        patch_model(
            zoo.build("qwen2_vl"), "none", visual_positions=VisualPositions(factor={"t": 4})
        )


def test_it_survives_copies_saving_and_a_second_model(tmp_path):
    model, other = zoo.build("qwen2_vl"), zoo.build("qwen2_vl")
    inputs = zoo_images.image_inputs(model)
    stock = zoo.run(other, **inputs)
    patch_model(model, "none", visual_positions=VisualPositions(factor={"t": 2}, stride=3.0))
    expected = zoo.run(model, **inputs)

    model.save_pretrained(tmp_path)

    for again in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        load_pretrained(tmp_path),
    ):
        assert torch.equal(zoo.run(again, **inputs), expected)
    assert torch.equal(zoo.run(other, **inputs), stock)
    saved = model.config.text_config.rope_parameters["rope_type"]
    assert saved.startswith("hf_rope_ext.none: load this model with")  # a stock reader stops


def test_frames_with_text_between_them_are_warned_about():
    model = zoo.build("qwen3_vl")
    rule = VisualPositions(factor={"t": 4})
    with pytest.warns(RopeWarning, match="single frames with timestamps"):
        patch_model(model, "none", visual_positions=rule)
    cut = {name for name, seen in zoo_images.FAMILIES.items() if seen.video == "frames"}
    for name in sorted(cut - {"minicpmv4_7"}):
        with pytest.warns(RopeWarning, match="single frames with timestamps"):
            patch_model(zoo.build(name), "none", visual_positions=rule)


def test_what_cannot_be_placed_is_refused(llama):
    for name in ("glm_image", "minicpmv4_7"):
        with pytest.raises(UnsupportedModelError, match="does not place images as blocks"):
            patch_model(zoo.build(name), "none", visual_positions=VisualPositions())
    with pytest.raises(UnsupportedModelError, match="none has get_rope_index"):
        patch_model(zoo.build("neomme"), "none", visual_positions=VisualPositions())
    with pytest.raises(MethodParameterError, match="models with M-RoPE"):
        patch_model(llama, "none", visual_positions=VisualPositions())
    with pytest.raises(MethodParameterError, match="must be a VisualPositions"):
        patch_model(zoo.build("qwen2_vl"), "none", visual_positions={"t": 4})
    model = zoo.build("qwen2_vl")
    with pytest.raises(MethodParameterError, match="no axis 'x'"):
        patch_model(model, "none", visual_positions=VisualPositions(factor={"x": 4}))
    assert "get_rope_index" not in model.model.__dict__


@pytest.mark.parametrize(
    "wrong",
    [
        {"factor": 0},
        {"factor": {"t": -1}},
        {"factor": "4"},
        {"stride": float("inf")},
        {"stride": True},
        {"placement": "circle"},
        {"next_text": "later"},
        {"centred": "yes"},
    ],
)
def test_settings_are_checked(wrong):
    with pytest.raises(MethodParameterError, match=f"visual_positions: {next(iter(wrong))}"):
        VisualPositions(**wrong)
