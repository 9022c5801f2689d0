"""The simplex-diffusion encoder, compared with transformers and diffusers.

Also checkpoints, backup and views of such a run. (Kill and resume: test_stages.py.)
"""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from project import ROOT

from minigpt.checkpoint.analysis import analyze
from minigpt.checkpoint.exporter import export
from minigpt.checkpoint.store import CheckpointError, load_model
from minigpt.config.options import TrainConfig
from minigpt.config.schedule import storage_plan
from minigpt.diffusion import Denoising, Tess, TessConfig, alpha_bars, extend, fill, infill, mlm
from minigpt.model.adapters import lora, weights_hash
from minigpt.run.folder import open_run
from minigpt.tokenizer.bpe import load_tokenizer
from minigpt.train.loop import measure
from minigpt.train.trainer import fit, resume

transformers = pytest.importorskip("transformers")
TINY = dict(
    dim=32,
    n_layer=2,
    n_head=2,
    ffn_dim=48,
    dropout=0.0,
    num_diffusion_steps=50,
    num_inference_diffusion_steps=8,
)


def settings(folder, **more):
    (folder / "text.txt").write_text(
        "\n".join(
            f"{a} and {b} went home at {h}."
            for a in ("Ann", "Ben", "Eva")
            for b in ("a cat", "the dog", "二狗")
            for h in range(1, 30)
        ),
        encoding="utf-8",
    )
    return (
        dict(
            model_name_or_path=str(folder / "start") if (folder / "start").exists() else "tiny",
            train_file=str(folder / "text.txt"),
            line_by_line=True,
            max_seq_length=24,
            output_dir=str(folder / "run"),
            per_device_train_batch_size=8,
            per_device_eval_batch_size=4,
            gradient_accumulation_steps=1,
            max_steps=12,
            learning_rate=1e-3,
            save_steps=5,
            save_total_limit=2,
            eval_steps=6,
            logging_steps=3,
            num_diffusion_steps=50,
            num_inference_diffusion_steps=8,
            tokenizer_vocab_size=300,
            num_threads=1,
            progress=False,
            plot_loss=False,
            tensorboard=False,
        )
        | more
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tess")
    return mlm(settings(folder, gdrive_backup_dir=str(folder / "drive"), backup_wait_seconds=30))


@pytest.fixture(scope="module")
def roberta(tmp_path_factory):
    torch.manual_seed(0)
    theirs = transformers.RobertaForMaskedLM(
        transformers.RobertaConfig(
            vocab_size=300,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            max_position_embeddings=66,
            type_vocab_size=1,
            hidden_dropout_prob=0.1,
            layer_norm_eps=1e-5,
        )
    ).eval()
    for p in theirs.parameters():
        p.data += 0.1 * torch.randn_like(p)  # biases and norms too
    theirs.save_pretrained(path := tmp_path_factory.mktemp("roberta"))
    return theirs, path


def test_schedule_equals_diffusers():
    betas = (
        pytest.importorskip("diffusers")
        .DDPMScheduler(500, beta_schedule="squaredcos_cap_v2")
        .betas.double()
    )
    assert (alpha_bars(500) - (1 - betas).cumprod(0)).abs().max() < 1e-6


def test_roberta_weights_are_loaded(roberta):
    theirs, path = roberta
    ours = load_model(path)
    assert isinstance(ours, Tess) and ours.config.simplex_value == 5 and ours.config.max_len == 64
    assert weights_hash(load_model(path)) == weights_hash(
        ours
    )  # missing weights get the same initial values each time
    ids = torch.randint(2, 300, (3, 40))
    real = torch.arange(40) < torch.tensor([40, 31, 7])[:, None]
    with torch.no_grad():
        a, b = ours(ids, real), theirs(ids.where(real, 1), attention_mask=real.long()).logits
    assert (a - b)[real].abs().max() < 1e-4
    assert torch.equal(
        ours.simplex_embeddings.weight, ours.roberta["embeddings"]["word_embeddings"].weight
    )  # starts as a copy
    assert sum(p.numel() for p in ours.parameters()) == ours.config.n_params
    assert replace(ours.config, simplex_value=None, mask_id=4).n_params == sum(
        p.numel() for p in theirs.parameters()
    )


def test_our_checkpoint_opens_in_transformers(run):
    ours, path = run.model(), run.final
    theirs = transformers.RobertaForMaskedLM.from_pretrained(path).eval()
    ids = torch.randint(2, ours.config.vocab_size, (2, 20))
    with torch.no_grad():
        assert (theirs(ids).logits - ours(ids)).abs().max() < 1e-4
    text = "Ann and 二狗 went home at 7."
    assert transformers.AutoTokenizer.from_pretrained(path)(text)[
        "input_ids"
    ] == run.tokenizer.encode(text)


def test_run_follows_the_checkpoint_policy(run):
    "It is saved, kept, backed up, evaluated and described like any run."
    assert (
        run.finished
        and [c.step for c in run.checkpoints][-2:] == [10, 12]
        and all(not c.problem and c.kind == "step" for c in run.checkpoints)
    )
    assert {12} <= {c.step for c in run.backup if c.kind == "step"} and run.best
    rows = [r for r in run.history if "eval_loss" in r]
    assert [r["step"] for r in rows] == [6, 12] and all(0 <= r["eval_accuracy"] <= 1 for r in rows)
    assert (
        run.facts["model"]["model_type"] == "roberta"
        and run.facts["model"]["self_condition"] == "logits_mean"
    )
    found = analyze(run.checkpoints[-1].path)
    assert (
        found.params == run.model().config.n_params
        and {"model", "optimizer", "rng", "tokenizer"} <= {*found.components}
        and "roberta.encoder.layer.1" in found.layers
    )
    from minigpt.widgets import CheckpointExplorer, RunDashboard

    assert "finished" in repr(RunDashboard(run.path)) and f"{found.params:,} parameters" in repr(
        CheckpointExplorer(run.checkpoints[-1].path)
    )


def test_resume_by_name_and_refused_options(run, tmp_path):
    how = settings(tmp_path)
    first = mlm(how)
    with pytest.raises(
        ValueError, match="model.simplex_value = 5.0, and this call has model.simplex_value = 3"
    ):
        mlm({**how, "simplex_value": 3.0})
    with pytest.raises(
        ValueError, match="line_by_line = True, and this call has line_by_line = False"
    ):
        mlm({**how, "line_by_line": False})
    again = mlm(
        {**how, "max_steps": 14, "num_inference_diffusion_steps": 4},
        resume_from_checkpoint="checkpoint-10",
    )
    assert (
        again.step == 14
        and [a["step"] for a in again.facts["attempts"]] == [0, 10]
        and first.path == again.path
    )
    assert resume(again.path, max_steps=15, progress=False).step == 15  # from the folder alone


def test_command_line(tmp_path):
    (tmp_path / "tess.json").write_text(
        json.dumps(settings(tmp_path, fp16=not torch.cuda.is_available(), output_dir="runs/tess"))
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "PASSIVE"}
    call = lambda *a: subprocess.run(
        [sys.executable, "-c", "from minigpt.cli import main; main()", *a],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=120,
    )
    done = call("mlm", "tess.json")
    assert done.returncode == 0, done.stderr
    assert "using precision=auto" in done.stdout  # fp16 on a CPU
    (tmp_path / "tess.json").write_text(
        json.dumps(settings(tmp_path, output_dir="runs/tess", max_steps=13))
    )
    assert (
        call("mlm", "tess.json", "--resume_from_checkpoint", "checkpoint-10").returncode == 0
        and open_run(tmp_path / "runs" / "tess").step == 13
    )
    answer = call(
        "infill", "runs/tess", "Ann and<mask><mask> went home at 7.", "--steps", "4", "--seed", "1"
    ).stdout
    assert answer.startswith("Ann and") and answer.rstrip().endswith("went home at 7.")
    assert call("generate", "runs/tess", "Ann", "--max-new-tokens", "5").stdout.startswith("Ann")
    for name in "chat", "evaluate":
        refused = call(name, "runs/tess", *(["text.txt"] if name == "evaluate" else []))
        assert (
            refused.returncode
            and "needs a GPT" in refused.stderr
            and "Traceback" not in refused.stderr
        )
    (tmp_path / "bad.json").write_text(json.dumps(settings(tmp_path, self_conditioning="logits")))
    assert (
        "'self_conditioning', which is unknown; did you mean 'self_condition'?"
        in call("mlm", "bad.json").stderr
    )


def test_example_configuration(tmp_path):
    "configs/tess.json unchanged but for the files, the size and the length."
    given = json.loads((ROOT / "configs" / "tess.json").read_text(encoding="utf-8"))
    assert {
        "simplex_value": 5,
        "num_diffusion_steps": 500,
        "save_steps": 500,
        "save_total_limit": 5,
        "time_save_interval_seconds": 300,
        "backup_keep_last": 3,
    }.items() <= given.items()
    own = settings(tmp_path)
    changed = {k: own[k] for k in ("model_name_or_path", "train_file", "output_dir")} | dict(
        validation_file=own["train_file"], max_seq_length=24, max_steps=2
    )
    quiet = {
        k: own[k]
        for k in ("tokenizer_vocab_size", "num_threads", "progress", "plot_loss", "tensorboard")
    }
    assert mlm(given | changed | quiet).finished


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            dict(self_condition="probs"),
            "self_condition='probs' must be one of none, logits, logits_addition, logits_mean",
        ),
        (dict(beta_schedule="linear"), "beta_schedule='linear' must be"),
        (dict(num_inference_diffusion_steps=51), "must be at most num_diffusion_steps=50"),
        (dict(simplex_value=0.0), "simplex_value=0.0 must be above 0"),
        (dict(simplex_value="5"), "simplex_value='5' must be a number, without quotes"),
        (dict(train_file=None), "has no train_file"),
        (
            dict(model_name_or_path="tinny"),
            "neither a directory with a config.json nor one of the presets",
        ),
        (dict(train_file="nothing.txt"), "nothing.txt"),
        (dict(max_seq_length=24, objective="conversation_modeling"), "is for a GPT"),
        (dict(entities_file="e.txt"), "set tokenizer_name"),
        (
            dict(model_name_or_path="FacebookAI/roberta-base"),
            (
                "download it first (huggingface_hub.snapshot_download('FacebookAI/roberta-base',"
                " local_dir='DIR'))"
            ),
        ),
        (dict(do_train=False), "the key 'do_train': fit always trains"),
        (
            dict(report_to="wandb"),
            "the key 'report_to': use tensorboard=True or metrics.jsonl",
        ),
        (dict(mlm_probability=0.15), "the key 'mlm_probability': for an encoder, use blanks"),
        (dict(run_name="mine"), "the key 'run_name': a run has the name of its directory"),
    ],
)
def test_bad_settings_are_refused(tmp_path, change, message):
    with pytest.raises((ValueError, OSError)) as e:
        mlm(settings(tmp_path, **change))
    assert message in str(e.value)


