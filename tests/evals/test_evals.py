"""The numbers `compare` reports, against brute force and against models that cheat by design."""

import csv
import json
import math
import random
from types import SimpleNamespace

import pytest
import torch
from conftest import TRAINED, logits, tiny_llama
from evaluating import TEXT, byte_level, characters, make_tokenizer, unigram, wide_llama, word_piece
from torch import nn

from hf_rope_ext import AlreadyScaledError, RopeError, patch_model
from hf_rope_ext.evals.bench import Bench
from hf_rope_ext.evals.compare import Comparison, compare
from hf_rope_ext.evals.journal import Cell
from hf_rope_ext.evals.perplexity import Perplexity
from hf_rope_ext.evals.report import load_report
from hf_rope_ext.evals.scoring import score_last
from hf_rope_ext.evals.tasks.base import Place
from hf_rope_ext.evals.tasks.prose import sentences, words
from hf_rope_ext.evals.tasks.ruler_qa import RulerQA
from hf_rope_ext.evals.text import read_text, tokenize
from hf_rope_ext.evals.text_passkey import TextPasskey, draw_sentence
from hf_rope_ext.evals.writing import make_table, save_report
from hf_rope_ext.methods import Linear, NoScaling, Yarn
from hf_rope_ext.parsing import parse_lengths, parse_methods


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def ids(tokenizer):
    return tokenize(tokenizer, TEXT)


def nothing(samples):
    pass


def test_perplexity_is_that_of_scoring_each_token_with_its_own_context(ids):
    model = patch_model(wide_llama(), "yarn", factor=4)
    bench = Bench(SimpleNamespace(bos_token_id=0), ids, 200, windows=3, targets=8)

    found = Perplexity().measure(bench, model, 100, 2, nothing)

    total = 0.0
    for end in Perplexity().ends(bench):
        for position in range(end - 8, end):
            context = torch.cat((torch.tensor([0]), ids[end - 99 : position]))[None]
            probabilities = torch.log_softmax(logits(model, context)[0, -1].double(), -1)
            total -= float(probabilities[ids[position]])
    assert found["nll"] == pytest.approx(total / 24, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(total / 24), rel=1e-5)
    assert found["tokens"] == 24


def test_the_same_tokens_are_scored_at_every_length(ids):
    bench = Bench(None, ids, 400, windows=5, targets=16)

    rows = [list(Perplexity().batches(bench, length, 2)) for length in (50, 100, 400)]

    last = [torch.cat([batch for batch, _ in batches])[:, -16:] for batches in rows]

    assert torch.equal(last[0], last[1])
    assert torch.equal(last[0], last[2])
    assert len(last[0]) == 5


def test_logits_are_made_for_the_scored_positions_alone(ids):
    model = wide_llama()
    seen = []
    model.lm_head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape))

    score_last(model, ids[None, :300], 8)

    assert seen == [(1, 9, 64)]


