"""What following the request costs: decoding beside static YaRN, and growing a cache.

Run it as ``python benchmarks/dynamic_speed.py [--device cuda]``.
"""

import argparse
import copy
from typing import Any

import torch
from overhead import SIZES, build, ratios, seconds
from recording import record

from hf_rope_ext import patch_model, planned, request_plan
from hf_rope_ext.rotary.request_plan import plan_of

PROMPT, STEPS = 768, 16


@torch.inference_mode()
def decode_ratios(device: str) -> dict[str, Any]:
    """Compare a decode step of dynamic_yarn with one of yarn, on equal caches."""
    rows = {}
    for size, shape in SIZES.items():
        torch.manual_seed(0)
        plain = build(*shape).to(device)
        ids = torch.randint(0, 1024, (1, PROMPT), device=device)
        models = {
            "dynamic_yarn": patch_model(copy.deepcopy(plain), "dynamic_yarn", factor=4),
            "yarn": patch_model(copy.deepcopy(plain), "yarn", factor=4),
        }
        with planned(PROMPT + 2 * STEPS):
            caches = {name: model(ids).past_key_values for name, model in models.items()}

        def decode(name: str, models: Any = models, caches: Any = caches, ids: Any = ids) -> None:
            for _ in range(STEPS):
                models[name](ids[:, :1], past_key_values=caches[name])
            caches[name].crop(-STEPS)
            if device == "cuda":
                torch.cuda.synchronize()

        rows[size] = ratios(
            lambda decode=decode: decode("dynamic_yarn"), lambda decode=decode: decode("yarn")
        )
        keys = caches["dynamic_yarn"].layers
        rows[size]["bytes of keys and values per token"] = sum(
            layer.keys[0, :, 0].nbytes + layer.values[0, :, 0].nbytes for layer in keys
        )
        rows[size]["bytes of positions per token"] = (
            plan_of(caches["dynamic_yarn"]).positions.nbytes // PROMPT
        )
        print(size, rows[size])
    return rows


@torch.inference_mode()
def growth_cost(device: str) -> dict[str, float]:
    """Time a loop that grows its cache fourfold, with the growth and planned without any."""
    plain = build(*SIZES["small"]).to(device)
    ids = torch.randint(0, 1024, (1, 2048), device=device)
    model = patch_model(plain, "dynamic_yarn", factor=4)

    def loop() -> Any:
        cache = model(ids[:, :512]).past_key_values
        for at in range(512, 2048):
            cache = model(ids[:, at : at + 1], past_key_values=cache).past_key_values
        if device == "cuda":
            torch.cuda.synchronize()
        return cache

    def without() -> None:
        with planned(2048):
            loop()

    assert request_plan(loop()).factors[0] > 3.5
    found = sorted(
        (seconds(loop) + seconds(loop)) / (seconds(without) + seconds(without)) for _ in range(5)
    )
    return {"loop that grows over loop planned": found[2], "blocks": 5}


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    device = parser.parse_args().device
    torch.set_num_threads(1)
    results = {"decode, over yarn": decode_ratios(device), "growth": growth_cost(device)}
    print(results["growth"])
    record("dynamic_speed" if device == "cpu" else f"dynamic_speed_{device}", results)


if __name__ == "__main__":
    main()