def test_options_of_other_scripts_and_of_tess(tmp_path, capsys):
    """Options with an equivalent are accepted; options without effect are ignored and reported.

    A checkpoint is named by its path.
    """
    how = {
        k: v
        for k, v in settings(tmp_path).items()
        if k not in ("max_steps", "save_steps", "output_dir")
    }
    theirs = dict(
        do_train=True,
        do_eval=True,
        report_to="tensorboard",
        overwrite_cache=True,
        preprocessing_num_workers=4,
        fp16=False,
        max_train_samples=60,
        num_warmup_steps=2,
        checkpointing_steps=1,
        max_steps=-1,
        max_train_steps=2,
        validation_file=None,
        max_eval_samples=8,
        cache_dir=None,
    )
    found = mlm(how | theirs | dict(output_dir=str(tmp_path / "out")))
    train = found.facts["train"]
    assert [
        train[k]
        for k in ("max_data_size", "warmup_steps", "save_steps", "max_steps", "eval_sequences")
    ] == [60, 2, 1, 2, 8] and [c.step for c in found.checkpoints] == [1, 2]
    assert (
        "ignored, without effect here: do_train, do_eval, report_to, overwrite_cache,"
        " preprocessing_num_workers, cache_dir\n" in capsys.readouterr().out
    )
    again = mlm(
        how
        | theirs
        | dict(max_train_steps=3, resume_from_checkpoint=str(tmp_path / "out/checkpoint-1"))
    )
    assert again.path == found.path and [a["step"] for a in again.facts["attempts"]] == [0, 1]


