"""What the status of a run reports as trouble: only that of the last attempt."""

import pytest

from minigpt.model.gpt import GPTConfig
from minigpt.run.status import run_status
from minigpt.train.loop import Callback, TrainingError
from minigpt.train.trainer import fit

MODEL = GPTConfig(vocab_size=300, dim=16, n_layer=1, n_head=2, n_kv_head=1, ffn_dim=32)
OPTIONS = dict(
    max_steps=4,
    save_steps=1,
    batch_size=1,
    max_seq_len=16,
    tokenizer_vocab_size=300,
    enable_compile="no",
    progress=False,
    plot_loss=False,
    tensorboard=False,
)


class End(Callback):
    "Ends training after two steps."

    def __init__(self, error):
        self.error = error

    def on_step(self, t):
        if t.step == 2:
            raise self.error


@pytest.fixture
def train(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "boat.txt").write_text("The boat came home late.\n\n" * 200)
    return lambda **options: fit(MODEL, "boat.txt", output_dir="run", **{**OPTIONS, **options})


def troubles():
    return [t for t in run_status("run")["troubles"] if "ENDED by" in t]


def test_an_error_is_a_trouble_until_the_run_resumes(train):
    with pytest.raises(TrainingError):
        train(callbacks=[End(TrainingError("the loss is NaN"))])
    assert "ENDED by TrainingError: the loss is NaN" in troubles()[0]
    with pytest.raises(TypeError):
        train(max_step=4)
    with pytest.raises(ValueError):
        train(batch_size=2)
    assert len(troubles()) == 1, "a refused call changes nothing"
    train()
    assert not troubles() and run_status("run")["state"] == "finished"
    assert "the loss is NaN" in open("run/run.log").read(), "the log keeps it"


def test_a_stop_is_not_a_trouble(train):
    with pytest.raises(KeyboardInterrupt):
        train(callbacks=[End(KeyboardInterrupt("stopped"))])
    assert not troubles() and "ENDED by KeyboardInterrupt" in open("run/run.log").read()
