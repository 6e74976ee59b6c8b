"""Cross-entropy over the vocabulary, a chunk of tokens at a time.

The logits of a long sequence are its largest tensor: 18.5 GiB in float32 for 32,768 tokens and a
vocabulary of 152k, and as much again for their gradient. Here the head runs on one chunk of tokens
at a time, the gradient is computed at once, and the logits are freed before the next chunk. Only
the gradient of the hidden states is kept for the backward pass, so nothing is computed twice.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hf_rope_ext.checks import require_integer
from hf_rope_ext.errors import RopeError
from hf_rope_ext.finetune.evaluation import eval_mode

IGNORED = -100
"""The label of a token that is not predicted, as in transformers."""

Head = Callable[[Tensor], Tensor]


class _HeadLoss(torch.autograd.Function):
    """The summed cross-entropy of all tokens, with gradients computed chunk by chunk.

    The sum rather than the mean, so that gradients kept in float16 until the backward pass do not
    underflow; the division and the gradient scaler come later.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, labels: Tensor, chunk: int, head: Head, *weights: Tensor
    ) -> Tensor:
        needs_hidden = bool(ctx.needs_input_grad[0])
        hidden_grad = torch.empty_like(hidden) if needs_hidden else None
        # chunks are summed in float32: bfloat16 would lose small addends
        weight_grads = [torch.zeros_like(weight, dtype=torch.float32) for weight in weights]
        total = hidden.new_zeros((), dtype=torch.float32)
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            with torch.enable_grad():
                part = hidden[rows].detach().requires_grad_(needs_hidden)
                logits = head(part[None])[0]
            loss, grad = _loss_and_grad(logits.detach(), labels[rows])
            inputs = [part] * needs_hidden + list(weights)
            grads = list(torch.autograd.grad(logits, inputs, grad)) if inputs else []
            if hidden_grad is not None:
                hidden_grad[rows] = grads.pop(0)
            for accumulated, grad in zip(weight_grads, grads, strict=True):
                accumulated += grad
            total += loss
        ctx.save_for_backward(
            hidden_grad,
            *(grad.to(weight.dtype) for grad, weight in zip(weight_grads, weights, strict=True)),
        )
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (scale,) = grads
        hidden, *weights = (
            None if grad is None else (grad * scale).to(grad.dtype) for grad in ctx.saved_tensors
        )
        return hidden, None, None, None, *weights


def chunked_cross_entropy(
    hidden: Tensor, labels: Tensor, head: Head, weights: Sequence[Tensor] = (), chunk: int = 512
) -> Tensor:
    """Return the summed cross-entropy of tokens without ever holding all their logits.

    Args:
        hidden: Input of the head, ``(tokens, width)``.
        labels: ``(tokens,)``.
        head: Maps ``(1, tokens, width)`` to logits, ``(1, tokens, vocabulary)``.
        weights: The head's parameters.
        chunk: Tokens per chunk.

    Returns:
        float32, a scalar.
    """
    if not torch.is_grad_enabled():
        hidden, weights = hidden.detach(), ()
    trained = [weight for weight in weights if weight.requires_grad]
    apply: Any = _HeadLoss.apply
    loss: Tensor = apply(hidden, labels, chunk, head, *trained)
    return loss


def linear_cross_entropy(hidden: Tensor, labels: Tensor, head: nn.Linear, chunk: int) -> Tensor:
    """Return the same for a head that is one linear map, by torch's own chunked function.

    In float32, because torch rounds the loss, and sums the gradient of the weight over the chunks,
    in the dtype of its input.
    """
    return functional.linear_cross_entropy(
        hidden.float(),
        head.weight.float(),
        labels,
        linear_bias=None if head.bias is None else head.bias.float(),
        reduction="sum",
        options=nn.LinearCrossEntropyOptions(batch_chunk_size=chunk),
    )


@contextmanager
def chunked_loss(model: nn.Module, chunk: int = 512, *, probe: bool = True) -> Iterator[None]:
    """Make a causal language model compute its loss without its logits for a ``with`` block.

    The family's own ``forward`` is called first for the hidden states alone, and then on each chunk
    with a stand-in for the body that returns the chunk, so that soft caps and scales of the logits
    are the family's own. A head that proves to be one linear map is left to
    `torch.nn.functional.linear_cross_entropy`. Calls without labels are left alone.

    Args:
        model: A causal language model or the PEFT model around it.
        chunk: Tokens whose logits are in memory at once.
        probe: Whether to check first, on a few tokens, that the loss equals the model's own.

    Raises:
        RopeError: If it does not.
    """
    causal = find_causal_model(model)
    if "forward" in vars(causal):
        raise RopeError(f"the forward of {type(causal).__name__} is already replaced.")
    require_integer("the loss's chunk", chunk, 1, unit="tokens")
    forward = _ChunkedForward(causal, chunk)
    if probe:
        _probe(causal, forward)
    causal.forward = forward
    try:
        yield
    finally:
        del causal.forward


def find_causal_model(model: nn.Module) -> Any:
    """Return the transformers model with the language model head inside any wrappers.

    Raises:
        RopeError: If there is none.
    """
    from transformers import PreTrainedModel

    for module in model.modules():
        if isinstance(module, PreTrainedModel) and module.get_output_embeddings() is not None:
            return module
    raise RopeError(f"{type(model).__name__} has no language model head.")


def _find_body_name(causal: nn.Module) -> str:
    """Return the attribute of a causal language model that holds the model below its head."""
    from transformers import PreTrainedModel

    for name, child in causal.named_children():
        if isinstance(child, PreTrainedModel):
            return name
    raise RopeError(f"{type(causal).__name__} has no model below its head; use loss='plain'.")


