"""Ask a vision-language model about drawn frames, through its own processor."""

import random
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from hf_rope_ext.errors import RopeError
from hf_rope_ext.evals.answering import Result, score_target
from hf_rope_ext.evals.bench import Advance
from hf_rope_ext.evals.documents import fit
from hf_rope_ext.evals.generation import answer_config, without_habits
from hf_rope_ext.evals.scoring import score_last
from hf_rope_ext.evals.statistics import by_place
from hf_rope_ext.evals.tasks.base import FrameDraft, FrameTask, Place
from hf_rope_ext.evals.tasks.frames import Frame, draw_frame
from hf_rope_ext.evals.text import encode, encode_pair, require_answer
from hf_rope_ext.planning.request_length import request_length


@dataclass(frozen=True)
class FrameEncoder:
    """Turns questions about frames into model inputs.

    Args:
        processor: The model's processor.
        task: The task, which says how frames are shown.
    """

    processor: Any
    task: FrameTask
    overhead: dict[int, int] = field(default_factory=dict)

    def inputs(self, draft: FrameDraft) -> dict[str, Any]:
        """Return the inputs of the model, including a teacher-forced target."""
        return self._process(draft, [draw_frame(frame, self.task.pixels) for frame in draft.frames])

    def targets(self, draft: FrameDraft) -> int:
        """Return the number of target tokens at the end of the inputs."""
        return encode_pair(self.processor.tokenizer, self._prompt(draft, 1), draft.target)[1]

    def needed(self, draft: FrameDraft) -> int:
        """Return the tokens that a draft takes, including its answer.

        All frames have the same size, so the processor runs only once per number of frames.
        """
        count = len(draft.frames)
        if count not in self.overhead:
            blank = draw_frame(Frame(""), self.task.pixels)
            total = self._process(draft, [blank] * count)["input_ids"].shape[1]
            self.overhead[count] = total - self._text_tokens(draft)
        answer = self.task.max_new_tokens if self.task.generated else 0
        words = self._text_tokens(draft)
        return words + self.overhead[count] + answer + self.task.template_tokens

    def _process(self, draft: FrameDraft, frames: list[Any]) -> dict[str, Any]:
        video = self.task.media == "video"
        media = {"videos": [frames]} if video else {"images": frames}
        text = self._prompt(draft, 1 if video else len(frames)) + self._target(draft)
        return dict(
            self.processor(
                text=[text],
                return_tensors="pt",
                add_special_tokens=not self._has_start(text),
                **media,
                # use all frames, whatever their rate
                **({"do_sample_frames": False} if video else {}),
            )
        )

    def _text_tokens(self, draft: FrameDraft) -> int:
        text = self._prompt(draft, 0) + self._target(draft)
        return len(encode(self.processor.tokenizer, text)) - self._has_start(text)

    def _target(self, draft: FrameDraft) -> str:
        return "" if self.task.generated else draft.target

    def _prompt(self, draft: FrameDraft, media: int) -> str:
        """Return the prompt, including the opening of the answer."""
        item = {"type": self.task.media.removesuffix("s")}
        content = [
            {"type": "text", "text": draft.opening},
            *[item] * media,
            {"type": "text", "text": draft.prompt},
        ]
        chat = [{"role": "user", "content": content}]
        text = self.processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        return f"{text}{draft.answer}"

    def _has_start(self, text: str) -> bool:
        """Return whether the chat template already adds the beginning-of-text token."""
        start = self.processor.tokenizer.bos_token
        return bool(start) and text.startswith(start)


