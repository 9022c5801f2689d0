"""The transformer, generation, adapters, quantization."""

from minigpt.core.lazy import lazy_names

__all__, __getattr__, __dir__ = lazy_names(
    __name__, "families gpt generation adapters quantization"
)