def test_conversations_and_gpts_are_refused(tmp_path, run):
    (tmp_path / "talk.jsonl").write_text(
        '{"conversations": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content":'
        ' "Hello there."}]}\n' * 60
    )
    shape = lambda tok: TessConfig(vocab_size=tok.vocab_size, **TINY)
    with pytest.raises(ValueError, match="an encoder is trained on texts"):
        fit(
            shape,
            tmp_path / "talk.jsonl",
            output_dir=tmp_path / "run",
            max_seq_len=32,
            batch_size=2,
            progress=False,
        )
    with pytest.raises(TypeError, match="an adapter needs a GPT"):
        lora(run.model())
    from minigpt.model.gpt import GPT, GPTConfig

    with pytest.raises(TypeError, match="infill needs an encoder"):
        infill(GPT(GPTConfig.preset("tiny", vocab_size=300)), run.tokenizer, "a<mask>")
    with pytest.raises(CheckpointError):
        load_model(tmp_path)


def test_pretrained_weights_with_additional_tokens(roberta, tmp_path, run):
    "With a transformers folder, a tokenizer and entities, checkpoints have the longer tokenizer."
    theirs, path = roberta
    theirs.save_pretrained(tmp_path / "start")
    run.tokenizer.save(tmp_path / "start")
    (tmp_path / "entities.txt").write_text(
        "Ann\tlives in\tNanjing Road\nBen\tlives in\tNanjing Road\n"
    )
    found = mlm(
        settings(
            tmp_path,
            entities_file=str(tmp_path / "entities.txt"),
            max_steps=4,
            save_steps=2,
            num_diffusion_steps=50,
        )
    )
    tok, model = load_tokenizer(found.checkpoints[0].path), load_model(found.checkpoints[0].path)
    assert len(tok.encode("Nanjing Road")) == 1 and tok.vocab_size == model.config.vocab_size > 300
    assert (
        model.roberta["embeddings"]["word_embeddings"].weight.shape[0]
        == tok.vocab_size
        == len(transformers.AutoTokenizer.from_pretrained(found.final))
    )
    assert transformers.AutoTokenizer.from_pretrained(found.final)("in Nanjing Road.")[
        "input_ids"
    ] == tok.encode("in Nanjing Road.")


