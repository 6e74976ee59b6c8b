"""`RopeHFLM` against lm-eval's own HFLM, and against forwards written out by hand."""

import logging
import random
from contextlib import nullcontext

import pytest
import torch
from conftest import TRAINED, logits, tiny_llama
from evaluating import TEXT, make_tokenizer
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from hf_rope_ext import RopeError, load_pretrained, patch_model, patched, save_pretrained
from hf_rope_ext.evals.lm_eval.model import RopeHFLM
from hf_rope_ext.evals.scoring import score_last, score_tokens

LONG = 4 * TRAINED


@pytest.fixture(scope="module")
def tokenizer():
    made = make_tokenizer()
    made.add_special_tokens({"eos_token": "</s>"})
    made.padding_side = "left"
    return made


@pytest.fixture(autouse=True)
def _quiet():
    logging.getLogger("lm_eval").setLevel(logging.ERROR)


@pytest.fixture
def model():
    return tiny_llama(vocab_size=512)


@pytest.fixture
def saved(tmp_path, model, tokenizer):
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def ask(kind, *arguments):
    return [
        Instance(request_type=kind, doc={}, arguments=one, idx=0, metadata=("task", number, 1))
        for number, one in enumerate(arguments)
    ]


def words(tokenizer, tokens, start=0):
    """A text of exactly this many tokens."""
    ids = tokenizer(TEXT[start:], add_special_tokens=False, verbose=False)["input_ids"]
    for end in range(tokens, 3 * tokens):
        text = tokenizer.decode(ids[:end])
        if len(tokenizer(text, add_special_tokens=False)["input_ids"]) == tokens:
            return text
    raise AssertionError


PAIRS = [
    ("the cat sat", " on a mat"),
    ("the cat sat on", " a"),
    ("the cat sat on", " the"),  # shares its input with the one before
    ("", "some other animal"),
    ("and then some other animal came by to look", " at it . 17"),
]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_log_likelihoods_are_hflms_on_an_unpatched_model(model, tokenizer, batch_size):
    requests = ask("loglikelihood", *PAIRS)
    stock = HFLM(model, tokenizer=tokenizer, batch_size=batch_size)
    ours = RopeHFLM(model, tokenizer=tokenizer, batch_size=batch_size)

    expected = stock.loglikelihood(requests, disable_tqdm=True)
    found = ours.loglikelihood(requests, disable_tqdm=True)

    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], 1e-5)


def test_a_greedy_continuation_is_told(model, tokenizer):
    ids = tokenizer("the cat sat", return_tensors="pt").input_ids
    best = int(logits(model, ids)[0, -1].argmax())
    lm = RopeHFLM(model, tokenizer=tokenizer)

    found = lm._loglikelihood_tokens([(None, ids[0].tolist(), [token]) for token in (best, 7)])

    assert [greedy for _, greedy in found] == [True, False]


def test_rolling_log_likelihoods_are_hflms_on_an_unpatched_model(model, tokenizer):
    requests = ask("loglikelihood_rolling", (TEXT[:900],), (TEXT[900:1000],))
    assert len(tokenizer(TEXT[:900])["input_ids"]) > 2 * TRAINED
    stock = HFLM(model, tokenizer=tokenizer, batch_size=2)
    ours = RopeHFLM(model, tokenizer=tokenizer, batch_size=2)

    found = ours.loglikelihood_rolling(requests, disable_tqdm=True)

    assert found == pytest.approx(stock.loglikelihood_rolling(requests, True), rel=1e-5)


@pytest.mark.parametrize("settings", [{}, {"until": ["a"]}, {"until": [" t", " s"]}])
def test_generations_are_hflms_on_an_unpatched_model(model, tokenizer, settings):
    arguments = {"max_gen_toks": 12, "do_sample": False, **settings}
    requests = ask("generate_until", *[(context or "it", arguments) for context, _ in PAIRS])
    stock = HFLM(model, tokenizer=tokenizer, batch_size=2)
    ours = RopeHFLM(model, tokenizer=tokenizer, batch_size=2)

    found = ours.generate_until(requests, disable_tqdm=True)

    assert any(found)
    assert found == stock.generate_until(requests, disable_tqdm=True)


def by_hand(model, context, continuation):
    """Log-likelihood by one forward of the whole request; its last token is only predicted."""
    ids = torch.tensor([context + continuation[:-1]])
    log_probs = logits(model, ids).double().log_softmax(-1)[0, len(context) - 1 :]
    return sum(float(log_probs[place, token]) for place, token in enumerate(continuation))


