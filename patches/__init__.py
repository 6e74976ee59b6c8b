"""Differences between model families, as data; README.md in this directory tells how to add one."""

from hf_rope_ext.models.family import Family

from . import (
    deepseek,
    gemma,
    gpt_j,
    granite,
    llama,
    mistral,
    muse,
    phi,
    qwen,
    several_towers,
    speech,
    tencent,
    towers,
    unscaled,
    vision,
)

FAMILIES: tuple[Family, ...] = (
    *deepseek.FAMILIES,
    *gemma.FAMILIES,
    *gpt_j.FAMILIES,
    *granite.FAMILIES,
    *llama.FAMILIES,
    *mistral.FAMILIES,
    *muse.FAMILIES,
    *phi.FAMILIES,
    *qwen.FAMILIES,
    *several_towers.FAMILIES,
    *speech.FAMILIES,
    *tencent.FAMILIES,
    *towers.FAMILIES,
    *unscaled.FAMILIES,
    *vision.FAMILIES,
)
