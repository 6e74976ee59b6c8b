"""lm-eval on a patched model: `RopeHFLM`, registered as ``hf_rope``.

It is lm-eval's ``HFLM`` with the same results, made safe for long requests: requests that do not
fit raise instead of being truncated, logits are never materialized for a whole sequence, and no row
of a batch affects another.
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
    """lm-eval's ``HFLM`` for models with an extended context.

    Args:
        pretrained: Directory or hub id of a model or a PEFT adapter, or a model in memory. A patch
            recorded in the config or beside the adapter is applied.
        method: Method to patch the model with; None leaves it as it is. Any other argument of
            `patch_model` may accompany it: ``factor``, ``replace``, the method's knobs. A model in
            memory is patched in place.
        truncation: Whether to truncate the beginning of requests longer than the model, as lm-eval
            does, instead of raising.
        window: Window length in tokens of rolling log-likelihoods; None for the model's length.
        stride: New tokens per window; None for ``window``.
        device: Device; None for a GPU if available.
        device_map: As in ``from_pretrained``.
        **kwargs: Arguments of HFLM (``tokenizer``, ``peft``, ``dtype``, ``batch_size``,
            ``max_length``...) and of ``from_pretrained``. Set ``max_length`` to measure an
            unpatched model beyond its length.

    Raises:
        RopeError: If the model cannot be patched, or an argument has no effect.
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
        self._truncates = bool(truncation)
        self._truncated = 0
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
            # HFLM splits requests over processes only if each has a GPU
            self._rank = self.accelerator.process_index
            self._world_size = self.accelerator.num_processes

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihoods of whole texts, in windows of ``window`` tokens."""
        windows: list[TokenRequest] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            parts = self._window.cut(tokens, self.prefix_token_id, self.max_length)
            windows += parts
            owners += [number] * len(parts)
        totals = [0.0] * len(requests)
        answers = self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm)
        for number, (log_likelihood, _) in zip(owners, answers, strict=True):
            totals[number] += log_likelihood
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Return the generated continuation of each prompt.

        Raises:
            RopeError: If a prompt with its answer does not fit, before anything runs.
        """
        lengths = [len(self.tok_encode(request.args[0])) for request in requests]
        limits = [
            normalize_gen_kwargs(request.args[1], self.max_gen_toks)["max_gen_toks"]
            for request in requests
        ]
        truncated = 0
        for length, limit in zip(lengths, limits, strict=True):
            if limit >= self.max_length:
                raise RopeError(
                    f"{limit} tokens may be generated, but the model's length is "
                    f"{self.max_length}; use a smaller max_gen_toks."
                )
            truncated += self._exceeds(length, limit, "may be generated")
        self._count(truncated)
        texts: list[str] = [""] * len(requests)
        for group, size in self._generation_batches(requests, lengths, limits):
            batch_size = self.batch_size_per_gpu
            self.batch_size_per_gpu = size
            try:
                answers = super().generate_until(
                    [requests[number] for number in group],
                    disable_tqdm=disable_tqdm or len(group) < len(requests),
                )
            finally:
                self.batch_size_per_gpu = batch_size
            for number, text in zip(group, answers, strict=True):
                texts[number] = text
        return texts

    def _generation_batches(
        self, requests: list[Any], lengths: list[int], limits: list[int]
    ) -> Iterator[tuple[list[int], int]]:
        """Yield indices of requests and their batch size.

        Requests with a ``seed`` are samples of one prompt. They form a batch of their own, so that
        sampling depends on nothing else.
        """
        seeded: dict[str, list[int]] = {}
        free: list[int] = []
        for number, request in enumerate(requests):
            if "seed" in request.args[1]:
                seeded.setdefault(repr(request.args), []).append(number)
            else:
                free.append(number)
        for group in self._groups([lengths[number] for number in free]):
            numbers = [free[index] for index in group]
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
        """Return the results of our text tasks, which call the model themselves.

        Raises:
            RopeError: If a length exceeds the model's.
        """
        results = []
        for request in requests:
            _, length, run = request.args
            if length > self.max_length:
                raise RopeError(
                    f"a length of {length} was requested, but the model's is {self.max_length}."
                )
            results.append(run(self.model, self._rows(length)))
        return results

    def get_model_info(self) -> dict[str, Any]:
        """Return lm-eval's information about the model, extended by its RoPE in force."""
        rope = self._described()
        return {
            **super().get_model_info(),
            "rope": None if rope is None else rope.to_dict(),
            "hf_rope_ext": version("hf-rope-ext"),
            "truncated_requests": self._truncated,
        }

    def _get_config(self, pretrained: str, *, gguf_file: str | None = None, **kwargs: Any) -> None:
        self._record = None
        if gguf_file is not None:
            super()._get_config(pretrained, gguf_file=gguf_file, **kwargs)
        else:
            self._config, self._record = read_config(pretrained, **kwargs)

    def _create_model(self, pretrained: str, *, peft: str | None = None, **kwargs: Any) -> None:
        if peft is not None and kwargs.get("delta") is not None:
            raise RopeError("peft and delta cannot be combined.")
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
            stock: dict[str, Any] = super()._get_accelerate_args(parallelize, device_map, **kwargs)
            return stock
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
        """Return log-likelihoods of continuations, and whether greedy decoding yields them."""
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
        """Map each distinct input (a request but its last token) to the requests that share it."""
        sharing: dict[tuple[int, ...], list[int]] = {}
        truncated = 0
        for number, (_, context, continuation) in enumerate(requests):
            if len(continuation) > self.max_length:
                raise RopeError(
                    f"a continuation of {len(continuation)} tokens is longer than the model's "
                    f"length of {self.max_length}."
                )
            truncated += self._exceeds(len(context) + len(continuation) - 1, 0, "are scored")
            tokens = (context + continuation)[-self.max_length - 1 : -1]
            sharing.setdefault(tuple(tokens), []).append(number)
        self._count(truncated)
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
        """Yield the index and the answer of each request that shares one of these inputs."""
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
        """Return groups of requests that may share a batch, longest first.

        With length-dependent frequencies, only requests of the same length do, so that padding has
        no effect.
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
        """Return the batch size for a length, found by trial if it is ``"auto"``."""
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
        """Return whether a request has to be truncated.

        Raises:
            RopeError: If it does, but truncation is off.
        """
        total = tokens + more
        if total <= self.max_length:
            return False
        if self._truncates:
            return True
        parts = f"{tokens} tokens" + (f", and {more} {what}" if more else "")
        stretch = total / self.max_length
        raise RopeError(
            f"a request has {parts}, but the model's length is {self.max_length}: lm-eval would "
            f"score it truncated. Extend the model {stretch:.3g} times (--model_args "
            f"method=yarn,factor=4), use shorter requests, pass max_length to measure the model "
            f"beyond its length, or pass truncation=True."
        )

    def _count(self, truncated: int) -> None:
        """Add to the number of truncated requests, over all processes."""
        if self._truncates:
            self._truncated += int(
                self.all_gather(torch.tensor([truncated], device=self.device)).sum()
            )