def test_scores_agree_with_the_models_own_logits(ids):
    model = wide_llama()
    rows = torch.stack((ids[:50], ids[100:150]))

    scores = score_last(model, rows, 5)

    full = torch.log_softmax(logits(model, rows)[:, -6:-1].double(), -1)
    expected = full.gather(-1, rows[:, -5:, None])[..., 0]
    torch.testing.assert_close(scores.log_probs, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(scores.greedy, full.argmax(-1) == rows[:, -5:])


@pytest.mark.parametrize("kind", [byte_level, unigram, word_piece, characters])
def test_a_sample_has_the_length_asked_for_and_the_key_at_its_depth(kind):
    tokenizer = make_tokenizer(kind)
    bench = Bench(tokenizer, TEXT, 400, samples=10)

    for length in (100, 400):
        for index in range(10):
            row, count = TextPasskey().sample(bench, length, index)
            draw = random.Random(f"0/{length}/{index}")
            sentence, cue, answer = draw_sentence(tokenizer, draw)
            assert len(row) == length
            assert torch.equal(row[-count:], answer)
            assert torch.equal(row[-count - len(cue) : -count], cue)
            places = [
                start
                for start in range(length - len(sentence))
                if torch.equal(row[start : start + len(sentence)], sentence)
            ]
            around = length - 1 - len(sentence) - len(cue) - len(answer)
            assert places == [1 + round(around * (index + 0.5) / 10)]


def test_samples_depend_on_the_seed_alone(tokenizer, ids):
    def rows(seed):
        bench = Bench(tokenizer, ids, 200, samples=4, seed=seed)
        return torch.stack([TextPasskey().sample(bench, 200, index)[0] for index in range(4)])

    assert torch.equal(rows(0), rows(0))
    assert not torch.equal(rows(0), rows(1))


class Scripted(nn.Module):
    """Answers a question by looking for its words among the last tokens it sees."""

    def __init__(self, sees):
        super().__init__()
        self.sees = sees
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, input_ids, use_cache=None, logits_to_keep=0):
        found = torch.zeros(*input_ids.shape, 512)
        for row, tokens in enumerate(input_ids.tolist()):
            for position in range(len(tokens)):
                visible = tokens[max(0, position + 1 - self.sees) : position + 1]
                found[row, position, self.answer(visible)] = 1.0
        return SimpleNamespace(logits=found[:, -logits_to_keep:])

    def answer(self, visible):
        for length in range(min(len(visible), 12), 2, -1):
            tail = visible[-length:]
            for start in range(len(visible) - length - 1):
                if visible[start : start + length] == tail:
                    return visible[start + length]
        return 0


def test_a_model_that_copies_gets_all_and_one_that_forgets_only_what_it_still_sees(tokenizer, ids):
    bench = Bench(tokenizer, ids, 120, samples=8)
    sees = 70

    everything = TextPasskey().measure(bench, Scripted(10_000), 120, 4, nothing)
    recent = TextPasskey().measure(bench, Scripted(sees), 120, 4, nothing)

    visible = 0
    for index in range(8):
        sentence, cue, answer = draw_sentence(tokenizer, random.Random(f"0/120/{index}"))
        around = 119 - len(sentence) - len(cue) - len(answer)
        start = 1 + round(around * (index + 0.5) / 8)
        # the last digit is asked for at the last position but one
        visible += start + len(cue) - 3 >= 120 - 1 - sees
    assert everything["exact"] == 1.0
    assert 0 < recent["exact"] < 1
    by_depth = [part["score"] for part in recent["parts"]]
    assert [part["depth"] for part in recent["parts"]] == [0.1, 0.3, 0.5, 0.7, 0.9]
    assert by_depth == sorted(by_depth)
    assert sum(part["score"] * part["n"] for part in recent["parts"]) == 8 * recent["exact"]
    assert recent["exact"] == pytest.approx(visible / 8, abs=1 / 8)


def test_a_random_model_retrieves_nothing(tokenizer, ids):
    bench = Bench(tokenizer, ids, 200, samples=8)

    assert TextPasskey().measure(bench, wide_llama(), 200, 4, nothing)["exact"] == 0.0


def comparison(tokenizer, **changes):
    settings = {
        "model": wide_llama(),
        "tokenizer": tokenizer,
        "text": TEXT,
        "methods": {"none": NoScaling(), "linear": Linear(4), "yarn": Yarn(4)},
        "lengths": (64, 128),
        "windows": 2,
        "targets": 8,
        "samples": 2,
    }
    return Comparison(**{**settings, **changes})


