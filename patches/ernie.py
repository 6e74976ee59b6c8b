"""ERNIE 4.5 VL, which stores pairs by axis, height and width before time."""

from hf_rope_ext.models.family import Config, Family


def by_axis(config: Config) -> list[int]:
    """Return the order of the pairs in ``inv_freq``: even and odd spatial pairs, then time."""
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
