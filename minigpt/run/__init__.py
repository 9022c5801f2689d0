"""A run is a folder: its backup, its metrics, its status."""

from minigpt.core.lazy import lazy_names

__all__, __getattr__, __dir__ = lazy_names(
    __name__, "record backup guard metrics folder status live"
)
