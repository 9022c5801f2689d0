"""Byte-level BPE from your own files, other programs' tokenizers, chat templates."""

from minigpt.core.lazy import lazy_names

__all__, __getattr__, __dir__ = lazy_names(
    __name__, "template bpe"
)
