"""lm-eval on a patched model: `RopeHFLM`, which lm-eval knows as ``hf_rope``.

It is lm-eval's own ``HFLM`` and gives its numbers, but for what goes wrong with long requests:
those that do not fit raise instead of losing their beginning, logits are never held for a whole
sequence, and no row of a batch changes another.
"""

from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.models.utils_hf import pad_and_concat
from torch import Tensor, nn
from tqdm import tqdm  # type: ignore[import-untyped]

from hf_rope_ext.errors import RopeError, UnsupportedModelError
from hf_rope_ext.evals.lm_eval.arguments import base_of, require_effect, split
from hf_rope_ext.evals.lm_eval.windows import TokenRequest, Window
from hf_rope_ext.evals.scoring import score_tokens
from hf_rope_ext.patching.describe import Description, describe
from hf_rope_ext.patching.patch import patch_model
from hf_rope_ext.rotary.installed import patch_of
from hf_rope_ext.saving.adapters import load_adapter
from hf_rope_ext.saving.loading import read_config
from hf_rope_ext.saving.record import apply_record


@register_model("hf_rope")
class RopeHFLM(HFLM):  # type: ignore[misc]
    """lm-eval's ``HFLM`` around a model with an extended context.

    Args:
        pretrained: Directory or hub id of a model or of a PEFT adapter, or a model in memory. A
            patch recorded in its config or beside the adapter is applied.
        method: What to patch the model with, and with it any argument of `patch_model`: ``factor``,
            ``replace``, the method's knobs. A model in memory is patched in place. None leaves it
            as it is.
        truncation: Whether a request longer than the model is scored after its beginning is cut
            off, as lm-eval does. If not, it raises.
        window: Tokens of a window of a rolling log-likelihood, the model's length if None.
        stride: Tokens that are new in each of these windows, `window` if None.
        device: If None, a GPU if there is one.
        device_map: As in ``from_pretrained``.
        **kwargs: HFLM's own arguments (``tokenizer``, ``peft``, ``dtype``, ``batch_size``,
            ``max_length``...), and what is left ``from_pretrained``'s. A ``max_length`` beyond the
            model's is how one measures an unpatched model past its length.

    Raises:
        RopeError: If the model cannot be patched so, or an argument has no effect.
    """

    _model: Any
    _config: Any
    batch_size_per_gpu: Any

    def __init__(
        self,
        pretrained: str | Path | nn.Module,
        *,
        method: str | None = None,
        truncation: bool = False,
        window: int | None = None,
        stride: int | None = None,
        device: str | None = None,
        device_map: str | dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        patch, kwargs = split(method, kwargs)
        self._patch_arguments = patch
        self._window = Window(window, stride)
        self._cuts = bool(truncation)
        self._cut = 0
        if device_map is not None:
            kwargs.update(device_map=device_map, parallelize=True)
        if isinstance(pretrained, nn.Module):
            require_effect(kwargs)
        else:
            pretrained = str(pretrained)
            if (Path(pretrained) / "adapter_config.json").is_file():
                pretrained = base_of(pretrained, kwargs)
        if device is None or (device.startswith("cuda") and not torch.cuda.is_available()):
            device = "cuda" if torch.cuda.is_available() else "cpu"
        super().__init__(pretrained, device=device, **kwargs)
        if self.backend != "causal":
            raise RopeError("hf_rope evaluates causal language models; use lm-eval's hf for this.")
        if isinstance(pretrained, nn.Module):
            self._patch()
        if hasattr(self, "accelerator"):
            # HFLM splits requests over processes only where each has a GPU
            self._rank = self.accelerator.process_index
            self._world_size = self.accelerator.num_processes

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of whole texts, by windows of `window` and `stride` tokens."""
        windows: list[TokenRequest] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            found = self._window.cut(tokens, self.prefix_token_id, self.max_length)
            windows += found
            owners += [number] * len(found)
        totals = [0.0] * len(requests)
        answers = self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm)
        for number, (log_likelihood, _) in zip(owners, answers, strict=True):
            totals[number] += log_likelihood
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Return what the model writes after each prompt.

        Raises:
            RopeError: If a prompt and what may be generated do not fit, before anything runs.
        """
        lengths = [len(self.tok_encode(request.args[0])) for request in requests]
        limits = [
            normalize_gen_kwargs(request.args[1], self.max_gen_toks)["max_gen_toks"]
            for request in requests
        ]
        cut = 0
        for length, limit in zip(lengths, limits, strict=True):
            if limit >= self.max_length:
                raise RopeError(
                    f"{limit} tokens may be generated, but the model's length is "
                    f"{self.max_length}; pass a smaller max_gen_toks."
                )
            cut += self._exceeds(length, limit, "may be generated")
        self._count(cut)
        texts: list[str] = [""] * len(requests)
        for group, size in self._generated_together(requests, lengths, limits):
            given = self.batch_size_per_gpu
            self.batch_size_per_gpu = size
            try:
                found = super().generate_until(
                    [requests[number] for number in group],
                    disable_tqdm=disable_tqdm or len(group) < len(requests),
                )
            finally:
                self.batch_size_per_gpu = given
            for number, text in zip(group, found, strict=True):
                texts[number] = text
        return texts

    def _generated_together(
        self, requests: list[Any], lengths: list[int], limits: list[int]
    ) -> Iterator[tuple[list[int], int]]:
        """Yield numbers of requests and the size of their batches.

        Requests with a ``seed`` are samples of one prompt: they are one batch, so what is drawn
        depends on nothing else.
        """
        seeded: dict[str, list[int]] = {}
        free: list[int] = []
        for number, request in enumerate(requests):
            if "seed" in request.args[1]:
                seeded.setdefault(repr(request.args), []).append(number)
            else:
                free.append(number)
        for group in self._groups([lengths[number] for number in free]):
            numbers = [free[place] for place in group]
            longest = max(lengths[number] + limits[number] for number in numbers)
            yield numbers, self._rows(longest)
        for numbers in seeded.values():
            samples = requests[numbers[0]].repeats or len(numbers)
            for first in range(0, len(numbers), samples):
                yield numbers[first : first + samples], samples

    def _model_generate(self, context: Tensor, **settings: Any) -> Tensor:
        seed = settings.pop("seed", None)
        if seed is None:
            return super()._model_generate(context, **settings)  # type: ignore[no-any-return]
        devices = [context.device] if context.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            return super()._model_generate(context, **settings)  # type: ignore[no-any-return]

    def measured(self, requests: list[Any]) -> list[dict[str, Any]]:
        """Return what our tasks over a text measure with the model itself.

        Raises:
            RopeError: If a length is beyond the model's.
        """
        found = []
        for request in requests:
            _, length, run = request.args
            if length > self.max_length:
                raise RopeError(
                    f"a length of {length} was asked for, but the model's is {self.max_length}."
                )
            found.append(run(self.model, self._rows(length)))
        return found

    def get_model_info(self) -> dict[str, Any]:
        """Return lm-eval's information about a model, and what its RoPE computes."""
        rope = self._described()
        return {
            **super().get_model_info(),
            "rope": None if rope is None else rope.to_dict(),
            "hf_rope_ext": version("hf-rope-ext"),
            "truncated_requests": self._cut,
        }

    def _get_config(self, pretrained: str, *, gguf_file: str | None = None, **kwargs: Any) -> None:
        self._record = None
        if gguf_file is not None:
            super()._get_config(pretrained, gguf_file=gguf_file, **kwargs)
        else:
            self._config, self._record = read_config(pretrained, **kwargs)

    def _create_model(self, pretrained: str, *, peft: str | None = None, **kwargs: Any) -> None:
        if peft is not None and kwargs.get("delta") is not None:
            raise RopeError("peft and delta cannot both be given.")
        if self._record is not None:
            kwargs["config"] = self._config
        super()._create_model(pretrained, **kwargs)
        if self._record is not None:
            apply_record(self._model, self._record)
        if peft is not None:
            if len(self.tokenizer) > self._model.get_input_embeddings().num_embeddings:
                self._model.resize_token_embeddings(len(self.tokenizer))
            self._model = load_adapter(self._model, peft, revision=kwargs.get("revision"))
        if kwargs.get("device_map") is not None:
            self._device = self._model.device
        self._patch()

    def _get_accelerate_args(
        self, parallelize: bool | None = None, device_map: Any = None, **kwargs: Any
    ) -> dict[str, Any]:
        limited = kwargs.get("max_memory_per_gpu") or kwargs.get("max_cpu_memory")
        if device_map is None or limited:
            found: dict[str, Any] = super()._get_accelerate_args(parallelize, device_map, **kwargs)
            return found
        return {"device_map": device_map, "offload_folder": kwargs.get("offload_folder")}

    def _patch(self) -> None:
        if self._patch_arguments:
            patch_model(self._model, **self._patch_arguments)

    def _described(self) -> Description | None:
        try:
            return describe(self._model)
        except UnsupportedModelError:
            return None

    def _loglikelihood_tokens(
        self,
        requests: Sequence[TokenRequest],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """Return log-likelihoods of continuations, and whether greedy decoding writes them."""
        sharing = self._inputs(requests)
        inputs = sorted(sharing, key=len, reverse=True)
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        bar = tqdm(
            total=len(requests),
            disable=disable_tqdm or self.rank != 0,
            desc="Running loglikelihood requests",
        )
        for rows in self._batches(inputs, override_bs):
            numbers = [sharing[row] for row in rows]
            for number, answer in self._score(rows, numbers, requests):
                answers[number] = answer
                if requests[number][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[number][0], answer)
                bar.update()
        bar.close()
        return answers

    def _inputs(self, requests: Sequence[TokenRequest]) -> dict[tuple[int, ...], list[int]]:
        """Return the distinct inputs, all of a request but its last token, and whose they are."""
        sharing: dict[tuple[int, ...], list[int]] = {}
        cut = 0
        for number, (_, context, continuation) in enumerate(requests):
            if len(continuation) > self.max_length:
                raise RopeError(
                    f"a continuation of {len(continuation)} tokens is longer than the model's "
                    f"length of {self.max_length}."
                )
            cut += self._exceeds(len(context) + len(continuation) - 1, 0, "are scored")
            tokens = (context + continuation)[-self.max_length - 1 : -1]
            sharing.setdefault(tuple(tokens), []).append(number)
        self._count(cut)
        return sharing

    def _batches(
        self, inputs: list[tuple[int, ...]], size: int | None
    ) -> Iterator[list[tuple[int, ...]]]:
        for group in self._groups([len(row) for row in inputs]):
            rows = size or self._rows(len(inputs[group[0]]))
            for first in range(0, len(group), rows):
                yield [inputs[number] for number in group[first : first + rows]]

    def _score(
        self,
        rows: list[tuple[int, ...]],
        numbers: list[list[int]],
        requests: Sequence[TokenRequest],
    ) -> Iterator[tuple[int, tuple[float, bool]]]:
        """Yield the number of each request that shares one of these inputs, and its answer."""
        where: list[tuple[int, int]] = []
        targets: list[int] = []
        spans: list[tuple[int, int]] = []
        for row, (tokens, owners) in enumerate(zip(rows, numbers, strict=True)):
            for number in owners:
                continuation = requests[number][2]
                first = len(tokens) - len(continuation)
                spans.append((number, len(targets)))
                where += [(row, first + offset) for offset in range(len(continuation))]
                targets += continuation
        scores = self._forward(rows, torch.tensor(where), torch.tensor(targets))
        for number, start in spans:
            span = slice(start, start + len(requests[number][2]))
            answer = (float(scores.log_probs[span].sum()), bool(scores.greedy[span].all()))
            yield number, answer

    def _forward(self, rows: Sequence[Sequence[int]], where: Tensor, targets: Tensor) -> Any:
        tensors = [torch.tensor(row, dtype=torch.long, device=self.device) for row in rows]
        with torch.autocast(
            device_type=self.device.type,
            dtype=self.mixed_precision_dtype,
            enabled=self.mixed_precision_dtype is not None,
        ):
            return score_tokens(
                self.model,
                pad_and_concat(max(map(len, rows)), tensors, padding_side="right"),
                where,
                targets,
                dtype=self.softmax_dtype or torch.float32,
            )

    def _groups(self, lengths: list[int]) -> list[list[int]]:
        """Return numbers of requests that may share a batch, longest first.

        Where the frequencies follow the length of a request, that is those of the same length:
        padding then plays no part.
        """
        order = sorted(range(len(lengths)), key=lambda number: -lengths[number])
        if not order or not self._length_dependent():
            return [order] if order else []
        groups: dict[int, list[int]] = {}
        for number in order:
            groups.setdefault(lengths[number], []).append(number)
        return list(groups.values())

    def _length_dependent(self) -> bool:
        patch = patch_of(self.model)
        if patch is not None:
            return patch.method.length_dependent
        rope = self._described()
        sites = () if rope is None else rope.sites
        return any(site.scaling in ("dynamic", "longrope") for site in sites)

    def _rows(self, length: int) -> int:
        """Return the batch size, found by trying where it is ``"auto"``."""
        if self.batch_size != "auto":
            return int(self.batch_size)
        if length not in self.batch_sizes:
            self.batch_sizes[length] = self._largest_batch(length)
        return int(self.batch_sizes[length])

    def _largest_batch(self, length: int) -> int:
        from accelerate import find_executable_batch_size

        @find_executable_batch_size(starting_batch_size=self.max_batch_size)  # type: ignore[untyped-decorator]
        def try_rows(rows: int) -> int:
            last = torch.tensor([[row, length - 1] for row in range(rows)])
            self._forward([[0] * length] * rows, last, torch.zeros(rows, dtype=torch.long))
            return rows

        return int(self.all_gather(torch.tensor([try_rows()], device=self.device)).min())

    def _exceeds(self, tokens: int, more: int, what: str) -> bool:
        """Return whether a request will be cut.

        Raises:
            RopeError: If it is too long and must not be cut.
        """
        total = tokens + more
        if total <= self.max_length:
            return False
        if self._cuts:
            return True
        parts = f"{tokens} tokens" + (f", and {more} {what}" if more else "")
        stretch = total / self.max_length
        raise RopeError(
            f"a request has {parts}, but the model's length is {self.max_length}: lm-eval would "
            f"score it with its beginning cut off. Patch the model to reach {stretch:.3g} times "
            f"as far (--model_args method=yarn,factor=4), ask for shorter requests, or pass "
            f"max_length to measure it beyond its length, or truncation=True to have them cut."
        )

    def _count(self, cut: int) -> None:
        """Add to the number of requests cut, over all processes."""
        if self._cuts:
            self._cut += int(self.all_gather(torch.tensor([cut], device=self.device)).sum())
