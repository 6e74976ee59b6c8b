"""Encodings of position, against explicit matrices, loops in float64 and stock transformers."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.codegen import modeling_codegen as codegen
from transformers.models.llama import modeling_llama as llama
from transformers.models.llama4 import modeling_llama4 as llama4
from transformers.models.marian.modeling_marian import MarianSinusoidalPositionalEmbedding
from transformers.models.t5.modeling_t5 import T5Attention, T5Config

from hf_rope_ext import RopeError, encodings
from hf_rope_ext.geometry import RopeGeometry
from hf_rope_ext.methods import Yarn

SEQ, DIM = 23, 16
INV_FREQ = RopeGeometry(DIM, 10_000.0, SEQ).inv_freq()
ANGLES = encodings.rope_angles(torch.arange(SEQ), INV_FREQ)
PLACES = st.integers(-500, 500)


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(found, expected, atol=1e-12):
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


# absolute


def test_sinusoidal_is_the_papers_formula():
    found = encodings.sinusoidal(torch.arange(SEQ), 6, dtype=torch.float64)

    expected = [
        [
            (math.cos if index % 2 else math.sin)(position / 10_000 ** (index // 2 * 2 / 6))
            for index in range(6)
        ]
        for position in range(SEQ)
    ]
    close(found, torch.tensor(expected, dtype=torch.float64))


def test_sinusoidal_is_marians_in_another_order():
    stock = MarianSinusoidalPositionalEmbedding(500, 32).create_weight()

    found = encodings.sinusoidal(torch.arange(500), 32)

    close(found[:, 0::2], stock[:, :16], atol=1e-6)
    close(found[:, 1::2], stock[:, 16:], atol=1e-6)


def test_sinusoidal_takes_positions_of_any_shape_and_another_base():
    places = torch.tensor([[0.5, 7.0], [3.0, -2.0]])

    found = encodings.sinusoidal(places, 4, base=100.0)

    assert found.shape == (2, 2, 4)
    assert found[1, 1].tolist() == pytest.approx(
        [math.sin(-2), math.cos(-2), math.sin(-0.2), math.cos(-0.2)]
    )


def test_a_learned_table_starts_as_a_normal_distribution_and_is_looked_up_like_an_embedding():
    table = encodings.learned_table(400, 50, std=0.1, generator=torch.Generator().manual_seed(1))
    places = torch.tensor([[399, 0], [7, 7]])

    assert table.shape == (400, 50)
    assert table.mean().item() == pytest.approx(0.0, abs=3e-3)  # 4 standard errors
    assert table.std().item() == pytest.approx(0.1, rel=0.02)
    assert torch.equal(
        encodings.look_up(table, places), torch.nn.functional.embedding(places, table)
    )


@pytest.mark.parametrize("place", [-1, 8])
def test_a_learned_table_has_nothing_beyond_its_length(place):
    with pytest.raises(RopeError, match="positions 0 to 7"):
        encodings.look_up(encodings.learned_table(8, 4), torch.tensor([3, place]))


# relative biases


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("buckets", "farthest"), [(32, 128), (8, 20), (4, 9), (64, 1000)])
def test_buckets_are_those_of_t5(bidirectional, buckets, farthest):
    offsets = torch.arange(-1200, 1200).reshape(3, 800)

    found = encodings.t5_buckets(offsets, bidirectional, buckets, farthest)

    stock = T5Attention._relative_position_bucket(offsets, bidirectional, buckets, farthest)
    assert torch.equal(found, stock)


@pytest.mark.parametrize("bidirectional", [True, False])
def test_t5_bias_is_that_of_its_attention(bidirectional):
    config = T5Config(
        d_model=12, d_kv=4, num_heads=3, is_decoder=not bidirectional, decoder_start_token_id=0
    )
    attention = T5Attention(config, has_relative_attention_bias=True)
    table = attention.relative_attention_bias.weight
    torch.nn.init.normal_(table)

    found = encodings.t5_bias(table, torch.arange(150), torch.arange(180), bidirectional)

    assert torch.equal(found[None], attention.compute_bias(150, 180))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((True, 6), "multiple of 4"), ((False, 5), "multiple of 2"), ((False, 32, 16), "at least 17")],
)
def test_buckets_that_cannot_be_are_refused(arguments, message):
    with pytest.raises(RopeError, match=message):
        encodings.t5_buckets(torch.arange(3), *arguments)


def test_slopes_of_8_and_16_heads_are_those_of_the_paper():
    assert encodings.alibi_slopes(8).tolist() == [2.0**-n for n in range(1, 9)]
    halves = [n / 2 for n in range(1, 17)]
    assert encodings.alibi_slopes(16).tolist() == pytest.approx([2.0**-n for n in halves])


@pytest.mark.parametrize("heads", [*range(1, 18), 20, 24, 40, 71, 112])
def test_alibi_is_blooms_up_to_a_constant_of_the_query(heads):
    stock = build_alibi_tensor(torch.ones(1, 30), heads, torch.float32).double()  # (heads, 1, keys)
    places = torch.arange(30)

    found = encodings.alibi_bias(encodings.alibi_slopes(heads), places, places)

    causal = torch.ones(30, 30).tril().bool()
    expected = stock - stock.mT  # bloom's has no query, since a constant leaves a softmax as it is
    close(found[:, causal], expected[:, causal], atol=1e-5)


def test_alibi_counts_the_positions_it_is_given():
    found = encodings.alibi_bias(torch.tensor([0.5, 0.25]), torch.tensor([10, 3]), torch.arange(5))

    expected = [
        [[-slope * abs(query - key) for key in range(5)] for query in (10, 3)]
        for slope in (0.5, 0.25)
    ]
    assert found.tolist() == expected


# RoPE


def matrix(position):
    """The rotation of neighbours, by the definition."""
    rotation = torch.zeros(DIM, DIM, dtype=torch.float64)
    for pair in range(DIM // 2):
        angle = position * 10_000.0 ** (-2 * pair / DIM)
        block = [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]
        here = slice(2 * pair, 2 * pair + 2)
        rotation[here, here] = torch.tensor(block, dtype=torch.float64)
    return rotation


ORDER = [*range(0, DIM, 2), *range(1, DIM, 2)]  # of halves, as indices of pairs


def test_the_matrix_is_the_definition():
    found = encodings.rotation_matrix(ANGLES)

    close(found, torch.stack([matrix(place) for place in range(SEQ)]))


@given(PLACES, PLACES)
@settings(deadline=None, max_examples=30)
def test_the_matrix_of_two_places_is_that_of_their_difference(query, key):
    here, there, between = (
        encodings.rotation_matrix(encodings.rope_angles(torch.tensor(place), INV_FREQ))
        for place in (query, key, key - query)
    )

    close(here.mT @ there, between, atol=1e-11)
    close(here.mT @ here, torch.eye(DIM, dtype=torch.float64))


def test_pairs_complex_numbers_and_halves_are_the_matrix():
    x = draw(2, 3, SEQ, DIM)
    expected = torch.stack([x[:, :, place] @ matrix(place).T for place in range(SEQ)], dim=2)

    close(encodings.rotate_pairs(x, ANGLES), expected)
    close(encodings.rotate_complex(x, ANGLES), expected)
    close(encodings.rotate_halves(x[..., ORDER], ANGLES), expected[..., ORDER])


def test_every_row_can_have_its_own_angles():
    x, places = draw(2, 3, 5, DIM), torch.tensor([[0, 1, 2, 3, 4], [9, 8, 40, 40, 0]])
    angles = encodings.rope_angles(places, INV_FREQ)[:, None]

    for rotate in (encodings.rotate_pairs, encodings.rotate_complex):
        found = rotate(x, angles)
        for row in range(2):
            for index, place in enumerate(places[row].tolist()):
                close(found[row, :, index], x[row, :, index] @ matrix(place).T)


@given(PLACES, PLACES, PLACES)
@settings(deadline=None, max_examples=30)
def test_scores_depend_on_the_difference_of_positions(query, key, shift):
    q, k = draw(1, DIM), draw(1, DIM, seed=1)

    def score(rotate, m, n):
        rotated = [
            rotate(x, encodings.rope_angles(torch.tensor([place]), INV_FREQ))
            for x, place in ((q, m), (k, n))
        ]
        return rotated[0] @ rotated[1].mT

    for rotate in (encodings.rotate_pairs, encodings.rotate_complex, encodings.rotate_halves):
        close(score(rotate, query, key), score(rotate, query + shift, key + shift), atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_codings_are_those_of_three_families(dtype):
    q, k = draw(1, 2, SEQ, DIM).to(dtype), draw(1, 2, SEQ, DIM, seed=1).to(dtype)
    wide = (q.float(), k.float())
    cos, sin = ANGLES.cos().float()[None], ANGLES.sin().float()[None]
    halves = llama.apply_rotary_pos_emb(*wide, cos.repeat(1, 1, 2), sin.repeat(1, 1, 2))
    numbers = torch.polar(torch.ones_like(cos), ANGLES.float()[None])
    by_token = [x.transpose(1, 2) for x in wide]
    turned = [x.transpose(1, 2) for x in llama4.apply_rotary_emb(*by_token, numbers)]
    neighbours = [codegen.apply_rotary_pos_emb(x, sin, cos).transpose(1, 2) for x in by_token]

    for index, x in enumerate((q, k)):
        for rotate, stock in (
            (encodings.rotate_halves, halves),
            (encodings.rotate_complex, turned),
            (encodings.rotate_pairs, neighbours),
        ):
            found = rotate(x, ANGLES)
            assert found.dtype == dtype
            # one rounding of the result, and none before it
            close(
                found.float(),
                stock[index].to(dtype).float(),
                atol=1e-5 + 0.02 * (dtype != torch.float32),
            )


@given(st.integers(1, 9), st.integers(0, 2))
@settings(deadline=None, max_examples=30)
def test_orders_are_converted_index_by_index(pairs, dim):
    shape = [3, 3, 3]
    shape[dim] = 2 * pairs
    x = torch.arange(math.prod(shape)).reshape(shape)

    halves = encodings.pairs_to_halves(x, dim)

    for index in range(2 * pairs):
        source = 2 * index if index < pairs else 2 * (index - pairs) + 1
        assert torch.equal(halves.select(dim, index), x.select(dim, source))
        assert torch.equal(encodings.halves_to_pairs(halves, dim), x)
        assert torch.equal(
            encodings.pairs_to_halves(halves, dim - 3), encodings.pairs_to_halves(halves, dim)
        )


def test_a_projection_reordered_as_documented_gives_the_same_scores():
    heads, hidden = 3, 10
    states = draw(SEQ, hidden)
    weights = draw(heads * DIM, hidden, seed=1), draw(heads * DIM, hidden, seed=2)

    def scores(weights, rotate):
        q, k = (
            rotate((states @ weight.T).unflatten(-1, (heads, DIM)).transpose(0, 1), ANGLES)
            for weight in weights
        )
        return q @ k.mT

    reordered = [
        encodings.pairs_to_halves(weight.unflatten(0, (heads, -1)), dim=1).flatten(0, 1)
        for weight in weights
    ]

    close(
        scores(weights, encodings.rotate_pairs), scores(reordered, encodings.rotate_halves), 1e-11
    )


def test_a_methods_plan_is_a_set_of_frequencies():
    geometry = RopeGeometry(DIM, 10_000.0, 32)
    plan = Yarn(factor=4).plan(geometry)
    x = draw(1, 1, SEQ, DIM)
    config = llama.LlamaConfig(
        head_dim=DIM,
        hidden_size=DIM,
        num_attention_heads=1,
        max_position_embeddings=128,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10_000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    )
    cos, sin = llama.LlamaRotaryEmbedding(config)(x, torch.arange(SEQ)[None])
    expected, _ = llama.apply_rotary_pos_emb(x, x, cos, sin)

    angles = encodings.rope_angles(torch.arange(SEQ), plan.inv_freq)

    close(encodings.rotate_halves(x, angles) * plan.attention_scaling, expected, atol=1e-5)


def test_axial_rope_is_rope_of_each_axis_on_its_own_dimensions():
    rows, columns = torch.arange(4).repeat_interleave(6), torch.arange(6).repeat(4)
    x = draw(1, 2, 24, 2 * DIM)
    rope = encodings.AxialRope(2 * DIM, 2, pairing="interleaved")

    found = rope.rotate(x, torch.stack((rows, columns), dim=-1))

    for axis, places in enumerate((rows, columns)):
        here = slice(axis * DIM, (axis + 1) * DIM)
        expected = torch.stack(
            [x[:, :, n, here] @ matrix(int(p)).T for n, p in enumerate(places)], 2
        )
        close(found[..., here], expected)


@pytest.mark.parametrize("rotate", ["rotate_pairs", "rotate_complex", "rotate_halves"])
def test_dimensions_without_an_angle_are_refused(rotate):
    with pytest.raises(RopeError, match="8 angles rotate 16 dimensions, got 18"):
        getattr(encodings, rotate)(draw(SEQ, DIM + 2), ANGLES)


@pytest.mark.parametrize("convert", ["pairs_to_halves", "halves_to_pairs"])
def test_an_odd_dimension_has_no_order(convert):
    with pytest.raises(RopeError, match="must be even"):
        getattr(encodings, convert)(draw(4, 7))


# xPos


def xpos_score(q, k, m, n):
    """A score of xPos from complex numbers, as the paper derives it."""
    total = 0.0
    for pair in range(DIM // 2):
        zeta = (2 * pair / DIM + 0.4) / 1.4
        theta = 10_000.0 ** (-2 * pair / DIM)
        first = complex(*q[2 * pair : 2 * pair + 2])
        second = complex(*k[2 * pair : 2 * pair + 2])
        turn = complex(math.cos((m - n) * theta), math.sin((m - n) * theta))
        total += (first * second.conjugate() * turn).real * zeta ** ((m - n) / 512)
    return total


@given(st.integers(-2000, 2000), st.integers(0, 3000))
@settings(deadline=None, max_examples=50)
def test_scores_of_xpos_are_the_papers_function_of_the_distance(key, distance):
    query = key + distance
    q, k = draw(DIM), draw(DIM, seed=1)
    (place, scale), (place_k, scale_k) = (
        (
            encodings.rope_angles(torch.tensor([p]), INV_FREQ),
            encodings.xpos_scales(torch.tensor([p]), DIM).repeat_interleave(2, dim=-1),
        )
        for p in (query, key)
    )

    found = (encodings.rotate_pairs(q[None], place) * scale) @ (
        encodings.rotate_pairs(k[None], place_k) / scale_k
    ).mT

    assert found.item() == pytest.approx(xpos_score(q.tolist(), k.tolist(), query, key), abs=1e-9)


def test_xpos_fades_fast_pairs_with_distance_and_the_slow_hardly():
    scales = encodings.xpos_scales(torch.tensor([0, 512, 2048]), 64)

    assert scales[0].tolist() == [1.0] * 32
    assert scales[1, [0, 31]].tolist() == pytest.approx([0.4 / 1.4, (62 / 64 + 0.4) / 1.4])
    assert (scales[2] < scales[1]).all()
    assert (scales.diff(dim=-1)[1:] > 0).all()


def test_float32_holds_as_many_positions_as_documented():
    for place in (-35_000, 35_000):
        scale = encodings.xpos_scales(torch.tensor([place]), 128).float()
        assert torch.isfinite(scale).all()
        assert scale.min() >= torch.finfo(torch.float32).tiny


@pytest.mark.parametrize(
    "wrong", [{"dim": 7}, {"dim": 8, "scale_base": 0.0}, {"dim": 8, "gamma": -1.0}]
)
def test_scales_that_cannot_be_are_refused(wrong):
    with pytest.raises(RopeError, match=str(next(reversed(wrong)))):
        encodings.xpos_scales(torch.arange(3), **wrong)