def test_every_method_is_measured_at_every_length_and_the_model_is_left_unpatched(tokenizer):
    asked = comparison(tokenizer)
    before = {name: buffer.clone() for name, buffer in asked.model.named_buffers()}
    steps = []

    report = compare(asked, on_progress=lambda cell, done, total: steps.append((done, total)))

    assert len(report.cells) == 3 * 2 * 2
    tokens = 3 * (2 + 2) * (64 + 128)
    assert steps[-1] == (tokens, tokens)
    assert steps == sorted(steps)
    assert all(torch.equal(buffer, before[name]) for name, buffer in asked.model.named_buffers())
    bench = Bench(tokenizer, TEXT, 128, windows=2, targets=8)
    model = patch_model(wide_llama(), "linear", factor=4)
    expected = Perplexity().measure(bench, model, 128, 1, nothing)
    assert report.value("linear", "perplexity", 128) == pytest.approx(expected["perplexity"])


def test_an_interrupted_comparison_goes_on_where_it_stopped(tokenizer, tmp_path):
    full = compare(comparison(tokenizer))

    class StopError(Exception):
        pass

    def stop(cell, done, total):
        if cell == Cell("linear", "passkey", 64):
            raise StopError

    asked = comparison(tokenizer)
    with pytest.raises(StopError):
        compare(asked, tmp_path, stop)
    with (tmp_path / "cells.jsonl").open("a") as file:
        file.write('{"cell": {"method": "li')  # cut off by a kill
    measured = []
    resumed = compare(
        comparison(tokenizer), tmp_path, lambda cell, done, total: measured.append(cell)
    )

    assert asked.model.config.rope_parameters["rope_type"] == "default"
    assert Cell("none", "perplexity", 64) not in measured
    assert Cell("linear", "passkey", 64) in measured
    assert resumed.cells == full.cells
    again = []
    compare(comparison(tokenizer), tmp_path, lambda cell, done, total: again.append(cell))
    assert not again


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"lengths": (64,)},
        {"text": TEXT + " more"},
        {"methods": {"none": NoScaling()}},
        {"tasks": ("passkey",)},
    ],
)
def test_a_directory_of_another_comparison_is_refused_and_kept(tokenizer, tmp_path, change):
    compare(comparison(tokenizer), tmp_path)
    before = (tmp_path / "cells.jsonl").read_text()

    with pytest.raises(RopeError, match="holds results of another comparison"):
        compare(comparison(tokenizer, **change), tmp_path)

    assert (tmp_path / "cells.jsonl").read_text() == before


def test_other_weights_are_another_comparison(tokenizer, tmp_path):
    compare(comparison(tokenizer), tmp_path)
    other = wide_llama()
    other.lm_head.weight.data[0, 0] += 1

    with pytest.raises(RopeError, match=r"another comparison \(different model.weights_sha256\)"):
        compare(comparison(tokenizer, model=other), tmp_path)


def test_the_report_says_everything_the_numbers_depend_on(tokenizer, tmp_path):
    report = compare(comparison(tokenizer))
    files = save_report(report, tmp_path)

    assert [path.name for path in files] == [
        "report.json",
        "cells.csv",
        "perplexity.png",
        "passkey.png",
        "passkey_depths.png",
        "report.html",
    ]
    assert all(path.stat().st_size > 0 for path in files)
    content = json.loads((tmp_path / "report.json").read_text())
    assert content["settings"]["schema_version"] == 2
    assert content["settings"]["methods"]["yarn"]["factor"] == 4.0
    assert content["settings"]["model"]["trained_length"] == TRAINED
    assert len(content["settings"]["model"]["weights_sha256"]) == 64
    assert {"transformers", "torch", "hf_rope_ext", "python"} <= content["environment"].keys()
    with (tmp_path / "cells.csv").open() as file:
        rows = list(csv.DictReader(file))
    parts = sum(len(cell.get("buckets", [])) + len(cell.get("parts", [])) for cell in report.cells)
    assert len(rows) == len(report.cells) + parts
    assert load_report(tmp_path) == report
    assert make_table(report, "perplexity").row_count == 3


