"""Write, verify, choose, open, export and analyze checkpoints."""

from minigpt.core.lazy import lazy_names

__all__, __getattr__, __dir__ = lazy_names(
    __name__,
    {
        "headers": """
            DTYPES PRECISIONS DType Refused TooMuch Reader safetensors_header printable Named
            Call Storage StoredTensor interpret_pickle TorchFile torch_file tensors_in foreign
            jsonable
        """,
        "store": """
            CheckpointError State pack_optimizer unpack_optimizer pack_rng unpack_rng
            write_safetensors write_manifest Defect problem write_checkpoint state_size
            read_checkpoint SafeTensors read_pickle weight_files is_weights Weights read_config
            open_weights load_model find_base model_dir Checkpoint CheckpointStore stores_in
            check_no_symlinks newest run_model open_model Saved is_out_of_memory Writer
            write_final place_final
        """,
        "exporter": """
            BITS GROUP theory export_bytes minimind_config export ExportReport export_report
            export_onnx
        """,
        "analysis": """
            TensorInfo layer_of natural Table treemap Analysis readable values checkpoints_in
            analyze create_demo
        """,
        "comparison": """
            precision_table suggestions Difference difference Comparison compare
        """,
    },
)