class _ChunkedForward:
    """The forward of a causal language model that computes its loss chunk by chunk."""

    def __init__(self, causal: Any, chunk: int) -> None:
        self.causal = causal
        self.chunk = chunk
        self.linear: bool | None = None
        # Trainer drops the columns of a dataset that a forward does not name
        self.__signature__ = inspect.signature(causal.forward)

    def __call__(
        self,
        *args: Any,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Return the family's output; with labels it has a loss and no logits."""
        plain = type(self.causal).forward
        if shift_labels is None:
            if labels is None:
                return plain(self.causal, *args, **kwargs)
            shift_labels = functional.pad(labels, (0, 1), value=IGNORED)[..., 1:]
        bodies: list[Any] = []
        body = getattr(self.causal, _find_body_name(self.causal))
        hook = body.register_forward_hook(lambda module, inputs, output: bodies.append(output))
        try:
            none = torch.empty(0, dtype=torch.int64, device=shift_labels.device)
            # return_dict: the head is read from a body's output by name
            output = plain(
                self.causal, *args, **{**kwargs, "logits_to_keep": none, "return_dict": True}
            )
        finally:
            hook.remove()
        if getattr(output, "aux_loss", None) is not None:
            raise RopeError(
                f"{type(self.causal).__name__} adds a loss of its own to the cross-entropy "
                f"(output_router_logits); use loss='plain'."
            )
        hidden = bodies[0].last_hidden_state
        labels = shift_labels.to(hidden.device).reshape(-1)
        kept = labels != IGNORED
        total = self._sum_losses(hidden.flatten(0, -2)[kept], labels[kept], type(bodies[0]))
        count = kept.sum() if num_items_in_batch is None else num_items_in_batch
        output["loss"] = total / (count.to(total.device) if isinstance(count, Tensor) else count)
        return output

    def _sum_losses(self, hidden: Tensor, labels: Tensor, output: type[Any]) -> Tensor:
        call = _make_head(self.causal, output)
        head = self.causal.get_output_embeddings()
        can_bypass = _can_bypass(head)
        if can_bypass and self.linear is None:
            # large inputs, because a soft cap hardly changes small logits
            sample = torch.linspace(-1000, 1000, hidden.shape[-1]).to(head.weight)[None]
            with torch.no_grad():
                expected = functional.linear(sample, head.weight, head.bias)
                self.linear = torch.equal(call(sample[None])[0], expected)
        if can_bypass and self.linear:
            return linear_cross_entropy(hidden, labels, head, self.chunk)
        return chunked_cross_entropy(hidden, labels, call, tuple(head.parameters()), self.chunk)


def _can_bypass(head: nn.Module) -> bool:
    """Return whether a head can be computed from its weight, without a call.

    Hooks and subclasses gather, dequantize or adapt weights in the call, and autocast chooses its
    dtype there. Elsewhere than on CPUs, float32 would slow half precision down.
    """
    return (
        hasattr(functional, "linear_cross_entropy")  # of torch 2.13
        and type(head) is nn.Linear
        and type(head.weight) is nn.Parameter
        and not (head._forward_hooks or head._forward_pre_hooks or "forward" in vars(head))
        and not torch.is_autocast_enabled(head.weight.device.type)
        and (head.weight.dtype == torch.float32 or head.weight.device.type == "cpu")
    )


def _make_head(causal: Any, output: type[Any]) -> Head:
    """Return the part of a family's forward that follows its body."""

    def head(hidden: Tensor) -> Tensor:
        stand_in = _StandIn(causal, lambda *args, **kwargs: output(last_hidden_state=hidden))
        logits: Tensor = type(causal).forward(stand_in, input_ids=None, return_dict=True).logits
        return logits

    return head


class _StandIn:
    """A causal language model whose body is replaced."""

    def __init__(self, causal: Any, body: Callable[..., Any]) -> None:
        self.__dict__ |= {"causal": causal, _find_body_name(causal): body}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["causal"], name)


def _loss_and_grad(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the summed cross-entropy and its gradient, softmax minus one-hot.

    By hand, because autograd keeps four tensors of the logits' size for it; here it is one.
    """
    scores = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
    places = labels[:, None]
    loss = -scores.gather(1, places).sum()
    grad = scores.exp_().scatter_add_(1, places, scores.new_full((len(labels), 1), -1))
    return loss, grad.to(logits.dtype)


@torch.no_grad()
def _probe(causal: Any, forward: _ChunkedForward) -> None:
    """Check on a few tokens that the loss is the one the model itself computes."""
    weight = next(causal.parameters())
    vocabulary = causal.get_output_embeddings().weight.shape[0]
    ids = torch.arange(1, 9, device=weight.device)[None] * 7919 % max(vocabulary // 2, 2)
    chunk, forward.chunk = forward.chunk, 3
    try:
        with eval_mode(causal):
            own = type(causal).forward(causal, input_ids=ids, labels=ids, use_cache=False).loss
            chunked = forward(input_ids=ids, labels=ids, use_cache=False).loss
    finally:
        forward.chunk = chunk
    rounding = 1e-4 if weight.dtype == torch.float32 else 2e-2
    if not torch.allclose(chunked.float(), own.float(), rtol=rounding, atol=rounding):
        raise RopeError(
            f"the chunked loss of {type(causal).__name__} is {float(chunked):.6g}, but its own is "
            f"{float(own):.6g}: the family computes more than a cross-entropy of its logits. "
            f"Nothing was changed; use loss='plain'."
        )