def test_gpt_is_extended(run):
    from minigpt.model.gpt import GPT, GPTConfig

    torch.manual_seed(0)
    gpt = GPT(
        GPTConfig.preset(
            "tiny", vocab_size=run.tokenizer.vocab_size, n_layer=2, ffn_dim=run.tokenizer.vocab_size
        )
    ).eval()  # other matrices have as many rows
    more, tok = extend(gpt, run.tokenizer, ["Nanjing"])
    ids = torch.tensor([run.tokenizer.encode("Ann and Ben")])
    with torch.no_grad():
        assert (
            torch.equal(more(ids)[..., : gpt.config.vocab_size], gpt(ids))
            and len(tok.encode("Nanjing")) == 1
        )
    roomy = GPT(
        GPTConfig.preset("tiny", vocab_size=tok.vocab_size + 9, n_layer=1)
    )  # has a spare row already
    E = extend(roomy, run.tokenizer, ["Nanjing"])[0].head
    assert len(E) == tok.vocab_size + 9 and torch.allclose(
        E[tok.vocab_size - 1], roomy.head[run.tokenizer.encode("Nanjing")].mean(0)
    )


def test_masked_language_model_trains(tmp_path):
    found = mlm(settings(tmp_path, simplex_value=None))
    assert (
        found.model().config.mask_id == found.tokenizer.id("<mask>")
        and "simplex_embeddings.weight" not in found.model().weights()
    )
    assert infill(found.model(), found.tokenizer, "Ann and<mask> cat.").text.startswith("Ann and")


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_export_opens_in_every_precision(run, tmp_path, precision):
    small = load_model(
        export(run.path, tmp_path / "small", precision, progress=lambda done, total: None)
    )
    ids = torch.randint(2, small.config.vocab_size, (1, 12))
    with torch.no_grad():
        assert (small(ids) - run.model()(ids)).abs().max() < 0.1


def test_gpt_line_by_line(tmp_path):
    from minigpt.model.gpt import GPTConfig

    settings(tmp_path)
    found = fit(
        GPTConfig(vocab_size=300, dim=32, n_layer=2, n_head=2, n_kv_head=1, ffn_dim=48),
        tmp_path / "text.txt",
        output_dir=tmp_path / "gpt",
        line_by_line=True,
        max_seq_len=6,
        batch_size=8,
        max_steps=10,
        learning_rate=3e-3,
        tokenizer_vocab_size=300,
        num_threads=1,
        plot_loss=False,
        tensorboard=False,
        widget=False,
    )
    run_log = (found.path / "run.log").read_text(encoding="utf-8")
    assert (
        found.finished
        and " lines, one sequence each, " in run_log
        and "are longer than max_seq_len=6 and truncated" in run_log
    )


def test_validation_and_sampling_keep_the_random_state(run):
    from minigpt.data.tokensets import open_set

    model, valid = run.model(), open_set(run.path / "data" / "valid")
    was = torch.get_rng_state()
    learn = Denoising(model.config, valid, TrainConfig(max_seq_len=24))
    a, b = (
        measure(model, valid, 24, objective=learn),
        measure(model, valid, 24, objective=learn, batch_size=8),
    )
    ids, blank = torch.zeros(1, 9, dtype=torch.long), torch.ones(1, 9, dtype=torch.bool)
    assert a == b and torch.equal(fill(model, ids, blank, seed=4), fill(model, ids, blank, seed=4))
    assert torch.equal(was, torch.get_rng_state())


def test_storage_plan_of_roberta_base():
    """About 500 MB of weights, 1 GB of optimizer state, 7.5 GB for five.

    The same for a masked language model; the embedding of the guesses is extra.
    """
    n = TessConfig.preset("base", simplex_value=None, mask_id=50264).n_params
    assert (
        abs(4 * n / 500e6 - 1) < 0.01
        and abs(8 * n / 1e9 - 1) < 0.01
        and abs(5 * 12 * n / 7.5e9 - 1) < 0.01
    )
    line = storage_plan(
        TrainConfig(save_total_limit=5, time_save_interval_seconds=0), n, 10, 10**12
    )[0].text
    assert "1.4 GiB" in line and "475.7 MiB" in line and "5 kept" in line
