"""The transformer, generation, adapters, quantization."""

from minigpt.core.lazy import lazy_names

__all__, __getattr__, __dir__ = lazy_names(
    __name__,
    {
        "families": """
            FAMILIES Family register_family family_of config_from_dict from_hf
        """,
        "gpt": """
            MAX_SIZES MAX_PARAMS HF_SIZES check_size check_number check_flag check_params
            GPTConfig to_hf check_hf check_supported RMSNorm rope_angles rotate Attention MLP
            Block linear_cross_entropy linear_log_probs KVCache LanguageModel has_own_head GPT
            check_gpt
        """,
        "generation": """
            next_probs DecodeStep generate generate_batch text_pieces stream_text complete
            parse_tool_calls
        """,
        "adapters": """
            LINEAR LoRAConfig LoRALinear weights_hash adapter_values LoRAGPT lora
        """,
        "quantization": """
            group_shape quantize dequantize
        """,
    },
)
