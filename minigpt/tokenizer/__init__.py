"""Byte-level BPE from your own files, other programs' tokenizers, chat templates."""

from minigpt.core.lazy import lazy_names

__all__, __getattr__, __dir__ = lazy_names(
    __name__,
    {
        "template": """
            SECONDS TemplateLimit render_template
        """,
        "bpe": """
            PATTERN EOS IM_START IM_END SPECIALS MARKS CHAT_TEMPLATE RULES chat_messages
            chat_pieces Tokenizer train_tokenizer characters load_tokenizer
        """,
    },
)
