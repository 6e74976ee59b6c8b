"""The chunked loss against the loss that transformers computes from all logits."""

import contextlib
import inspect

import pytest
import torch
import zoo
from conftest import tiny_llama
from finetuning import byte_tokenizer
from peft import LoraConfig, get_peft_model
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from hf_rope_ext import RopeError
from hf_rope_ext.finetune import chunked_loss
from hf_rope_ext.finetune.evaluation import Evaluation
from hf_rope_ext.finetune.loss import chunked_cross_entropy, linear_cross_entropy


def labels_of(ids):
    labels = ids.clone()
    labels[0, :17] = -100
    return labels


def step(model, ids, **arguments):
    """The loss and the gradients of every trained weight."""
    model.zero_grad()
    loss = model(ids, labels=labels_of(ids), use_cache=False, **arguments).loss
    loss.backward()
    return loss.detach(), {
        name: weight.grad.clone()
        for name, weight in model.named_parameters()
        if weight.grad is not None
    }


def assert_same_step(model, ids, **arguments):
    loss, grads = step(model, ids, **arguments)
    with chunked_loss(model, 7):
        found, found_grads = step(model, ids, **arguments)

    torch.testing.assert_close(found, loss, rtol=1e-5, atol=0.0)
    assert found_grads.keys() == grads.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(found_grads[name], grad, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("items", [None, torch.tensor(91), 91])
def test_loss_and_gradients_are_those_of_the_full_logits(ids, tied, items):
    assert_same_step(tiny_llama(tie_word_embeddings=tied), ids, num_items_in_batch=items)


@pytest.mark.parametrize("tied", [False, True])
def test_mixed_precision_trains_as_before(ids, tied):
    """Under autocast the head's weight is cast once and the cast kept for every chunk."""
    model = tiny_llama(tie_word_embeddings=tied)

    def mixed():
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(ids, labels=labels_of(ids), use_cache=False).loss
        loss.backward()
        return loss.detach(), torch.cat([weight.grad.flatten() for weight in model.parameters()])

    loss, grad = mixed()
    with chunked_loss(model, 7):
        found, found_grad = mixed()

    torch.testing.assert_close(found, loss, rtol=1e-4, atol=0.0)
    assert (found_grad - grad).norm() < 1e-2 * grad.norm()
    assert all(weight.grad.dtype == torch.float32 for weight in model.parameters())


def test_a_batch_with_nothing_to_predict_adds_nothing(ids):
    model = tiny_llama()
    with chunked_loss(model, 7):
        labels = torch.full_like(ids, -100)
        loss = model(ids, labels=labels, num_items_in_batch=torch.tensor(5), use_cache=False).loss
        loss.backward()

    assert float(loss.detach()) == 0.0
    assert all(not weight.grad.any() for weight in model.parameters() if weight.grad is not None)


@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "lm_head"]])
def test_a_frozen_and_an_adapted_head_train_as_before(ids, targets):
    torch.manual_seed(1)
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=targets))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)

    assert_same_step(model, ids)


# soft caps, scales and biases between the body and the loss are the family's own
@pytest.mark.parametrize(
    "model_type", ["gemma2", "granite", "cohere", "llama4_text", "mixtral", "gpt_neox"]
)
def test_what_a_family_does_to_its_logits_is_done(model_type):
    model = zoo.build(model_type).float()
    ids = torch.randint(3, 60, (2, 40), generator=torch.Generator().manual_seed(0))

    assert_same_step(model, ids)


def test_labels_can_come_shifted(ids):
    model = tiny_llama()
    with chunked_loss(model, 13), torch.no_grad():
        found = model(ids, labels=ids, shift_labels=ids.roll(-1, dims=1)).loss

    torch.testing.assert_close(
        found, model(ids, labels=ids, shift_labels=ids.roll(-1, dims=1)).loss, rtol=1e-5, atol=0.0
    )


def test_without_torchs_own_function_the_head_is_called(ids, monkeypatch):
    """Before torch 2.13."""
    monkeypatch.delattr(functional, "linear_cross_entropy")
    model = tiny_llama()
    expected = model(ids, labels=ids).loss

    with chunked_loss(model, 13):
        found = model(ids, labels=ids).loss

    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0.0)