def random_requests(*shapes):
    draw = random.Random(0)
    return [
        (
            None,
            [draw.randrange(1, 512) for _ in range(context)],
            [draw.randrange(1, 512) for _ in range(continuation)],
        )
        for context, continuation in shapes
    ]


@pytest.mark.parametrize(
    ("method", "length"),
    [("linear", None), ("yarn", None), ("dynamic_yarn", None), ("dynamic", LONG)],  # has no end
)
def test_a_patched_model_reads_its_whole_length_in_any_batch(tokenizer, method, length):
    requests = random_requests((20, 5), (200, 3), (LONG, 1), (100, 30), (20, 5), (100, 30))
    model = patch_model(tiny_llama(vocab_size=512), method, factor=4)
    expected = [by_hand(model, *tokens) for _, *tokens in requests]

    for size in (1, 4):
        lm = RopeHFLM(model, tokenizer=tokenizer, batch_size=size, max_length=length)
        assert lm.max_length == LONG
        found = lm._loglikelihood_tokens(requests, disable_tqdm=True)
        assert [value for value, _ in found] == pytest.approx(expected, rel=2e-5)


@pytest.mark.parametrize("method", ["yarn", "dynamic_yarn"])
def test_what_is_generated_does_not_depend_on_the_batch(tokenizer, method):
    model = patch_model(tiny_llama(vocab_size=512), method, factor=4)
    prompts = [words(tokenizer, tokens) for tokens in (30, 200, 90, 200, 60)]
    requests = ask("generate_until", *[(prompt, {"max_gen_toks": 10}) for prompt in prompts])

    alone, together = (
        RopeHFLM(model, tokenizer=tokenizer, batch_size=size).generate_until(requests, True)
        for size in (1, 4)
    )

    assert alone == together


def test_rolling_windows_slide_by_the_stride(model, tokenizer):
    patch_model(model, "yarn", factor=4)
    text = TEXT[:2000]
    ids = tokenizer(text)["input_ids"]
    window, stride = 100, 30
    lm = RopeHFLM(model, tokenizer=tokenizer, batch_size=3, window=window, stride=stride)

    (found,) = lm.loglikelihood_rolling(ask("loglikelihood_rolling", (text,)), disable_tqdm=True)

    sequence = [tokenizer.bos_token_id, *ids]
    expected, done = 0.0, 0
    while done < len(ids):
        end = window if done == 0 else min(done + stride, len(ids))
        expected += by_hand(
            model, sequence[max(0, end - window) : done + 1], sequence[done + 1 : end + 1]
        )
        done = end
    assert found == pytest.approx(expected, rel=1e-5)


def test_model_arguments_patch_what_is_loaded(saved, tokenizer):
    lm = RopeHFLM(saved, method="yarn", factor=4, beta_fast=16, dtype="float32")
    stretched = patch_model(tiny_llama(vocab_size=512), "yarn", factor=4, beta_fast=16)
    (request,) = random_requests((200, 5))

    assert lm.max_length == LONG
    ((found, _),) = lm._loglikelihood_tokens([request], disable_tqdm=True)
    assert found == pytest.approx(by_hand(stretched, *request[1:]), rel=1e-5)
    info = lm.get_model_info()
    assert info["rope"]["method"]["beta_fast"] == 16
    assert info["rope"]["max_position_embeddings"] == LONG
    assert info["truncated_requests"] == 0


def test_a_recorded_patch_is_applied(tmp_path, model, tokenizer):
    patch_model(model, "dynamic_yarn", factor=4).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    (request,) = random_requests((200, 5))

    lm = RopeHFLM(str(tmp_path), dtype="float32")

    assert lm.get_model_info()["rope"]["method"]["name"] == "dynamic_yarn"
    ((found, _),) = lm._loglikelihood_tokens([request], disable_tqdm=True)
    assert found == pytest.approx(by_hand(model, *request[1:]), rel=1e-5)
    with pytest.raises(RopeError, match="already patched"):
        RopeHFLM(str(tmp_path), method="linear", factor=2)
    again = RopeHFLM(str(tmp_path), method="linear", factor=2, replace=True)
    assert again.get_model_info()["rope"]["method"] == {"name": "linear", "factor": 2.0}


