"""ERNIE 4.5 VL: pairs are stored by axis, height and width before time."""

from hf_rope_ext.models.family import Config, Family


def by_axis(config: Config) -> list[int]:
    """Return the pairs in the order ``inv_freq`` holds them: even ones, odd ones, the time axis."""
    height, width, time = config.rope_parameters["mrope_section"]
    pairs = list(range(height + width + time))
    spatial = pairs[: height + width]
    return [*spatial[0::2], *spatial[1::2], *pairs[height + width :]]


FAMILIES = (
    Family(
        model_types=("ernie4_5_vl_moe_text",),
        pair_order=by_axis,
        stock_types=("default",),
    ),
)