@pytest.fixture
def bypass(monkeypatch):
    """The vocabularies of the heads that torch's own function has computed."""
    seen, plain = [], functional.linear_cross_entropy

    def watched(hidden, weight, *args, **kwargs):
        assert hidden.dtype == weight.dtype == torch.float32
        seen.append(len(weight))
        return plain(hidden, weight, *args, **kwargs)

    monkeypatch.setattr(functional, "linear_cross_entropy", watched)
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("model_type", "plain"),
    [("llama", True), ("gpt_neox", True), ("gemma2", False), ("cohere", False), ("granite", False)],
)
def test_only_a_head_that_is_one_linear_map_is_left_to_torch(bypass, model_type, plain, dtype):
    model = zoo.build(model_type).to(dtype)
    # of granite and cohere; in the zoo both are 1, which is no scale
    model.config.logits_scaling = model.logit_scale = 0.5
    ids = torch.randint(3, 60, (2, 40), generator=torch.Generator().manual_seed(0))
    with chunked_loss(model, 7):
        model(ids, labels=ids, use_cache=False).loss.backward()

    assert bool(bypass) == plain


def test_a_head_with_a_bias_is_left_to_torch_with_it(bypass, ids):
    model = tiny_llama()
    model.lm_head = torch.nn.Linear(64, 128)
    torch.nn.init.normal_(model.lm_head.bias)

    assert_same_step(model, ids)
    assert bypass


@pytest.mark.parametrize("obstacle", ["adapter", "hook", "pre-hook", "autocast", "own forward"])
def test_a_head_that_must_be_called_is_called(bypass, ids, obstacle):
    model, calls = tiny_llama(), []
    if obstacle == "adapter":
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["lm_head"]))
    elif obstacle == "hook":
        model.lm_head.register_forward_hook(lambda *args: calls.append(args))
    elif obstacle == "pre-hook":
        model.lm_head.register_forward_pre_hook(lambda *args: calls.append(args))
    elif obstacle == "own forward":
        model.lm_head.forward = type(model.lm_head).forward.__get__(model.lm_head)
    mixed = torch.autocast("cpu", torch.bfloat16, enabled=obstacle == "autocast")
    with mixed, chunked_loss(model, 7):
        model(ids, labels=ids, use_cache=False).loss.backward()

    assert not bypass


def test_a_soft_cap_is_noticed_when_it_hardly_changes_the_logits(bypass, ids):
    """At a cap of a power of two, small logits come out of it as they went in."""
    model = zoo.build("gemma2").float()
    model.config.final_logit_softcapping = 2.0**20
    with chunked_loss(model, 7):
        model(ids % 60 + 3, labels=ids % 60 + 3, use_cache=False)

    assert not bypass


def test_bfloat16_gradients_of_the_head_are_summed_over_chunks_in_float32():
    """Summed in bfloat16, 512 chunks of one token would lose most of what each adds."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(512, 16, generator=generator).bfloat16()
    hidden = (hidden + 4).requires_grad_()
    labels = torch.zeros(512, dtype=torch.int64)
    errors = {}
    for name, loss in (("calls", call_head), ("torch", linear_cross_entropy)):
        head = torch.nn.Linear(16, 8, bias=False, dtype=torch.bfloat16)
        torch.nn.init.zeros_(head.weight)
        exact = torch.nn.Linear(16, 8, bias=False, dtype=torch.float64)
        exact.load_state_dict(head.state_dict())
        loss(hidden, labels, head, 1).backward()
        functional.cross_entropy(exact(hidden.double()), labels, reduction="sum").backward()
        distance = (head.weight.grad.double() - exact.weight.grad).norm()
        errors[name] = float(distance / exact.weight.grad.norm())

    # one rounding to bfloat16 at the end is up to 2 ** -9; a bfloat16 sum is off by over 0.1
    assert max(errors.values()) < 2**-8, errors


def call_head(hidden, labels, head, chunk):
    return chunked_cross_entropy(hidden, labels, head, (head.weight,), chunk)


@pytest.mark.parametrize("fails", [False, True])
def test_the_probe_and_the_evaluation_leave_each_module_in_its_mode(ids, monkeypatch, fails):
    model = tiny_llama().train()
    model.model.layers[0].eval()  # a frozen part that its owner keeps so
    before = [module.training for module in model.modules()]
    modes = set()
    model.register_forward_pre_hook(lambda module, args: modes.add(module.training))
    evaluation = Evaluation.on(
        ids.flatten(), byte_tokenizer(), (64,), windows=2, targets=8, passkeys=0
    )
    if fails:
        monkeypatch.setattr(model.model, "forward", lambda *args, **kwargs: 1 / 0)
    for step in (lambda: evaluation.measure(model), lambda: chunked_loss(model).__enter__()):
        with contextlib.suppress(ZeroDivisionError):
            step()

        assert [module.training for module in model.modules()] == before
    assert modes == {False}


class Largest(TorchDispatchMode):
    """Remembers the size of the largest tensor made."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, tuple | list) else [out]:
            if isinstance(one, torch.Tensor):
                self.numbers = max(self.numbers, one.numel())
        return out


