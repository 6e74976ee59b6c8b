"""Ask a vision-language model about drawn frames, through its own processor."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from hf_rope_ext.errors import RopeError
from hf_rope_ext.evals.answering import Result, forced
from hf_rope_ext.evals.scoring import score_last
from hf_rope_ext.evals.statistics import by_place
from hf_rope_ext.evals.tasks.base import Place, fit
from hf_rope_ext.evals.tasks.frames import Frame, draw_frame
from hf_rope_ext.evals.tasks.visual_needle import FilmDraft, VisualNeedle
from hf_rope_ext.evals.text import encode, encode_pair, require_answer
from hf_rope_ext.planning.request_length import request_length


@dataclass(frozen=True)
class Projector:
    """Makes a model's inputs of a question about frames.

    Args:
        processor: The model's.
        task: What is asked, and how frames are shown.
    """

    processor: Any
    task: VisualNeedle
    spent: dict[int, int] = field(default_factory=dict)

    def check(self) -> None:
        """Raise `RopeError` if the processor cannot show frames."""
        if getattr(self.processor, "image_processor", None) is None:
            raise RopeError(
                "rope_vniah shows images, so it needs the processor of a model that takes them; "
                f"got {type(self.processor).__name__}."
            )
        if self.processor.chat_template is None:
            raise RopeError(
                "the processor has no chat template, which says where images go in a prompt; set "
                "processor.chat_template."
            )
        if self.task.media == "video" and not getattr(self.processor, "video_processor", None):
            raise RopeError(
                f"{type(self.processor).__name__} has no video processor (those of transformers "
                f"need torchvision); leave out media=video to show frames as images."
            )

    def inputs(self, draft: FilmDraft) -> dict[str, Any]:
        """Return what a model is called with, a teacher-forced target included."""
        return self._process(draft, [draw_frame(one, self.task.pixels) for one in draft.frames])

    def targets(self, draft: FilmDraft) -> int:
        """Return how many tokens at the end are the target."""
        return encode_pair(self.processor.tokenizer, self._asked(draft, 1), draft.target)[1]

    def needed(self, draft: FilmDraft) -> int:
        """Return the tokens a draft takes, its answer included.

        Frames are of one size, so what a number of them takes is asked of the processor once.
        """
        count = len(draft.frames)
        if count not in self.spent:
            blank = draw_frame(Frame(""), self.task.pixels)
            found = self._process(draft, [blank] * count)["input_ids"].shape[1]
            self.spent[count] = found - self._words(draft)
        answer = self.task.max_new_tokens if self.task.generated else 0
        return self._words(draft) + self.spent[count] + answer + self.task.template_tokens

    def _process(self, draft: FilmDraft, frames: list[Any]) -> dict[str, Any]:
        video = self.task.media == "video"
        named = {"videos": [frames]} if video else {"images": frames}
        text = self._asked(draft, 1 if video else len(frames)) + self._told(draft)
        return dict(
            self.processor(
                text=[text],
                return_tensors="pt",
                add_special_tokens=not self._begun(text),
                **named,
                # all frames, whatever their rate
                **({"do_sample_frames": False} if video else {}),
            )
        )

    def _words(self, draft: FilmDraft) -> int:
        text = self._asked(draft, 0) + self._told(draft)
        return len(encode(self.processor.tokenizer, text)) - self._begun(text)

    def _told(self, draft: FilmDraft) -> str:
        return "" if self.task.generated else draft.target

    def _asked(self, draft: FilmDraft, media: int) -> str:
        """Return the prompt with the beginning of the answer."""
        shown = {"type": self.task.media.removesuffix("s")}
        content = [
            {"type": "text", "text": draft.opening},
            *[shown] * media,
            {"type": "text", "text": draft.prompt},
        ]
        chat = [{"role": "user", "content": content}]
        asked = self.processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        return f"{asked}{draft.answer}"

    def _begun(self, text: str) -> bool:
        """Return whether a template has put the beginning-of-text token already."""
        start = self.processor.tokenizer.bos_token
        return bool(start) and text.startswith(start)


@dataclass(frozen=True)
class FilmMeasure:
    """The score of questions about frames, by the depth of the frame in question.

    Args:
        name: Of the task.
        task: With its options.
        processor: The model's.
        samples: Questions per length and depth.
        seed: Of everything drawn.
    """

    name: str
    task: VisualNeedle
    processor: Any
    samples: int
    seed: int
    sizes: dict[int, int] = field(default_factory=dict)

    metric = "score"

    @cached_property
    def projector(self) -> Projector:
        """Makes the model's inputs."""
        return Projector(self.processor, self.task)

    def lengths(self, asked: tuple[int, ...]) -> tuple[int, ...]:
        """Return the lengths it is measured at."""
        return asked

    def check(self, lengths: tuple[int, ...]) -> None:
        """Raise `RopeError` if a length has no room."""
        draft = self.draft(Place(min(lengths), self.task.depths[0]))
        require_answer(self.processor.tokenizer, draft.gold[0], self.name)

    def units(self, length: int) -> int:
        """Return how many questions a cell takes."""
        return self.samples * len(self.task.depths)

    def places(self, length: int) -> list[Place]:
        """Return the places in the grid of one length."""
        return [
            Place(length, depth, None, index)
            for index in range(self.samples)
            for depth in self.task.depths
        ]

    def sized(self, place: Place, size: int) -> FilmDraft:
        """Return the question of a place over a number of frames."""
        stream = f"{self.seed}/{self.name}/{place.length}/{place.depth}/{place.index}"
        return self.task.draft(random.Random(stream), size, place)

    def draft(self, place: Place) -> FilmDraft:
        """Return the question with the most frames that fit the length.

        Raises:
            RopeError: If the length has no room for one frame.
        """

        def tokens(size: int) -> int:
            return self.projector.needed(self.sized(place, size))

        guess = self.sizes.get(place.length, 2)
        # processors of videos take two frames at a time, and some not fewer
        least = 2 if self.task.media == "video" else 1
        size = fit(tokens, place.length, (least, 1 << 40), guess)
        if size is None:
            raise RopeError(
                f"{self.name}: a length of {place.length} has no room for {least} frame(s) of "
                f"{self.task.pixels} pixels and the question, which take {tokens(least)} tokens."
            )
        self.sizes[place.length] = size
        return self.sized(place, size)

    @torch.inference_mode()
    def measure(
        self, model: nn.Module, length: int, size: int, advance: Callable[[int], None]
    ) -> dict[str, Any]:
        """Return the mean score with its interval, the same by depth, and what a film takes.

        Raises:
            RopeError: If a film takes more tokens than its length.
        """
        places = self.places(length)
        results: list[Result] = []
        for place in places:
            draft = self.draft(place)
            inputs = _on(model, self.projector.inputs(draft))
            used = int(inputs["input_ids"].shape[1])
            if used > length:
                raise RopeError(
                    f"{self.name}: {len(draft.frames)} frames take {used} tokens, more than the "
                    f"length of {length}: this processor's tokens depend on what frames show."
                )
            results.append(self._answer(model, draft, inputs))
            advance(1)
        extent = request_length(model, **inputs).positions
        return {
            **by_place([(place.depth, None) for place in places], results),
            "frames": len(draft.frames),
            "positions": extent,
        }

    def _answer(self, model: nn.Module, draft: FilmDraft, inputs: dict[str, Any]) -> Result:
        if not self.task.generated:
            scores = score_last(model, targets=self.projector.targets(draft), **inputs)
            return forced(scores.log_probs[0], scores.greedy[0])
        from transformers import GenerationConfig

        tokenizer = self.processor.tokenizer
        config = GenerationConfig(
            max_new_tokens=self.task.max_new_tokens,
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        out = model.generate(generation_config=config, **inputs)  # type: ignore[operator]
        new = out[0, inputs["input_ids"].shape[1] :]
        text = tokenizer.decode(new, skip_special_tokens=True)
        return self.task.score(draft.gold, text)


def _on(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    """Return inputs on a model's device, images in its number format."""
    weight = next(model.parameters())

    def placed(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.to(weight.device, weight.dtype if value.is_floating_point() else None)

    return {name: placed(value) for name, value in inputs.items()}