@dataclass(frozen=True)
class VisualDocuments:
    """Questions about frames that fill a context length, and their scores.

    Args:
        name: Name of the task.
        task: The task.
        processor: The model's processor.
        samples: Questions per length and depth.
        seed: Seed for all sampling.
    """

    name: str
    task: FrameTask
    processor: Any
    samples: int
    seed: int
    sizes: dict[int, int] = field(default_factory=dict)

    @cached_property
    def encoder(self) -> FrameEncoder:
        """The encoder of model inputs."""
        return FrameEncoder(self.processor, self.task)

    def require_processor(self) -> None:
        """Raise `RopeError` if the processor cannot show frames."""
        if getattr(self.processor, "image_processor", None) is None:
            raise RopeError(
                f"{self.name} shows images, so it needs the processor of a model that takes them; "
                f"got {type(self.processor).__name__}."
            )
        if self.processor.chat_template is None:
            raise RopeError(
                "the processor has no chat template, which places images in the prompt; set "
                "processor.chat_template."
            )
        if self.task.media == "video" and not getattr(self.processor, "video_processor", None):
            raise RopeError(
                f"{type(self.processor).__name__} has no video processor (those of transformers "
                f"need torchvision); omit media=video to show frames as images."
            )

    def check(self, lengths: tuple[int, ...]) -> None:
        """Raise `RopeError` if a length is too short for a question."""
        draft = self.draft(Place(min(lengths), self.task.depths[0]))
        require_answer(self.processor.tokenizer, draft.gold[0], self.name)

    def places(self, length: int) -> list[Place]:
        """Return the places of one length in the grid of the task."""
        return [
            Place(length, depth, group, index)
            for index in range(self.samples)
            for depth, group in self.task.cells()
        ]

    def draft_at(self, place: Place, size: int) -> FrameDraft:
        """Return the question of a place over a given number of frames."""
        stream = f"{self.seed}/{self.name}/{place.length}/{place.depth}/{place.index}"
        return self.task.draft(random.Random(stream), size, place)

    def draft(self, place: Place) -> FrameDraft:
        """Return the question with the most frames that fit the length.

        Raises:
            RopeError: If not even one frame fits.
        """

        def tokens(size: int) -> int:
            return self.encoder.needed(self.draft_at(place, size))

        guess = self.sizes.get(place.length, 2)
        # video processors take frames in pairs, and some need at least one pair
        least = 2 if self.task.media == "video" else 1
        size = fit(tokens, place.length, (least, 1 << 40), guess)
        if size is None:
            raise RopeError(
                f"{self.name}: a length of {place.length} is too short for {least} frame(s) of "
                f"{self.task.pixels} pixels and the question, which take {tokens(least)} tokens."
            )
        self.sizes[place.length] = size
        return self.draft_at(place, size)

    @torch.inference_mode()
    def run(self, model: nn.Module, length: int, size: int, advance: Advance) -> dict[str, Any]:
        """Return the mean score with its interval, scores by depth, frames and positions.

        Raises:
            RopeError: If a question takes more tokens than its length.
        """
        places = self.places(length)
        results: list[Result] = []
        for place in places:
            draft = self.draft(place)
            inputs = _move(model, self.encoder.inputs(draft))
            used = int(inputs["input_ids"].shape[1])
            if used > length:
                raise RopeError(
                    f"{self.name}: {len(draft.frames)} frames take {used} tokens, more than the "
                    f"length of {length}: this processor's token count depends on image content."
                )
            results.append(self._answer(model, draft, inputs))
            advance(1)
        return {
            **by_place([(place.depth, place.group) for place in places], results),
            "frames": len(draft.frames),
            "positions": request_length(model, **inputs).positions,
        }

    def _answer(self, model: nn.Module, draft: FrameDraft, inputs: dict[str, Any]) -> Result:
        if not self.task.generated:
            scores = score_last(model, targets=self.encoder.targets(draft), **inputs)
            return score_target(scores.log_probs[0], scores.greedy[0])
        tokenizer = self.processor.tokenizer
        config = answer_config(model, tokenizer, max_new_tokens=self.task.max_new_tokens)
        with without_habits(model):
            output = model.generate(generation_config=config, **inputs)  # type: ignore[operator]
        new = output[0, inputs["input_ids"].shape[1] :]
        text = tokenizer.decode(new, skip_special_tokens=True)
        return self.task.score(draft.gold, text)


def _move(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    """Return inputs on the model's device, with floating-point ones in its dtype."""
    weight = next(model.parameters())

    def move(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.to(weight.device, weight.dtype if value.is_floating_point() else None)

    return {name: move(value) for name, value in inputs.items()}
