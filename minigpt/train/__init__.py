"""`fit`, and what it decides with."""

from minigpt.core.lazy import lazy_names

__all__, __getattr__, __dir__ = lazy_names(
    __name__,
    {
        "presets": """
            STAGES HARDWARE RECIPES stage detect_hardware hardware recipe
        """,
        "optim": """
            adamw orthogonal Muon muon make_optimizer
        """,
        "preference": """
            dpo_loss Preference add_reference
        """,
        "parallel": """
            ProcessGroupError Team launched own_device join assemble share_batch
        """,
        "speed": """
            best_device choose_runtime can_keep autocast attention_kernel deterministic_mode
            no_side_effects micro_step set_compiled decide_compile smaller memory_advice
            fit_batch flops_per_token machine_flops benchmark benchmark_table
        """,
        "inputs": """
            BUILT_IN PATH REGISTERED CORPUS OVERRIDES meaning usual_options source_files
            check_before_moving source_to_json source_from_json meanings what_is_read
            ResumeError refuse token_places unread_tokens TrainInputs open_source
        """,
        "loop": """
            Callback TrainingError NextToken Learner Trainer measure evaluate
        """,
        "evaluation": """
            token_bytes total_loss evaluate_on evaluation_table
        """,
        "call": """

        """,
        "state": """

        """,
        "callbacks": """

        """,
        "setup": """

        """,
        "trainer": """
            fit resume
        """,
    },
)
