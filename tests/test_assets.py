"""The bundled model, and the windows it was trained on."""

import json
import re

import pytest
import torch
from bundled_model import Recipe, build_model
from bundled_windows import CLOSE, CUE, KEY_DIGITS, Windows
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_rope_ext import assets
from hf_rope_ext.evals.text_passkey import SENTENCE


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_file(str(assets.DIRECTORY / "tokenizer.json"))


@pytest.fixture
def windows(tokenizer):
    text = torch.tensor(tokenizer.encode(assets.TEXT.read_text(encoding="utf-8")).ids)
    return Windows(tokenizer, text, seed=0, digit_weight=16.0)


def test_it_is_small_and_is_what_its_record_says():
    files = [path for path in assets.DIRECTORY.iterdir() if path.is_file()]
    record = json.loads((assets.DIRECTORY / "training.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(assets.DIRECTORY)

    assert sum(path.stat().st_size for path in files) < 4_000_000
    assert model.num_parameters() == record["parameters"]
    assert model.config.max_position_embeddings == record["recipe"]["context_length"]
    fresh = build_model(Recipe())
    assert {name: part.shape for name, part in fresh.named_parameters()} == {
        name: part.shape for name, part in model.named_parameters()
    }


def test_it_repeats_a_pass_key_within_its_trained_length():
    tokenizer = AutoTokenizer.from_pretrained(assets.DIRECTORY)
    model = AutoModelForCausalLM.from_pretrained(assets.DIRECTORY)
    text = assets.TEXT.read_text(encoding="utf-8")[:700]
    prompt = SENTENCE.format(key="60718") + text + SENTENCE.partition("{")[0]
    inputs = tokenizer(prompt, return_tensors="pt")

    output = model.generate(**inputs, max_new_tokens=5, do_sample=False)

    assert tokenizer.decode(output[0, -5:]) == "60718"


def test_it_is_trained_on_the_sentence_that_is_asked_for():
    assert CUE + "{key}" + CLOSE == SENTENCE


def test_a_window_states_a_pass_key_somewhere_and_again_at_its_end(windows, tokenizer):
    batch = windows.passkey(20, 200)

    assert batch.tokens.shape == batch.weights.shape == (20, 200)
    for tokens, weights in zip(batch.tokens, batch.weights, strict=True):
        text = tokenizer.decode(tokens.tolist())
        first, last = re.findall(rf"{CUE}(\d{{{KEY_DIGITS}}}){re.escape(CLOSE)}", text)[-2:]
        assert first == last
        assert text.endswith(SENTENCE.format(key=last))
        assert tokenizer.decode(tokens[weights == 16.0].tolist()) == last


@pytest.mark.parametrize("kind", ["uniform_copies", "ambiguous_copies"])
def test_a_window_for_copying_scores_what_came_before(windows, kind):
    batch = getattr(windows, kind)(20, 96)

    for tokens, weights in zip(batch.tokens, batch.weights, strict=True):
        period = int((weights == 0).sum())
        assert 4 <= period < 96 // 2
        assert torch.equal(tokens[period:], tokens[:-period])
