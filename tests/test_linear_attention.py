"""Linear attention, its features and RoPE in it, against loops in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_rope_ext import encodings
from hf_rope_ext.geometry import RopeGeometry

SEQ = 23


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(found, expected, atol=1e-12):
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


def quadratic(queries, keys, values, causal, angles=None):
    """Equation 19 of RoFormer, one query at a time."""
    result = torch.zeros(len(queries), values.shape[-1], dtype=torch.float64)
    for m, query in enumerate(queries):
        total = 0.0
        for n, key in enumerate(keys[: m + 1] if causal else keys):
            weight = query @ key
            total += weight
            if angles is not None:
                turn = (
                    torch.view_as_complex(query.reshape(-1, 2))
                    * torch.view_as_complex(key.reshape(-1, 2)).conj()
                )
                weight = (turn * torch.exp(1j * (angles[m] - angles[n]))).real.sum()
            result[m] += weight * values[n]
        result[m] /= total
    return result


@given(st.integers(1, 40), st.integers(1, 17), st.booleans(), st.booleans())
@settings(deadline=None, max_examples=40)
def test_linear_attention_is_the_quadratic_sum(seq, chunk, causal, rotary):
    features = (draw(2, seq, 6, seed=seq).exp(), draw(2, seq, 6, seed=chunk).exp())
    values = draw(2, seq, 5, seed=2)
    inv_freq = torch.tensor([1.0, 0.1, 0.01], dtype=torch.float64)
    angles = encodings.rope_angles(torch.arange(seq), inv_freq) if rotary else None

    found = encodings.linear_attention(*features, values, causal, angles, chunk)

    for row in range(2):
        expected = quadratic(features[0][row], features[1][row], values[row], causal, angles)
        close(found[row], expected, atol=1e-9)


def test_elu_features_are_elu_plus_1():
    x = torch.tensor([-3.0, -0.5, 0.0, 2.0])

    found = encodings.elu_features(x)

    assert found.tolist() == pytest.approx([math.exp(-3), math.exp(-0.5), 1.0, 3.0])


def test_performer_features_estimate_the_exponential_without_bias():
    q, k = draw(4, 8) / 4, draw(5, 8, seed=1) / 4  # longer ones have rare and large estimates
    generator = torch.Generator().manual_seed(0)
    estimates = []
    for _ in range(400):
        projection = encodings.performer_projection(16, 8, generator)
        features = [encodings.performer_features(x, projection) for x in (q, k)]
        estimates.append(features[0] @ features[1].mT)
    estimates = torch.stack(estimates)

    errors = estimates.mean(dim=0) - (q @ k.mT).exp()
    standard_errors = estimates.std(dim=0) / math.sqrt(len(estimates))
    assert (errors.abs() / standard_errors).max() < 4
    assert (standard_errors / (q @ k.mT).exp() < 0.06).all()


def test_directions_are_orthogonal_in_groups_and_as_long_as_normal_rows():
    projection = encodings.performer_projection(4000, 8, torch.Generator().manual_seed(0)).double()

    for group in projection.split(8)[:20]:
        products = group @ group.mT
        close(products, products.diagonal().diag(), atol=1e-4)
    assert projection.square().sum(dim=-1).mean().item() == pytest.approx(8, rel=0.03)
    # every direction is as likely: the mean of their outer products is the identity
    close(projection.mT @ projection / 4000, torch.eye(8, dtype=torch.float64), atol=0.08)
    close(projection.mean(dim=0), torch.zeros(8, dtype=torch.float64), atol=0.08)
    assert encodings.performer_projection(11, 8).shape == (11, 8)


def test_a_shift_of_the_exponents_cancels():
    q, k, values = draw(2, SEQ, 8), draw(2, SEQ, 8, seed=1), draw(2, SEQ, 3, seed=2)
    projection = encodings.performer_projection(16, 8, torch.Generator().manual_seed(3)).double()
    angles = encodings.rope_angles(torch.arange(SEQ), RopeGeometry(16, 100.0, SEQ).inv_freq())

    def attend(shift_q, shift_k):
        features = (
            encodings.performer_features(q, projection, shift_q),
            encodings.performer_features(k, projection, shift_k),
        )
        return encodings.linear_attention(*features, values, True, angles)

    close(attend(0.0, 0.0), attend(draw(2, SEQ, 1, seed=4), 7.0), atol=1e-11)
