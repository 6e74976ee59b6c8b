"""A tiny Qwen2.5-VL that reads drawn videos: its training, and two ways to query it.

The vision tower learns the glyphs first; then the language model learns to answer the questions of
`scenes`, on 3 x 3 cells with one frame per scene.
"""

from dataclasses import dataclass
from functools import partial

import scenes
import torch
from scenes import QUESTIONS, VIDEO_PAD, Videos
from torch import Generator, Tensor, nn
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutputWithPooling

TRAINED = 2 + scenes.SCENES + 1
"""Positions of a training prompt, in which the question follows the last frame."""

TOWER_STEPS, TOWER_RATE = 100, 3e-3
WARM_UP, BATCH, RATE = 30, 16, 3e-3


@dataclass(frozen=True)
class Recipe:
    """Configuration of a model and its training.

    Attributes:
        theta: RoPE base of the text model.
        section: Number of pairs of t, h and w.
        steps: Training steps of the language model.
    """

    theta: float = 100.0
    section: tuple[int, int, int] = (6, 5, 5)
    steps: int = 400


def build(recipe: Recipe, seed: int) -> nn.Module:
    """Return an untrained model.

    The tower attends within single cells, so features carry no position: only M-RoPE provides it.
    Keys start with random biases, as in trained models of this family: attention purely by position
    needs a component that all keys share.
    """
    torch.manual_seed(seed)
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": scenes.VOCABULARY,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "max_position_embeddings": TRAINED,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": recipe.theta,
                "mrope_section": list(recipe.section),
            },
            "bos_token_id": scenes.START,
            "eos_token_id": None,
        },
        vision_config={
            "depth": 1,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": 64,
            "patch_size": scenes.PATCH,
            "spatial_merge_size": scenes.MERGE,
            "temporal_patch_size": scenes.TEMPORAL,
            "tokens_per_second": 1,
            "window_size": scenes.CELL,
            "fullatt_block_indexes": [],
        },
        image_token_id=scenes.IMAGE_PAD,
        video_token_id=VIDEO_PAD,
        vision_start_token_id=scenes.VISION_START,
    )
    model = Qwen2_5_VLForConditionalGeneration(config).eval()
    for name, weight in model.model.visual.named_parameters():
        if "weight" in name and weight.ndim > 1:
            nn.init.normal_(weight, std=weight[0].numel() ** -0.5)
    language = model.model.language_model
    for layer in language.layers:
        attention = layer.self_attn
        for part in (attention.o_proj, *layer.mlp.children()):
            if isinstance(part, nn.Linear):
                nn.init.normal_(part.weight, std=0.08)
        for part, std in ((attention.q_proj, 0.2), (attention.k_proj, 0.2)):
            nn.init.normal_(part.weight, std=std)
        nn.init.normal_(attention.k_proj.bias)
        nn.init.normal_(attention.v_proj.weight, std=0.125)
    nn.init.normal_(language.embed_tokens.weight, std=0.5)
    nn.init.normal_(model.lm_head.weight, std=0.08)
    return model


def prompt(videos: Videos, question: int = 0, seconds: float = 1.0) -> dict[str, Tensor]:
    """Return a prompt with one question per video, in the format of a processor.

    Args:
        videos: The videos.
        question: Index of the question.
        seconds: Duration of a frame.
    """
    pads = [VIDEO_PAD] * videos.glyphs[0].numel()
    words = [scenes.START, scenes.VISION_START, *pads, scenes.FIRST_QUESTION + question]
    ids = torch.tensor([words] * len(videos))
    return {
        "input_ids": ids,
        "mm_token_type_ids": 2 * (ids == VIDEO_PAD).int(),
        "video_grid_thw": videos.grid,
        "second_per_grid_ts": torch.full((len(videos),), seconds),
    }


def features(model: nn.Module, pixels: Tensor, grid: Tensor) -> Tensor:
    """Return the tower's features, ``(videos, cells, hidden)``."""
    return torch.stack(model.model.get_video_features(pixels, grid, return_dict=True).pooler_output)


def read(model: nn.Module, videos: Videos, seen: Tensor, seconds: float = 1.0) -> Tensor:
    """Return the logits of all questions in one pass, ``(batch, questions, vocabulary)``.

    All questions share one position and cannot attend to each other, so each gives the result it
    would give alone. Positions are those the model computes for a prompt with one question.
    """
    words = prompt(videos, seconds=seconds)
    first = {name: words[name][:1] for name in words}
    positions = model.model.get_rope_index(**first)[0]
    positions = torch.cat([positions[..., :-1], positions[..., -1:].expand(-1, -1, QUESTIONS)], -1)
    questions = scenes.FIRST_QUESTION + torch.arange(QUESTIONS).expand(len(videos), -1)
    ids = torch.cat([words["input_ids"][:, :-1], questions], 1)
    mask = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
    mask[-QUESTIONS:, -QUESTIONS:] = torch.eye(QUESTIONS, dtype=torch.bool)
    return model(
        input_ids=ids,
        attention_mask=mask.expand(len(videos), 1, -1, -1),
        position_ids=positions.expand(-1, len(videos), -1),
        mm_encoder_outputs={"video": BaseModelOutputWithPooling(pooler_output=seen.unbind())},
        logits_to_keep=QUESTIONS,
        use_cache=False,
    ).logits


def one_by_one(model: nn.Module, videos: Videos, pixels: Tensor, seconds: float = 1.0) -> Tensor:
    """Return the result of `read`, computed with one prompt per question and from pixels."""
    logits = [
        model(**prompt(videos, question, seconds), pixel_values_videos=pixels).logits[:, -1]
        for question in range(QUESTIONS)
    ]
    return torch.stack(logits, 1)


def teach_glyphs(model: nn.Module) -> Tensor:
    """Train the tower to classify glyphs; return its features, ``(glyphs, places, hidden)``."""
    cells = scenes.atlas()
    count, places = cells.shape[:2]
    pixels = scenes.patches(cells.flatten(0, 1)[:, None])
    grid = torch.tensor([[1, scenes.MERGE, scenes.MERGE]] * count * places)
    labels = torch.arange(count).repeat_interleave(places)
    head = nn.Linear(model.config.text_config.hidden_size, count)
    tower = model.model.visual
    optimizer = torch.optim.AdamW([*tower.parameters(), *head.parameters()], lr=TOWER_RATE)
    for _ in range(TOWER_STEPS):
        logits = head(features(model, pixels, grid)[:, 0])
        optimizer.zero_grad()
        nn.functional.cross_entropy(logits, labels).backward()
        optimizer.step()
    tower.requires_grad_(False)
    return features(model, pixels, grid).view(count, places, -1)


def share_of_rate(step: int, steps: int) -> float:
    """Return the relative learning rate of a step: warm-up, constant, linear decay to 2 %."""
    late = max(0.0, (step / steps - 0.6) / 0.4)
    return min(1.0, (step + 1) / WARM_UP) * (1 - 0.98 * late)


def train(model: nn.Module, steps: int, seed: int) -> None:
    """Train the tower, then the rest of the model on the tower's features."""
    seen = teach_glyphs(model)
    generator = Generator().manual_seed(1000 + seed)
    parameters = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(share_of_rate, steps=steps))
    for _ in range(steps):
        videos = scenes.videos(generator, BATCH)
        places = scenes.places(videos.glyphs, generator)
        logits = read(model, videos, seen[videos.glyphs, places].flatten(1, 3))
        optimizer.zero_grad()
        nn.functional.cross_entropy(logits.flatten(0, 1), videos.answers.flatten()).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