def test_a_report_of_another_schema_is_refused(tmp_path):
    with pytest.raises(RopeError, match="cannot read a report"):
        load_report(tmp_path)
    (tmp_path / "report.json").write_text('{"settings": {"schema_version": 99}}')
    with pytest.raises(RopeError, match="schema version"):
        load_report(tmp_path)


def test_a_scaled_model_is_compared_only_when_told_to_replace(tokenizer):
    scaled = tiny_llama({"rope_type": "linear", "factor": 2.0}, vocab_size=512)

    with pytest.raises(AlreadyScaledError):
        compare(comparison(tokenizer, model=scaled))


def test_a_patched_model_is_refused(tokenizer):
    model = patch_model(wide_llama(), "yarn", factor=4)

    with pytest.raises(RopeError, match="pass it unpatched"):
        compare(comparison(tokenizer, model=model))


def test_texts_that_are_too_short_or_unreadable_are_refused(tokenizer, tmp_path):
    with pytest.raises(RopeError, match=r"the text has .* tokens, but a length of 128 needs 128"):
        compare(comparison(tokenizer, text="short"))
    (tmp_path / "empty.txt").write_text("  \n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    for name, message in (
        ("empty.txt", "is empty"),
        ("latin.txt", "cannot read the text"),
        ("nowhere.txt", "cannot read the text"),
    ):
        with pytest.raises(RopeError, match=message):
            read_text(tmp_path / name)


@pytest.mark.parametrize(
    "read",
    [
        read_text,
        lambda path: sentences(3, str(path)),
        lambda path: words(9, str(path)),
        lambda path: RulerQA(layout="hotpotqa", data=str(path)).draft(
            random.Random(0), 1, Place(100)
        ),
    ],
)
def test_a_byte_order_mark_is_no_text_and_a_changed_file_is_read_again(tmp_path, read):
    def content(name):
        context = [["Title", ["The dog ran.", " It ran."]]]
        return json.dumps([{"question": name, "answer": "It ran.", "context": context}])

    path = tmp_path / "text"
    path.write_text(content("one"), encoding="utf-8")
    plain = read(path)
    path.write_text(content("one"), encoding="utf-8-sig")
    assert path.read_bytes().startswith(b"\xef\xbb\xbf")
    marked = read(path)
    path.write_text(content("two"), encoding="utf-8")

    assert marked == plain
    assert read(path) != plain


def test_lengths_without_room_are_refused(tokenizer):
    with pytest.raises(RopeError, match="leaves no context before 8 scored tokens"):
        compare(comparison(tokenizer, lengths=(8, 64)))
    with pytest.raises(RopeError, match="too short for the pass key"):
        compare(comparison(tokenizer, lengths=(20, 64)))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1x,2x,4x", (512, 1024, 2048)),
        ("128k", (131072,)),
        ("300, 100,300", (100, 300)),
        ("0.5x,1.5x", (256, 768)),
    ],
)
def test_lengths_are_tokens_or_multiples_of_the_trained_length(text, expected):
    assert parse_lengths(text, 512) == expected


@pytest.mark.parametrize("text", ["", "4y", "x", "-1", "0", "0.001x", "1x,,2x"])
def test_lengths_that_are_neither_are_refused(text):
    with pytest.raises(RopeError, match="is neither a number of tokens"):
        parse_lengths(text, 512)


def test_methods_take_the_common_factor_unless_they_set_their_own():
    found = parse_methods("none, pi,yarn:factor=2:beta_fast=16,base:rope_theta=1e6,yarn+cope", 4.0)

    assert found["none"] == NoScaling()
    assert found["pi"] == Linear(4)
    assert found["yarn:factor=2:beta_fast=16"] == Yarn(2, beta_fast=16)
    assert found["base:rope_theta=1e6"].rope_theta == 1e6
    assert found["yarn+cope"].method == Yarn(4)


def test_a_setting_that_is_none_is_refused():
    with pytest.raises(RopeError, match="'beta_fast' is not knob=value"):
        parse_methods("yarn:beta_fast", 4.0)
