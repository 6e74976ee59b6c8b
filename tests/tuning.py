"""Every type of PEFT adapter, tiny."""

from pathlib import Path
from typing import Any

import peft
import torch
from conftest import tiny_llama
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

PROJECTIONS = ["q_proj", "v_proj"]
EQUAL = ["q_proj", "o_proj"]  # of one shape, for types that share projections
VIRTUAL = {"num_virtual_tokens": 4}
RANK = {"r": 2, "target_modules": PROJECTIONS}
TARGETS = {"target_modules": PROJECTIONS}

SETTINGS: dict[str, dict[str, Any]] = {
    "ADALORA": {"init_r": 4, "target_r": 2, "total_step": 10, **TARGETS},
    "ADAMSS": {"r": 8, "num_subspaces": 2, **TARGETS},
    "ADAPTION_PROMPT": {"adapter_len": 4, "adapter_layers": 1},
    "BEFT": TARGETS,
    "BOFT": {"boft_block_size": 4, **TARGETS},
    "C3A": {"block_size": 8, **TARGETS},
    "CARTRIDGE": VIRTUAL,
    "CPT": {"cpt_token_ids": [1, 2], "cpt_mask": [1, 1], "cpt_tokens_type_mask": [1, 2]},
    "DEFT": RANK,
    "DELORA": RANK,
    "FOURIERFT": {"n_frequency": 8, **TARGETS},
    "FROD": {"target_modules": EQUAL},
    "GLORA": RANK,
    "GRALORA": {"r": 4, "gralora_k": 2, **TARGETS},
    "HIRA": RANK,
    "HRA": RANK,
    "IA3": {"feedforward_modules": [], **TARGETS},
    "LILY": RANK,
    "LN_TUNING": {"target_modules": ["input_layernorm"]},
    "LOHA": RANK,
    "LOKR": RANK,
    "LORA": RANK,
    "MISS": RANK,
    "MULTITASK_PROMPT_TUNING": {"num_tasks": 2, **VIRTUAL},
    "OFT": {"oft_block_size": 4, "r": 0, **TARGETS},
    "OSF": {"effective_rank": 8, **TARGETS},
    "PEANUT": RANK,
    "POLY": {"n_tasks": 2, **RANK},
    "PREFIX_TUNING": VIRTUAL,
    "PROMPT_TUNING": VIRTUAL,
    "PSOFT": {"r": 4, **TARGETS},
    "PVERA": {"r": 2, "target_modules": EQUAL},
    "P_TUNING": {"encoder_hidden_size": 16, **VIRTUAL},
    "RANDLORA": {"r": 2, "target_modules": EQUAL},
    "ROAD": {"group_size": 8, **TARGETS},
    "SHADOW": {},
    "SHIRA": RANK,
    "SUPERTUNING": TARGETS,
    "TINYLORA": RANK,
    "TRAINABLE_TOKENS": {"token_indices": list(range(64))},
    "UNILORA": RANK,
    "VBLORA": {"num_vectors": 8, "vector_length": 16, "topk": 2, **RANK},
    "VERA": {"r": 2, "target_modules": EQUAL},
    "WAVEFT": {"n_frequency": 8, **TARGETS},
}
NO_ADAPTER_OF_ITS_OWN = {"XLORA"}  # mixes trained ones
# LoRA that trains or rewrites weights of the base, and modules trained in full
VARIANTS: dict[str, dict[str, Any]] = {
    "LORA with biases": {"bias": "all", **RANK},
    "LORA with a head": {"modules_to_save": ["lm_head"], **RANK},
    "LORA with tokens": {"trainable_token_indices": list(range(64)), **RANK},
    "LORA of weights": {"r": 2, "target_modules": [], "target_parameters": ["q_proj.weight"]},
    "LORA from PiSSA": {"init_lora_weights": "pissa", **RANK},
    "LORA from OLoRA": {"init_lora_weights": "olora", **RANK},
    "LORA as DoRA": {"use_dora": True, **RANK},
}
KINDS = [*sorted({own.value for own in peft.PeftType} - NO_ADAPTER_OF_ITS_OWN), *VARIANTS]
NEEDS_TASK = {"MULTITASK_PROMPT_TUNING", "POLY"}


def base() -> nn.Module:
    """A tiny Llama with biases."""
    return tiny_llama(attention_bias=True)


def config(kind: str) -> peft.PeftConfig:
    """The settings of a kind of adapter."""
    name = kind.partition(" ")[0]
    settings = VARIANTS.get(kind) or SETTINGS[name]
    return peft.PEFT_TYPE_TO_CONFIG_MAPPING[name](task_type="CAUSAL_LM", **settings)


def call(kind: str, model: nn.Module, ids: Tensor, **arguments: Any) -> Any:
    """Run a model with such an adapter."""
    if kind in NEEDS_TASK:
        arguments["task_ids"] = torch.zeros(len(ids), dtype=torch.long)
    return model(input_ids=ids, **arguments)


def train(kind: str, model: nn.Module, ids: Tensor) -> nn.Module:
    """Take two large steps."""
    free = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.SGD(free, lr=0.5)
    model.train()
    for _ in range(2):
        call(kind, model, ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def save_by_trainer(model: nn.Module, directory: Path) -> None:
    """Save a model as Trainer does."""
    arguments = TrainingArguments(str(directory / "run"), report_to="none", use_cpu=True)
    Trainer(model, arguments).save_model(str(directory))
