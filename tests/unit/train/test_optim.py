"""Muon: its numbers, its parameters, and its state in a checkpoint.

The numbers equal a plain implementation in float64; the state is restored bit for bit.
"""

import numpy as np
import pytest
import torch
from torch import nn

from minigpt.checkpoint.store import (
    CheckpointError,
    State,
    pack_optimizer,
    pack_rng,
    read_checkpoint,
    unpack_optimizer,
    write_checkpoint,
)
from minigpt.config.options import TrainConfig
from minigpt.model.gpt import GPT, GPTConfig
from minigpt.tokenizer.bpe import train_tokenizer
from minigpt.train import optim
from minigpt.train.optim import Muon, make_optimizer
from minigpt.train.trainer import Callback, fit

SHAPE = dict(vocab_size=300, dim=32, n_layer=2, n_head=4, n_kv_head=2, ffn_dim=48)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return GPT(GPTConfig(**SHAPE))


def config(**kw):
    return TrainConfig(optimizer="muon", learning_rate=0.01, **kw)


def train_steps(model, opt, steps, seed=0):
    draw = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        ids = torch.randint(300, (2, 17), generator=draw)
        model.loss(ids[:, :-1], ids[:, 1:]).backward()
        opt.step()
        opt.zero_grad()


def assert_equal_states(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


# --- the numbers ----------------------------------------------------------------------------------
def reference_muon(w, m, g, lr, decay, momentum):
    "Muon as in Jordan's text, one matrix at a time; the step size as in Liu et al."
    m = momentum * m + (1 - momentum) * g
    x = momentum * m + (1 - momentum) * g
    x = x / np.sqrt((x**2).sum())
    if x.shape[0] > x.shape[1]:
        x = x.T
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * (a @ a)) @ x
    if x.shape != w.shape:
        x = x.T
    return w * (1 - lr * decay) - lr * 0.2 * np.sqrt(max(w.shape)) * x, m


def reference_adamw(w, m, v, g, lr, decay, b1, b2, t):
    m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
    return w * (1 - lr * decay) - lr * (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + 1e-8), m, v


@pytest.mark.parametrize("at_once", [1 << 24, 100])
def test_muon_equals_a_plain_implementation(monkeypatch, at_once):
    monkeypatch.setattr(optim, "_STACK_SIZE", at_once)
    rng = np.random.default_rng(0)
    shapes = [(8, 8), (6, 12), (12, 6), (6, 12), (1, 5), (7,), (9, 4)]  # the last two are for AdamW
    params = [nn.Parameter(torch.tensor(rng.normal(size=s))) for s in shapes]
    opt = Muon(
        params[:5],
        [dict(params=[params[5]], weight_decay=0.0), dict(params=[params[6]], weight_decay=0.1)],
        lr=0.02,
        weight_decay=0.3,
        betas=(0.8, 0.9),
    )
    weights, one, two = (
        [p.detach().numpy().copy() for p in params],
        [np.zeros(s) for s in shapes],
        [np.zeros(s) for s in shapes],
    )
    for t in range(1, 8):
        lr = 0.02 / t
        for group in opt.param_groups:
            group["lr"] = lr
        for i, p in enumerate(params):
            g = rng.normal(size=shapes[i])
            p.grad = torch.tensor(g)
            if i < 5:
                weights[i], one[i] = reference_muon(weights[i], one[i], g, lr, 0.3, 0.95)
            else:
                weights[i], one[i], two[i] = reference_adamw(
                    weights[i], one[i], two[i], g, lr, (0.0, 0.1)[i - 5], 0.8, 0.9, t
                )
        opt.step()
        for i, p in enumerate(params):
            np.testing.assert_allclose(
                p.detach().numpy(),
                weights[i],
                rtol=1e-10,
                atol=1e-12,
                err_msg=f"{shapes[i]} after step {t}",
            )


def test_gradient_is_unchanged():
    p = nn.Parameter(torch.randn(4, 6))
    p.grad = torch.randn(4, 6)
    before = p.grad.clone()
    Muon([p], [], lr=0.1, weight_decay=0.0).step()
    assert torch.equal(p.grad, before)


# --- which parameters -----------------------------------------------------------------------------
@pytest.mark.parametrize("tied", [True, False])
def test_parameter_groups(tied):
    model = GPT(GPTConfig(**SHAPE, tied=tied, qk_norm=True))
    name = {p: n for n, p in model.named_parameters()}
    outer, norms, inner = (
        [name[p] for p in g["params"]] for g in make_optimizer(model, config(), "cpu").param_groups
    )
    assert outer == ["model.embed_tokens.weight"] + ["lm_head.weight"] * (not tied)
    assert len(inner) == 2 * 7 and all(n.endswith("_proj.weight") for n in inner)
    assert all("norm" in n for n in norms) and len(norms) == 2 * 4 + 1