def test_the_head_runs_once_for_each_chunk(ids):
    """Checkpointing would run it again in the backward pass."""
    model = tiny_llama()
    seen = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[1]))
    with chunked_loss(model, 150, probe=False):
        model(ids, labels=ids, use_cache=False).loss.backward()

    rows = ids.shape[0] * (ids.shape[1] - 1)
    assert [count for count in seen if count] == [150, 150, rows - 300]


def test_no_tensor_is_as_large_as_the_logits():
    model = tiny_llama(vocab_size=4000, num_attention_heads=2, num_key_value_heads=1)
    model.lm_head.requires_grad_(False)
    model.model.embed_tokens.requires_grad_(False)
    ids = torch.randint(0, 4000, (1, 256))
    with Largest() as plain:
        model(ids, labels=ids, use_cache=False).loss.backward()
    with chunked_loss(model, 16), Largest() as chunked:
        model(ids, labels=ids, use_cache=False).loss.backward()

    assert plain.numbers == 256 * 4000
    # the weight of the head itself is the largest that is left
    assert chunked.numbers == model.lm_head.weight.numel()


def test_a_model_that_computes_more_than_a_cross_entropy_is_refused():
    model = tiny_llama()
    plain = model.loss_function
    model.loss_function = lambda **kwargs: plain(**kwargs) + 1

    with pytest.raises(RopeError, match="more than a cross-entropy"), chunked_loss(model):
        pass
    assert "forward" not in vars(model)


def test_router_losses_are_not_dropped():
    model = zoo.build("mixtral").float()
    model.config.output_router_logits = True

    with pytest.raises(RopeError, match="a loss of its own"), chunked_loss(model):
        pass


@pytest.mark.parametrize("chunk", [0, -1, 2.5, True])
def test_a_chunk_is_a_number_of_tokens(llama, chunk):
    message = "the loss's chunk must be an integer of at least 1, in tokens, got"
    with pytest.raises(RopeError, match=message), chunked_loss(llama, chunk):
        pass


def test_a_plain_trainer_sees_the_same_arguments(llama):
    """Trainer drops the columns that a forward does not name, input_ids among them."""
    plain = inspect.signature(llama.forward)
    with chunked_loss(llama):
        assert inspect.signature(llama.forward) == plain


def test_the_forward_is_put_back_and_not_replaced_twice(llama, ids):
    with chunked_loss(llama):
        with pytest.raises(RopeError, match="already replaced"), chunked_loss(llama):
            pass
        assert llama(ids, labels=ids).logits.shape[1] == 0
        assert llama(ids).logits.shape[1] == ids.shape[1]
    assert llama(ids, labels=ids).logits.shape[1] == ids.shape[1]


def test_half_precision_gradients_do_not_underflow(ids):
    """A mean over many tokens in float16 would be 0; the sum is scaled afterwards."""
    model = tiny_llama(hidden_size=64).to(torch.bfloat16)
    loss, grads = step(model, ids)
    with chunked_loss(model, 50):
        found, found_grads = step(model, ids)

    torch.testing.assert_close(found, loss, rtol=2e-2, atol=0.0)
    norm = torch.stack([grad.float().norm() for grad in grads.values()]).norm()
    distance = torch.stack(
        [(found_grads[name] - grad).float().norm() for name, grad in grads.items()]
    ).norm()
    assert distance < 0.02 * norm
