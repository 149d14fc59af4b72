"""How far a call is from what the device could do: FLOPs of its matrix products over the device's dense bfloat16 peak."""

from __future__ import annotations

import re

from hst_trt.cost import call_flops
from hst_trt.spec import TransformerSpec

__all__ = ["guided_flops", "peak_flops", "share_of_peak"]

# FLOP/s, dense, from the vendor's data sheets. Other forms of the same chips have other clocks: they are left unknown.
_PEAKS = ((r"\bH200\b", 989e12), (r"\bH100\b", 989e12), (r"\bA100\b", 312e12))
_OTHER_FORMS = r"\bMIG\b|\bNVL\b|\bH100 PCIe\b"


def peak_flops(device: str) -> float | None:
    """The dense bfloat16 peak of a device, by the name that its driver gives; None where it is not known."""
    if re.search(_OTHER_FORMS, device):
        return None
    return next((peak for pattern, peak in _PEAKS if re.search(pattern, device)), None)


def guided_flops(spec: TransformerSpec, computed: int, tokens: int, text: int) -> int:
    """FLOPs of a call with guidance for one image: two rows, `computed` of `tokens` image tokens each."""
    return 2 * call_flops(spec, computed, tokens, text)


def share_of_peak(flops: int, seconds: float, device: str) -> float | None:
    """What share of the device's peak a call reaches; None where the peak is not known."""
    peak = peak_flops(device)
    return None if peak is None else flops / seconds / peak
