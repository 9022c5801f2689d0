"""From files as they are found to batches: readers, quality, token sets."""

from minigpt.core.lazy import lazy_names

__all__, __getattr__, __dir__ = lazy_names(
    __name__, "readers download registry quality corpus tokensets preparation"
)
