"""Every option of a training run, and when it saves."""

from minigpt.core.lazy import lazy_names

__all__, __getattr__, __dir__ = lazy_names(
    __name__, "options schedule"
)
