"""From files as they are found to batches: readers, quality, token sets."""

from minigpt.core.lazy import lazy_names

__all__, __getattr__, __dir__ = lazy_names(
    __name__,
    {
        "readers": """
            LONGEST NO_ROW_REASONS ROLES FORMATS DataError Look inspect_file open_data
            check_no_tables data_files Block read_blocks Row parse_pretrain parse_conversation
            parse_preference parse_text parse_lines parse_row parse_block read_table count_read
            reading
        """,
        "download": """
            DownloadError fetch_url fetch_hub fetch_drive get
        """,
        "registry": """
            FOLDERS data_dir find_file locate DatasetConfig find_dataset get_dataset_config
            list_datasets register_dataset dataset require_files Mix mix
        """,
        "quality": """
            CLASSES TERMS N_BANDS BAND TOPICS SAMPLE has_mojibake clean count_classes row_key
            role_problems score Seen lsh_keys topics language Report encoding_problems analyze
        """,
        "corpus": """
            EN ENGLISH ZH CHINESE TOOLS NO_TOOL pick take between read_grammar tell tidy table
            article facts_en numbers asked number_zh facts_zh story stories write_corpus
            exchange talk write_conversations add multiply change count_letter reverse price
            weather alarm phone book schema is_held_out request call turns write_calls
            tool_prompts preference write_preferences reasoning write_reasoning stdlib_text
            kneser_ney_probs discounted trigram_loss
        """,
        "tokensets": """
            read_rows sample_texts TokenSet shuffled pack ChatSet LineSet PairSet curriculum
            Mixture count_refused format_refusals check_text no_text lost_rows_warning
            source_records tokenset_notes same_rules build_tokenset open_tokenset open_set
            loader check_size evenly_spaced
        """,
        "preparation": """
            split_text cut_conversation prepare prepare_summary
        """,
    },
)