@pytest.fixture
def adapter(tmp_path, saved):
    """A LoRA adapter trained under YaRN, with the record beside it."""
    from peft import LoraConfig, get_peft_model

    base = patch_model(load_pretrained(saved, dtype=torch.float32), "yarn", factor=4)
    wrapped = get_peft_model(base, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    save_pretrained(wrapped, tmp_path / "adapter")
    return str(tmp_path / "adapter"), wrapped.eval()


@pytest.mark.parametrize("given", ["as the model", "as peft"])
def test_an_adapter_comes_with_the_patch_it_was_trained_under(saved, adapter, given):
    directory, wrapped = adapter
    (request,) = random_requests((200, 5))
    arguments = (
        {"pretrained": directory}
        if given == "as the model"
        else {"pretrained": saved, "peft": directory}
    )

    lm = RopeHFLM(**arguments, dtype="float32")

    assert lm.max_length == LONG
    ((found, _),) = lm._loglikelihood_tokens([request], disable_tqdm=True)
    assert found == pytest.approx(by_hand(wrapped, *request[1:]), rel=1e-5)


def test_a_peft_model_in_memory_is_evaluated_as_it_is(adapter, tokenizer):
    _, wrapped = adapter
    lm = RopeHFLM(wrapped, tokenizer=tokenizer)
    (request,) = random_requests((200, 5))

    ((found, _),) = lm._loglikelihood_tokens([request], disable_tqdm=True)

    assert found == pytest.approx(by_hand(wrapped, *request[1:]), rel=1e-5)


def test_device_map_and_dtype_are_from_pretraineds(saved, tmp_path):
    places = {"model.layers.1": "disk", "model.layers.0": "cpu", "model.embed_tokens": "cpu"}
    device_map = {**places, "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    spread = {"device_map": device_map, "offload_folder": str(tmp_path / "offload")}
    requests = random_requests((200, 5), (150, 5))

    lm = RopeHFLM(saved, method="yarn", factor=4, dtype="bfloat16", batch_size=2, **spread)
    whole = RopeHFLM(saved, method="yarn", factor=4, dtype="bfloat16", batch_size=2)

    assert lm.model.hf_device_map == device_map
    assert lm.device.type == "cpu"
    assert lm.model.dtype == torch.bfloat16
    assert lm._loglikelihood_tokens(requests) == whole._loglikelihood_tokens(requests)


def test_the_patch_may_come_after_the_harness(model, tokenizer):
    lm = RopeHFLM(model, tokenizer=tokenizer)
    assert lm.max_length == TRAINED
    with patched(model, "yarn", factor=4):
        assert lm.max_length == LONG
        assert lm.get_model_info()["rope"]["factor"] == 4.0


def test_a_request_longer_than_the_model_raises_and_names_its_length(model, tokenizer):
    lm = RopeHFLM(model, tokenizer=tokenizer)
    long = words(tokenizer, 3 * TRAINED)

    with pytest.raises(RopeError, match=r"has 19\d tokens, but the model's length is 64"):
        lm.loglikelihood(ask("loglikelihood", ("a", " b"), (long, " b")), disable_tqdm=True)
    with pytest.raises(RopeError, match=r"192 tokens, and 10 may be generated.*3\.16 times"):
        lm.generate_until(ask("generate_until", (long, {"max_gen_toks": 10})), disable_tqdm=True)
    with pytest.raises(RopeError, match="256 tokens may be generated"):
        lm.generate_until(ask("generate_until", ("a", {})), disable_tqdm=True)
    with pytest.raises(RopeError, match="continuation of 192 tokens"):
        lm._loglikelihood_tokens([(None, [1], [2] * 192)], disable_tqdm=True)


def test_a_request_of_exactly_the_length_is_scored(model, tokenizer):
    lm = RopeHFLM(model, tokenizer=tokenizer)

    assert lm._loglikelihood_tokens(random_requests((TRAINED, 1)), disable_tqdm=True)
    with pytest.raises(RopeError, match="65 tokens"):
        lm._loglikelihood_tokens(random_requests((TRAINED + 1, 1)), disable_tqdm=True)
    prompt = words(tokenizer, TRAINED - 10)
    request = ask("generate_until", (prompt, {"max_gen_toks": 10}))
    assert len(lm.generate_until(request, disable_tqdm=True)) == 1
    longer = ask("generate_until", (prompt, {"max_gen_toks": 11}))
    with pytest.raises(RopeError, match="54 tokens, and 11"):
        lm.generate_until(longer, disable_tqdm=True)


def test_truncation_on_request_is_lm_evals_and_counted(model, tokenizer):
    stock = HFLM(model, tokenizer=tokenizer)
    ours = RopeHFLM(model, tokenizer=tokenizer, truncation=True)
    long = words(tokenizer, 3 * TRAINED)
    pairs = ask("loglikelihood", ("a cat", " sat"), (long, " sat"))
    prompts = ask("generate_until", (long, {"max_gen_toks": 10}))

    found = ours.loglikelihood(pairs, disable_tqdm=True)

    expected = stock.loglikelihood(pairs, disable_tqdm=True)
    assert [one for one, _ in found] == pytest.approx([one for one, _ in expected], rel=1e-5)
    assert ours.generate_until(prompts, True) == stock.generate_until(prompts, True)
    assert ours.get_model_info()["truncated_requests"] == 2


def test_a_batch_size_is_found_by_trying(model, tokenizer):
    lm = RopeHFLM(model, tokenizer=tokenizer, batch_size="auto", max_batch_size=3)
    fixed = RopeHFLM(model, tokenizer=tokenizer)
    requests = ask("loglikelihood", *PAIRS)

    found = lm.loglikelihood(requests, disable_tqdm=True)

    assert set(lm.batch_sizes.values()) == {3}
    expected = fixed.loglikelihood(requests, disable_tqdm=True)
    assert [one for one, _ in found] == pytest.approx([one for one, _ in expected], rel=1e-5)
    prompts = ask("generate_until", ("a cat", {"max_gen_toks": 4}))
    assert lm.generate_until(prompts, True) == fixed.generate_until(prompts, True)


@pytest.mark.parametrize("fails", [False, True])
def test_the_batch_size_is_as_before_after_a_generation(model, tokenizer, monkeypatch, fails):
    lm = RopeHFLM(model, tokenizer=tokenizer, batch_size="auto", max_batch_size=3)
    prompts = ask("generate_until", ("a cat", {"max_gen_toks": 4}))
    sizes = []

    def generate(self, context, **settings):
        sizes.append(self.batch_size)
        if fails:
            raise RuntimeError("out of memory")
        return context

    monkeypatch.setattr(HFLM, "_model_generate", generate)
    with pytest.raises(RuntimeError) if fails else nullcontext():
        lm.generate_until(prompts, True)

    assert sizes == [3]
    assert lm.batch_size == "auto"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "yarm", "factor": 4}, "Did you mean 'yarn'"),
        ({"factor": 4}, "factor given without a method"),
        ({"method": "yarn"}, "yarn needs factor"),
        ({"window": 65}, "window must be an integer from 1 to 64, in tokens, got 65"),
        ({"window": 32, "stride": 33}, "stride must be an integer from 1 to 32, in tokens"),
        ({"stride": 0}, "stride must be"),
        ({"peft": "adapter"}, "takes no peft"),
        ({"beta_fats": 16}, "takes no beta_fats"),
    ],
)
def test_a_wrong_argument_is_named(model, tokenizer, arguments, message):
    requests = ask("loglikelihood_rolling", (TEXT[:300],))
    with pytest.raises(RopeError, match=message):
        RopeHFLM(model, tokenizer=tokenizer, **arguments).loglikelihood_rolling(requests)


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_logits_in_chunks_are_the_logits(model, chunk):
    ids = torch.randint(0, 512, (2, 50))
    full = logits(model, ids).double().log_softmax(-1)
    where = torch.cartesian_prod(torch.arange(2), torch.arange(49))
    targets = ids[:, 1:].flatten()

    scores = score_tokens(model, ids, where, targets, chunk=chunk)

    rows, positions = where.unbind(1)
    assert torch.allclose(scores.log_probs, full[rows, positions, targets], atol=1e-5)
    assert torch.equal(scores.greedy, full[rows, positions].argmax(-1) == targets)


def test_no_more_logits_than_a_chunk_are_ever_made(model):
    made = []
    model.lm_head.register_forward_hook(lambda head, args, out: made.append(out.shape[:-1].numel()))
    ids = torch.randint(0, 512, (2, 50))
    where = torch.cartesian_prod(torch.arange(2), torch.arange(49))

    score_tokens(model, ids, where, ids[:, 1:].flatten(), chunk=7)

    assert max(made) == 7


@pytest.mark.parametrize(
    ("rows", "chunk", "at_most"), [(8, 6, 8), (8, 47, 47), (8, 48, 48), (1, 5, 5)]
)
def test_a_chunk_counts_the_rows_of_the_batch(model, rows, chunk, at_most):
    """Five scored positions and the last: fewer than a chunk in a row, but not in the batch."""
    made = []
    model.lm_head.register_forward_hook(lambda head, args, out: made.append(out.shape[:-1].numel()))
    ids = torch.randint(0, 512, (rows, 50))

    score_last(model, ids, 5, chunk=chunk)

    assert max(made) <= at_most
    assert (len(made) == 1) == (rows * 6 <= chunk)
