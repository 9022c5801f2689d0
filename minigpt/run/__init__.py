"""A run is a folder: its backup, its metrics, its status."""

from minigpt.core.lazy import lazy_names

__all__, __getattr__, __dir__ = lazy_names(
    __name__,
    {
        "record": """
            Runtime InitialWeights DataRecord RunRecord
        """,
        "backup": """
            COLAB_MOUNT BEAT RETRY POLL QUIET DATA_LIMIT BackupError Taken on_colab drive_mount
            check_backup_folder read_run_id read_heartbeat listed Progress copy_file
            CheckpointCopy copy_checkpoint arrived discard creation_key BackupStatus Backup
            check_no_other_process is_abandoned restore_run fetch
        """,
        "guard": """
            Guard
        """,
        "metrics": """
            TAGS Metrics read_metrics Curves Follower plot_losses save_plots plot_runs
            losses_html PlotWriter EventWriter RunLog to_note ConsoleHandler log_to read_log
            memory
        """,
        "folder": """
            ANSWER SAVED_COLUMNS Run split_checkpoint open_run list_runs runs_table saved_row
            run_table text_table
        """,
        "status": """
            SILENT is_training pace Watch run_status numbers headline resume_code
            checkpoint_rows notes status_text sparkline monitor
        """,
        "live": """
            logger BOX_STYLE run_html display_widget LiveLoss
        """,
    },
)
