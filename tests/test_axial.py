"""RoPE in two and three dimensions, against rotation matrices, loops and transformers."""

import math
import re
from pathlib import Path

import pytest
import torch
from transformers.models.gemma4 import modeling_gemma4 as gemma4
from transformers.models.kimi_k25 import modeling_kimi_k25 as kimi
from transformers.models.llama import modeling_llama as llama
from transformers.models.llama4 import modeling_llama4 as llama4
from transformers.models.minimax_m3_vl import modeling_minimax_m3_vl as minimax
from transformers.models.pixtral import modeling_pixtral as pixtral
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen

from hf_rope_ext import RopeError
from hf_rope_ext.axial import LAYOUTS, PAIRINGS, SERIES, AxialRope
from hf_rope_ext.methods import (
    NTK,
    Dynamic,
    DynamicNTK,
    DynamicYarn,
    Linear,
    LongRope,
    NoScaling,
    PerAxis,
    Resonance,
    Yarn,
)

# of transformers 5.17
neomme = pytest.importorskip("transformers.models.neomme.modeling_neomme")

GRID = torch.cartesian_prod(torch.arange(5), torch.arange(7))
CUBE = torch.cartesian_prod(torch.arange(3), torch.arange(4), torch.arange(5))
UNEVEN = (6, 3, 2)  # pairs of each axis, of the 12 of a head of 24


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


EVERY_FORM = [
    AxialRope(24, axes, layout=layout, pairing=pairing, series=series, sections=sections)
    for layout in LAYOUTS
    for pairing in PAIRINGS
    for series in SERIES
    for axes, sections in ((2, None), (3, None), (2, (7, 5)), (3, UNEVEN))
]


