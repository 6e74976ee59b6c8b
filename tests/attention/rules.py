"""The definitions of the methods' papers, as rules of the brute-force attention."""

import math
from functools import cache

import torch
import zoo
from attention.brute_force import Rule
from zoo import TRAINED

LONG = 90  # tokens, of which the models were trained on 64

TRUE = Rule(lambda m, n: m - n)
"""What is computed without a method."""


def leaky(window, slowdown):
    return Rule(lambda m, n: m - n if m - n < window else window + (m - n - window) / slowdown)


def grouped(group, window):
    return Rule(
        lambda m, n: m - n if m - n < window else m // group - n // group + window - window // group
    )


def chunked(chunk, limit, scale=None):
    def distance(m, n):
        key = n % chunk
        if n // chunk > m // chunk:  # a frame of a video, ahead of the text behind it
            return m - n
        if m // chunk == n // chunk:
            return m % chunk - key
        if m // chunk == n // chunk + 1:
            return min(m % chunk + chunk, limit - 1) - key
        return limit - 1 - key

    return Rule(distance, scale)


def streaming(sinks, window):
    def distance(m, n):
        if m - n < window:
            return m - n
        return min(m, sinks + window - 1) - n if n < sinks else None

    return Rule(distance)


def mapped(position):
    return Rule(lambda m, n: position(m) - position(n))


def slope(head, heads, m, n):
    assert heads == 4
    return 2.0 ** (-8 * (head + 1) / heads) * (m - n)


def temperature(m):
    return (0.1 * math.log(LONG / TRAINED) + 1) ** 2


def knobs(text):
    return {
        name: float(v) if "." in v else int(v) for name, v in (p.split("=") for p in text.split())
    }


@cache
def model_of(family):
    return zoo.build(family).eval()


def tokens(rows=2, length=LONG, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(5, 120, (rows, length), generator=generator)
