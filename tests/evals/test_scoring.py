"""Scores of tokens, however few positions get logits at once."""

import inspect
from types import SimpleNamespace

import pytest
import torch
import zoo
from conftest import logits, tiny_llama
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaForCausalLM

from hf_rope_ext.evals import scoring
from hf_rope_ext.evals.scoring import keeps_logits, score_last, score_tokens

WHERE = torch.tensor([[1, 3], [0, 30], [2, 11], [0, 4], [1, 39], [2, 20], [0, 39]])
WANTED = torch.tensor([5, 17, 99, 3, 64, 127, 0])


@pytest.fixture
def rows():
    return torch.randint(0, 128, (3, 40), generator=torch.Generator().manual_seed(0))


class AllLogits(nn.Module):
    """A model that is not transformers' and always returns all logits."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.mix = nn.Embedding(128, 16), nn.GRU(16, 16, batch_first=True)
        self.head = nn.Linear(16, 128)

    def forward(self, input_ids, use_cache):
        assert use_cache is False
        return SimpleNamespace(logits=self.head(self.mix(self.embed(input_ids))[0]))


def count_head(model):
    """Sizes of what the head is run on."""
    seen = []
    model.get_output_embeddings().register_forward_pre_hook(
        lambda module, inputs: seen.append(inputs[0].shape[:2].numel())
    )
    return seen


@pytest.mark.parametrize(
    ("kind", "chunk"),
    [
        *(("llama", chunk) for chunk in (None, 1, 2, 7, 1000)),
        *((kind, chunk) for kind in ("wrapped", "gemma2", "all logits") for chunk in (None, 3)),
    ],
)
def test_scores_are_those_of_the_full_logits(rows, chunk, kind):
    rows = rows % 60
    if kind == "gemma2":
        model = zoo.build("gemma2").float()
    elif kind == "wrapped":
        model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    else:
        model = tiny_llama() if kind == "llama" else AllLogits()
    wanted = WANTED % 60
    with torch.no_grad():
        full = model(input_ids=rows, use_cache=False).logits[WHERE[:, 0], WHERE[:, 1]]

    found = score_tokens(model, rows, WHERE, wanted, chunk=chunk)

    expected = torch.log_softmax(full.double(), -1)
    assert found.log_probs.dtype == torch.float64
    torch.testing.assert_close(
        found.log_probs, expected.gather(-1, wanted[:, None])[:, 0], rtol=1e-5, atol=1e-5
    )
    assert found.greedy.tolist() == (full.argmax(-1) == wanted).tolist()
    best = score_tokens(model, rows, WHERE, full.argmax(-1), chunk=chunk)
    assert best.greedy.all()


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("chunk", [9, 12, 13, 39])
def test_no_more_positions_than_a_chunk_get_logits_at_once_whatever_the_batch(rows, batch, chunk):
    model, rows = tiny_llama(), rows[:batch]
    seen = count_head(model)

    score_last(model, rows, 12, chunk)

    whole = 13 * batch  # logits of the scored positions and the last
    if whole <= chunk:
        assert seen == [whole]
    else:
        # the decoder runs once, for a single position of each row
        assert seen[0] == batch
        assert seen[1:] == [min(chunk, 12 * batch - at) for at in range(0, 12 * batch, chunk)]


def test_a_chunk_follows_from_the_vocabulary(rows, monkeypatch):
    model = tiny_llama()
    for at_once, size in ((128 * 20, 20), (128 * 20 + 127, 20), (1, 16)):
        monkeypatch.setattr(scoring, "LOGITS_AT_ONCE", at_once)
        seen = count_head(model)
        score_last(model, rows, 12)
        assert seen[1] == size
    monkeypatch.undo()
    seen = count_head(model)
    score_last(model, rows, 12)
    assert seen == [39]


def test_a_model_that_ends_in_no_hidden_states_is_run_whole(rows):
    model = tiny_llama()
    expected = score_last(model, rows, 12)
    stock, seen = model.model.forward, count_head(model)

    class Renamed:
        def __init__(self, output):
            self.output = output

        def __getattr__(self, name):
            if name == "last_hidden_state" and inspect.stack()[1].function == "keep":
                raise AttributeError
            return getattr(self.output, name)

    model.model.forward = lambda *args, **kwargs: Renamed(stock(*args, **kwargs))
    found = score_last(model, rows, 12, 5)

    assert seen == [3, 39]
    torch.testing.assert_close(found.log_probs, expected.log_probs, rtol=1e-5, atol=1e-5)


def test_the_softmax_is_taken_in_the_dtype_asked_for(rows):
    model = tiny_llama().to(torch.bfloat16)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        found = score_tokens(model, rows, WHERE, WANTED, dtype=dtype)
        full = logits(model, rows)[WHERE[:, 0], WHERE[:, 1]].to(dtype)
        expected = full.gather(-1, WANTED[:, None])[:, 0].double() - full.logsumexp(-1).double()
        torch.testing.assert_close(found.log_probs, expected, rtol=0, atol=0)
    default = score_tokens(model, rows, WHERE, WANTED).log_probs
    assert torch.equal(
        default, score_tokens(model, rows, WHERE, WANTED, dtype=torch.float32).log_probs
    )


@pytest.mark.parametrize("chunk", [None, 5])
def test_further_inputs_reach_the_model(rows, chunk):
    model = tiny_llama()
    mask = torch.ones_like(rows)
    mask[:, :10] = 0

    found = score_last(model, rows, 8, chunk, attention_mask=mask)

    full = torch.log_softmax(logits(model, rows, attention_mask=mask)[:, -9:-1].double(), -1)
    expected = full.gather(-1, rows[:, -8:, None])[..., 0]
    torch.testing.assert_close(found.log_probs, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found.log_probs, score_last(model, rows, 8, chunk).log_probs)


@pytest.mark.parametrize("chunk", [None, 5])
def test_scoring_leaves_no_hook_and_no_gradient(rows, chunk):
    model = tiny_llama()
    found = score_last(model, rows, 8, chunk)

    assert not any(part._forward_hooks for part in model.modules())
    assert not found.log_probs.requires_grad
    assert found.log_probs.shape == found.greedy.shape == (3, 8)


class Curious(LlamaForCausalLM):
    """A model whose forward looks at its input and at its decoder."""

    def forward(self, input_ids=None, use_cache=None, logits_to_keep=0, **inputs):
        assert use_cache is False  # nobody needs the keys
        output = self.model(input_ids=input_ids, use_cache=use_cache, **inputs)
        hidden = output.last_hidden_state[:, -logits_to_keep:]
        scale = len(self.model.layers) * (1 + (input_ids.shape[1] == 40))
        return SimpleNamespace(logits=self.lm_head(hidden) * scale)


@pytest.mark.parametrize("chunk", [None, 5])
def test_a_forward_sees_its_input_and_its_decoder_as_ever(rows, chunk):
    model = Curious(tiny_llama().config).eval()
    with torch.no_grad():
        full = torch.log_softmax(model(rows, use_cache=False).logits[:, -9:-1].double(), -1)

    found = score_last(model, rows, 8, chunk)

    expected = full.gather(-1, rows[:, -8:, None])[..., 0]
    torch.testing.assert_close(found.log_probs, expected, rtol=1e-5, atol=1e-5)


def test_logits_at_once_take_32_mib():
    assert scoring.LOGITS_AT_ONCE * torch.float32.itemsize == 32 * 2**20


def test_only_a_head_can_leave_out_logits():
    assert keeps_logits(tiny_llama())
    assert keeps_logits(nn.Sequential(tiny_llama()))
    assert not keeps_logits(AllLogits())