def planes(rope):
    """Axis, two coordinates and frequency of every pair, by the definitions, one at a time."""
    sections = list(rope.sections or [rope.head_dim // 2 // rope.axes] * rope.axes)
    pairs = sum(sections)
    owners = []  # axis and rank in it, by pair
    if rope.layout == "alternating":
        given = [0] * rope.axes
        while len(owners) < pairs:
            for axis in range(rope.axes):
                if given[axis] < sections[axis]:
                    owners.append((axis, given[axis]))
                    given[axis] += 1
    else:
        for axis in range(rope.axes):
            for rank in range(sections[axis]):
                owners.append((axis, rank))
    deck, given = {}, [0] * rope.axes  # the head's frequencies, dealt
    while len(deck) < pairs:
        for axis in range(rope.axes):
            if given[axis] < sections[axis]:
                deck[axis, given[axis]] = len(deck)
                given[axis] += 1
    found = []
    for pair, (axis, rank) in enumerate(owners):
        if rope.pairing == "interleaved":
            first, second = 2 * pair, 2 * pair + 1
        elif rope.layout == "blocks":
            start = 2 * sum(sections[:axis])
            first, second = start + rank, start + rank + sections[axis]
        else:
            first, second = pair, pair + pairs
        exponent = {
            "axis": rank / sections[axis],
            "head": pair / pairs,
            "dealt": deck[axis, rank] / pairs,
        }[rope.series]
        found.append((axis, first, second, rope.base**-exponent))
    return found


def matrix(rope, position):
    """The block-diagonal rotation matrix of one position, float64."""
    rotation = torch.eye(rope.head_dim, dtype=torch.float64)
    for axis, first, second, frequency in planes(rope):
        angle = float(position[axis]) * frequency
        rotation[first, first] = rotation[second, second] = math.cos(angle)
        rotation[first, second] = -math.sin(angle)
        rotation[second, first] = math.sin(angle)
    return rotation


@pytest.mark.parametrize("rope", EVERY_FORM, ids=range(72))
def test_rotation_is_the_block_diagonal_matrix(rope):
    positions = GRID if rope.axes == 2 else CUBE
    x = draw(2, 3, len(positions), 24)

    found = rope.rotate(x, positions)

    expected = torch.empty_like(x)
    for index, position in enumerate(positions):
        expected[:, :, index] = x[:, :, index] @ matrix(rope, position).T
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(
        rope.rotate(x.float(), positions).double(), expected, rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("rope", EVERY_FORM, ids=range(72))
def test_scores_depend_on_differences_of_positions_alone(rope):
    positions = (GRID if rope.axes == 2 else CUBE).double()
    query, key = draw(1, 1, len(positions), 24), draw(1, 1, len(positions), 24, seed=1)
    shift = torch.tensor([3.0, -2.5, 11.0][: rope.axes], dtype=torch.float64)

    def scores(places):
        return rope.rotate(query, places) @ rope.rotate(key, places).mT

    torch.testing.assert_close(scores(positions), scores(positions + shift), rtol=0, atol=1e-11)
    other = shift.clone()
    other[0] += 1
    moved = rope.rotate(query, positions + shift) @ rope.rotate(key, positions + other).mT
    assert (moved - scores(positions)).abs().max() > 0.1


@pytest.mark.parametrize("axes", [2, 3])
@pytest.mark.parametrize("layout", ["parts", "alternating"])
def test_equal_coordinates_and_one_series_are_rope_in_one_dimension(axes, layout):
    x = draw(1, 2, 50, 24).float()
    config = llama.LlamaConfig(hidden_size=48, num_attention_heads=2, head_dim=24)
    cos, sin = llama.LlamaRotaryEmbedding(config)(x, torch.arange(50)[None])
    expected, _ = llama.apply_rotary_pos_emb(x, x, cos, sin)

    found = AxialRope(24, axes, layout=layout, series="head").rotate(
        x, torch.arange(50)[:, None].expand(-1, axes)
    )

    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_every_row_has_its_own_positions():
    rope = AxialRope(24, 2)
    x = draw(2, 3, len(GRID), 24)
    rows = torch.stack((GRID, GRID + 9))

    found = rope.rotate(x, rows)

    for row in range(2):
        assert torch.equal(found[row : row + 1], rope.rotate(x[row : row + 1], rows[row]))


# against transformers' own modules


def qwen_tower(x):
    config = qwen.Qwen2_5_VLVisionConfig(hidden_size=96, num_heads=2)
    cos, sin = qwen.Qwen2_5_VLVisionRotaryEmbedding(config)(x, GRID)
    turned, _ = qwen.apply_rotary_pos_emb_vision(
        x[0].transpose(0, 1), x[0].transpose(0, 1), cos, sin
    )
    return turned.transpose(0, 1)[None]


def kimi_tower(x):
    config = kimi.Kimi_K25VisionConfig(hidden_size=96, num_attention_heads=2)
    cos, sin = kimi.Kimi_K25VisionRotaryEmbedding(config)(x, GRID.flip(-1))  # columns come first
    turned, _ = kimi.apply_rotary_pos_emb_vision(
        x[0].transpose(0, 1), x[0].transpose(0, 1), cos, sin
    )
    return turned.transpose(0, 1)[None]


def pixtral_tower(x):
    config = pixtral.PixtralVisionConfig(hidden_size=96, num_attention_heads=2)
    cos, sin = pixtral.PixtralVisionRotaryEmbedding(config)(x, GRID)
    return pixtral.apply_rotary_pos_emb(x, x, cos, sin, unsqueeze_dim=0)[0]


def gemma_tower(x):
    config = gemma4.Gemma4VisionConfig(hidden_size=96, num_attention_heads=2, head_dim=48)
    places = GRID[None]
    cos, sin = gemma4.Gemma4VisionRotaryEmbedding(config)(x, places)
    return gemma4.apply_multidimensional_rope(x.transpose(1, 2), cos, sin, places).transpose(1, 2)


def llama_tower(x):
    config = llama4.Llama4VisionConfig(
        hidden_size=96, num_attention_heads=2, image_size=35, patch_size=5
    )
    table = llama4.Llama4VisionRotaryEmbedding(config)(x)[:-1]  # without the class token
    turned, _ = llama4.vision_apply_rotary_emb(x.transpose(1, 2), x.transpose(1, 2), table)
    return turned.transpose(1, 2)


def minimax_tower(x):
    config = minimax.MiniMaxM3VLVisionConfig(hidden_size=100, num_attention_heads=2)
    cos, sin = minimax.MiniMaxM3VLVisionRotaryEmbedding(config)(x, CUBE)
    turned, _ = minimax.apply_rotary_pos_emb_vision(
        x[0].transpose(0, 1), x[0].transpose(0, 1), cos, sin
    )
    return turned.transpose(0, 1)[None]


def neomme_text(x):
    config = neomme.NeoMMEConfig(
        head_dim=48,
        num_hidden_layers=1,
        layer_types=["full_attention"],
        rope_parameters={"full_attention": {"rope_type": "default", "rope_theta": 10_000.0}},
    )
    cos, sin = neomme.NeoMMERotaryEmbedding(config)(x, GRID.T[:, None], "full_attention")
    return neomme.apply_rotary_pos_emb(x, x, cos, sin)[0]


SQUARE = torch.cartesian_prod(torch.arange(7), torch.arange(7))


@pytest.mark.parametrize(
    ("stock", "rope", "positions"),
    [
        (qwen_tower, AxialRope(48, 2), GRID),
        (kimi_tower, AxialRope(48, 2, layout="alternating"), GRID),
        (pixtral_tower, AxialRope(48, 2, series="dealt"), GRID),
        (gemma_tower, AxialRope(48, 2, base=100.0, layout="blocks"), GRID),
        (llama_tower, AxialRope(48, 2, pairing="interleaved"), SQUARE.flip(-1) + 1),
        (minimax_tower, AxialRope(50, 3, sections=(8, 8, 8)), CUBE),
        (
            neomme_text,  # a quarter of the head rotates
            AxialRope(48, 2, layout="alternating", series="head", sections=(3, 3)),
            GRID,
        ),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_families_of_transformers_are_forms_of_it(stock, rope, positions):
    x = draw(1, 2, len(positions), rope.head_dim).float()

    torch.testing.assert_close(rope.rotate(x, positions), stock(x), rtol=0, atol=1e-5)


def test_cos_and_sin_serve_transformers_own_functions():
    x = draw(1, 2, len(GRID), 24)
    rope = AxialRope(24, 2, layout="alternating")
    cos, sin = rope.cos_sin(GRID, torch.float64)

    stock, _ = llama.apply_rotary_pos_emb(x, x, cos[None], sin[None])

    torch.testing.assert_close(rope.apply(x, cos, sin), stock, rtol=0, atol=1e-12)


# scaling


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pairing", PAIRINGS)
def test_scaling_one_axis_changes_its_coordinates_alone(layout, pairing):
    form = {"layout": layout, "pairing": pairing, "original_max_position_embeddings": (4, 8)}
    plain = AxialRope(24, 2, **form)
    scaled = AxialRope(24, 2, **form, method=(NoScaling(), Linear(2.0)))
    x = draw(1, 1, len(GRID), 24)

    changed = (scaled.rotate(x, GRID) != plain.rotate(x, GRID))[0, 0].any(0)

    own = {place for axis, *places, _ in planes(plain) if axis == 1 for place in places}
    assert set(changed.nonzero().flatten().tolist()) == own
    # a position stretched by 2 under a frequency of one half
    stretched = GRID.clone() * torch.tensor([1, 2])
    torch.testing.assert_close(
        scaled.rotate(x, stretched), plain.rotate(x, GRID), rtol=0, atol=1e-12
    )


def test_each_axis_is_extended_from_its_own_series_and_length():
    rope = AxialRope(
        48, 3, original_max_position_embeddings=(8, 32, 64), method=NTK(4.0), base=500.0
    )

    # the last pair of every axis is slowed by exactly the factor, the first not at all
    expected = [(500.0 * 4.0 ** (16 / 14)) ** (-2 * i / 16) for i in range(8)] * 3
    torch.testing.assert_close(rope.inv_freq(), torch.tensor(expected, dtype=torch.float64))

    shared = AxialRope(
        48, 3, series="head", original_max_position_embeddings=8, method=NTK(4.0), base=500.0
    )
    expected = [(500.0 * 4.0 ** (48 / 46)) ** (-2 * i / 48) for i in range(24)]
    torch.testing.assert_close(shared.inv_freq(), torch.tensor(expected, dtype=torch.float64))


def test_the_largest_temperature_of_any_axis_is_the_heads():
    lengths = {"original_max_position_embeddings": 16}
    x = draw(1, 1, len(GRID), 24)
    warm = AxialRope(24, 2, **lengths, method=(Yarn(4.0), Yarn(2.0)))
    cold = AxialRope(
        24, 2, **lengths, method=tuple(Yarn(factor, attention_factor=1.0) for factor in (4.0, 2.0))
    )

    torch.testing.assert_close(
        warm.rotate(x, GRID), cold.rotate(x, GRID) * (0.1 * math.log(4) + 1), rtol=0, atol=1e-12
    )


def test_a_method_that_follows_lengths_follows_each_row_and_axis():
    x = draw(2, 1, len(GRID), 24)
    rows = torch.stack((GRID, GRID * torch.tensor([1, 3])))  # 5 x 7 and 5 x 19
    rope = AxialRope(24, 2, original_max_position_embeddings=(5, 7), method=DynamicNTK(4.0))

    found = rope.rotate(x, rows)

    plain = AxialRope(24, 2)
    fitted = AxialRope(24, 2, original_max_position_embeddings=7, method=(NoScaling(), NTK(19 / 7)))
    torch.testing.assert_close(found[:1], plain.rotate(x[:1], rows[0]), rtol=0, atol=1e-12)
    torch.testing.assert_close(found[1:], fitted.rotate(x[1:], rows[1]), rtol=0, atol=1e-12)
    torch.testing.assert_close(found[1:], rope.rotate(x[1:], rows[1]), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "method",
    [
        Dynamic(2.0),
        DynamicYarn(4.0),
        LongRope(4.0, [2.0] * 6),
        (DynamicYarn(4.0), Resonance()),
    ],
    ids=str,
)
def test_other_methods_that_follow_lengths_equal_their_frozen_form(method):
    lengths = {"original_max_position_embeddings": 4}
    x = draw(1, 1, len(GRID), 24)
    rope = AxialRope(24, 2, **lengths, method=method)
    frozen = tuple(
        one.freeze(rope.geometry(axis), (5, 7)[axis]) for axis, one in enumerate(rope.methods)
    )

    found = rope.rotate(x, GRID)

    fixed = AxialRope(24, 2, **lengths, method=frozen)
    torch.testing.assert_close(found, fixed.rotate(x, GRID), rtol=0, atol=1e-12)


def test_the_dtype_of_queries_is_kept_and_angles_are_float32():
    rope = AxialRope(24, 2, sections=(5, 5))
    x = draw(1, 2, len(GRID), 24)
    far = GRID + 3000

    found = rope.rotate(x.bfloat16(), far)

    assert found.dtype == torch.bfloat16
    exact = rope.rotate(x.bfloat16().double(), far)
    assert (found.double() - exact).abs().max() < 0.03  # one rounding of the result
    assert torch.equal(found[..., 20:], x.bfloat16()[..., 20:])


def test_the_documented_code_runs():
    text = (Path(__file__).parent.parent / "docs" / "axial.md").read_text(encoding="utf-8")
    code, _ = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)

    names = {}
    exec(code, names)
    assert names["cos"].shape == (32 * 64, names["rope"].rotary_dim)


@pytest.mark.parametrize("method", [NTK(2.0), DynamicNTK(4.0)])
def test_it_compiles_without_a_break(method):
    rope = AxialRope(24, 3, sections=UNEVEN, original_max_position_embeddings=3, method=method)
    x = draw(1, 2, len(CUBE), 24)

    compiled = torch.compile(rope.rotate, fullgraph=True, backend="eager")

    assert torch.equal(compiled(x, CUBE), rope.rotate(x, CUBE))


# what cannot be served


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"axes": 1}, "axes must be one of 2, 3, got 1"),
        ({"axes": 4}, "axes must be one of 2, 3, got 4"),
        ({"axes": True}, "axes must be one of 2, 3, got True"),
        ({"head_dim": 23}, "head_dim must be even, got 23"),
        ({"head_dim": 0}, "head_dim must be an integer of at least 2, in dimensions, got 0"),
        ({"head_dim": 64, "axes": 3}, r"32 pairs.*3 axes; pass sections, such as \(10, 10, 10\)"),
        ({"base": 1.0}, "base must be a finite number greater than 1, got 1.0"),
        ({"base": "1e4"}, "base must be a finite number greater than 1, got '1e4'"),
        ({"layout": "halves"}, "layout must be one of 'parts', 'alternating', 'blocks'"),
        ({"pairing": "neox"}, "pairing must be one of 'rotate_half', 'interleaved'"),
        ({"series": "mine"}, "series must be one of 'axis', 'head', 'dealt'"),
        ({"sections": (6, 7)}, r"sum to at most the 12 pairs of head_dim=24, got \(6, 7\)"),
        (
            {"sections": (6, 0)},
            "each of sections must be an integer of at least 1",
        ),
        ({"sections": (4, 4, 4)}, "one value for each of 2 axes"),
        ({"method": Linear(2.0)}, "needs original_max_position_embeddings"),
        ({"method": "ntk"}, "one value for each of 2 axes, got 'ntk'"),
        ({"method": PerAxis({"h": NoScaling()})}, "a Method or a sequence of one per axis"),
        ({"method": (NoScaling(),)}, "one value for each of 2 axes"),
        ({"method": ("ntk", NoScaling())}, "a Method or a sequence of one per axis, got 'ntk'"),
        ({"original_max_position_embeddings": (8,)}, "one value for each of 2 axes"),
        ({"original_max_position_embeddings": 0}, "integer of at least 1, in positions, got 0"),
        ({"original_max_position_embeddings": 8.0}, "at least 1, in positions, got 8.0"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(RopeError, match=message):
        AxialRope(**{"head_dim": 24, "axes": 2, **arguments})


def test_cos_and_sin_of_another_rope_are_refused():
    x = draw(1, 1, len(GRID), 24)
    cos, sin = AxialRope(24, 2, sections=(4, 4)).cos_sin(GRID)

    with pytest.raises(RopeError, match=r"24 values for each position.*\(35, 16\)"):
        AxialRope(24, 2).apply(x, cos, sin)
    with pytest.raises(RopeError, match="cos and sin of shape"):
        AxialRope(24, 2, sections=(4, 4)).apply(x[:, :, 1:], cos, sin)


@pytest.mark.parametrize(
    ("x", "positions", "message"),
    [
        (draw(1, 1, 35, 24), CUBE, r"\(seq, 2\) or \(batch, seq, 2\), got \(60, 3\)"),
        (draw(1, 1, 35, 24), GRID[:, 0], r"got \(35,\)"),
        (draw(1, 1, 35, 24), GRID.tolist(), "positions must be a tensor, got list"),
        (draw(1, 1, 35, 24), GRID > 1, "integers or floats, got torch.bool"),
        (draw(1, 1, 34, 24), GRID, r"positions of shape \(35, 2\).*batch 1 and seq 34"),
        (draw(2, 1, 35, 24), GRID.expand(3, 35, 2), "batch 2 and seq 35"),
        (draw(1, 1, 35, 32), GRID, r"\(batch, heads, seq, 24\), got \(1, 1, 35, 32\)"),
        (draw(1, 35, 24), GRID, r"\(batch, heads, seq, 24\), got \(1, 35, 24\)"),
        (None, GRID, "got NoneType"),
    ],
    ids=range(9),
)
def test_shapes_that_do_not_fit_are_refused(x, positions, message):
    with pytest.raises(RopeError, match=message):
        AxialRope(24, 2).rotate(x, positions)
