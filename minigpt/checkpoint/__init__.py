"""Write, verify, choose, open, export and analyze checkpoints."""

from minigpt.core.lazy import lazy_names

__all__, __getattr__, __dir__ = lazy_names(
    __name__, "headers store exporter analysis comparison"
)
