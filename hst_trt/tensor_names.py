"""Names of graphs and of their inputs and outputs: the vocabulary that exporter, builders, runtimes and hosts share."""

from __future__ import annotations

__all__ = ["GLUE", "LARGE", "SMALL", "TEXT_ENCODERS", "VAE_DECODER", "cache_names", "past_to_present"]

# Graphs with weights, one folder each in a bundle.
LARGE = "large"
SMALL = "small"
TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
VAE_DECODER = "vae_decoder"

# Glue: the arithmetic between the models (hst_trt.models.glue has each one's formula).
GLUE = (
    "join_text",
    "advance",
    "pack",
    "guide",
    "blend",
    "correct",
    "score",
    "select",
    "count",
    "change",
    "integrate",
    "finite",
)


def cache_names(num_layers: int, num_dual: int, prefix: str = "past") -> list[str]:
    """Cache tensors in binding order: ``past_k_0, past_v_0, past_k_1 ...``; those of dual attention come last."""
    return [f"{prefix}_{kind}_{i}" for i in range(num_layers + num_dual) for kind in ("k", "v")]


def past_to_present(name: str) -> str:
    """The output that is bound to the very buffer of the input `name`."""
    return name.replace("past_", "present_", 1)