def test_only_trainable_parameters_are_grouped(model):
    "With LoRA: only matrices, no embedding, no norm."
    for n, p in model.named_parameters():
        p.requires_grad_("q_proj" in n)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    opt = make_optimizer(model, config(), "cpu")
    assert [len(g["params"]) for g in opt.param_groups] == [2]
    train_steps(model, opt, 2)
    assert {n for n, p in model.named_parameters() if not torch.equal(p, before[n])} == {
        n for n in before if "q_proj" in n
    }
    for n, p in model.named_parameters():
        p.requires_grad_("norm" in n)
    train_steps(model, make_optimizer(model, config(), "cpu"), 1)


def test_parameter_without_gradient_is_unchanged(model):
    opt, p = make_optimizer(model, config(), "cpu"), model.model.layers[0].mlp.up_proj.weight
    before = p.detach().clone()
    model.loss(torch.ones(1, 4, dtype=torch.int64), torch.ones(1, 4, dtype=torch.int64)).backward()
    p.grad = None
    opt.step()
    assert torch.equal(p, before) and p not in opt.state


def test_scaler_skips_the_complete_step(model):
    "One infinite gradient, in a matrix or in a norm: no parameter changes."
    for bad in "mlp.up_proj", "input_layernorm":
        opt, scaler, before = (
            make_optimizer(model, config(), "cpu"),
            torch.amp.GradScaler("cpu", init_scale=8.0),
            [p.detach().clone() for p in model.parameters()],
        )
        scaler.scale(
            model.loss(torch.ones(1, 4, dtype=torch.int64), torch.ones(1, 4, dtype=torch.int64))
        ).backward()
        next(p for n, p in model.named_parameters() if bad in n).grad[0] = torch.inf
        scaler.unscale_(opt)
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()
        assert (
            all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
            and scaler.get_scale() == 4.0
        )


# --- saved and restored ---------------------------------------------------------------------------
def test_state_survives_a_checkpoint(model, tmp_path):
    opt = make_optimizer(model, config(), "cpu")
    train_steps(model, opt, 3)
    tok = train_tokenizer(["a text"], 270)
    write_checkpoint(
        tmp_path / "c",
        State(
            model.config,
            model.weights(),
            tok,
            dict(global_step=3),
            optimizer=pack_optimizer(opt, model),
            rng=pack_rng(),
        ),
        "step",
    )
    train_steps(model, opt, 3, seed=1)
    state = read_checkpoint(tmp_path / "c")
    other = GPT(model.config).load_weights(state.weights)
    again = make_optimizer(other, config(), "cpu")
    unpack_optimizer(again, other, state.optimizer)
    train_steps(other, again, 3, seed=1)
    assert assert_equal_states(model, other)
    adamw = make_optimizer(other, TrainConfig(), "cpu")
    with pytest.raises(CheckpointError, match="holds the state of Muon, and this run uses AdamW"):
        unpack_optimizer(adamw, other, state.optimizer)


def test_resume_is_bit_identical(tmp_path):
    "`fit`, stopped between saves and resumed: the same losses and weights as without a stop."

    class StopWithoutSave(Callback):
        def on_step(self, t):
            if t.step == 17:
                raise MemoryError("as if the power had failed")

    (tmp_path / "a.txt").write_text(
        "\n\n".join(
            f"{a} has {n} {b} and gives one to {c}."
            for a in ("Ada", "Bo", "Cleo")
            for c in ("Dan", "Eva")
            for b in ("hats", "boats")
            for n in range(9)
        )
    )
    how = dict(
        optimizer="muon",
        num_threads=1,
        max_seq_len=32,
        batch_size=4,
        max_steps=25,
        save_steps=10,
        logging_steps=5,
        tokenizer_vocab_size=300,
        validation_split=0.0,
        plot_loss=False,
        progress=False,
    )
    shape = GPTConfig(**SHAPE, dropout=0.1)
    run = fit(shape, tmp_path / "a.txt", output_dir=tmp_path / "whole", **how)
    with pytest.raises(MemoryError):
        fit(
            shape,
            tmp_path / "a.txt",
            output_dir=tmp_path / "torn",
            callbacks=[StopWithoutSave()],
            **how,
        )
    torn = fit(shape, tmp_path / "a.txt", output_dir=tmp_path / "torn", **how)
    assert [a["step"] for a in torn.facts["attempts"]] == [0, 10]
    assert assert_equal_states(run.model(), torn.model())
    assert [r["loss"] for r in run.history] == [r["loss"] for r in torn.history]
