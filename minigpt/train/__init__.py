"""`fit`, and what it decides with."""

from minigpt.core.lazy import lazy_names

__all__, __getattr__, __dir__ = lazy_names(
    __name__,
    "presets optim preference parallel speed inputs loop evaluation call state callbacks setup"
    " trainer",
)
