"What training shows: the progress bar in a terminal, the live view in a notebook."

import contextlib
from pathlib import Path
from types import SimpleNamespace

import pytest

from minigpt.config.options import TrainConfig
from minigpt.train import callbacks
from minigpt.train.callbacks import ShowLive, ShowProgress, view_callbacks


def trainer(compiled: str = "no", **options):
    "The attributes of a trainer that views read."
    return SimpleNamespace(
        run_path=Path("runs/ships"),
        config=TrainConfig(plot_loss=False, tensorboard=False, **options),
        record=SimpleNamespace(runtime=SimpleNamespace(compile=compiled)),
        step=0,
        max_steps=4,
        complete=False,
    )


def test_bar_says_what_happens():
    t, progress = trainer(compiled="yes"), ShowProgress()
    progress.on_start(t)
    assert progress.bar.desc == "ships, compiling: "
    progress.on_step(t)
    assert progress.bar.desc == "ships: " and progress.bar.n == 1
    progress.on_phase(t, "evaluating")
    assert progress.bar.desc == "ships, evaluating: "
    progress.on_phase(t, "training")
    assert progress.bar.desc == "ships: "
    progress.on_end(t)


def test_live_view_knows_step_and_phase():
    live = SimpleNamespace(start=lambda: None)
    view, t = ShowLive(live), trainer(compiled="yes")
    view.on_start(t)
    assert (live.step, live.phase) == (0, "compiling")
    t.step = 1
    view.on_step(t)
    assert (live.step, live.phase) == (1, "training")
    view.on_phase(t, "saving")
    assert live.phase == "saving"
    view.on_end(t)
    assert live.phase == "stopped"
    t.complete = True
    view.on_end(t)
    assert live.phase == "finished"


@pytest.mark.parametrize(
    "notebook, widget, progress, expected",
    [
        (True, None, True, ShowLive),
        (True, None, False, None),
        (True, True, False, ShowLive),
        (True, False, True, None),
        (False, None, True, ShowProgress),
        (False, True, True, ShowProgress),
        (False, None, False, None),
    ],
)
def test_one_view(monkeypatch, notebook, widget, progress, expected):
    monkeypatch.setattr(callbacks, "in_notebook", lambda: notebook)
    monkeypatch.setattr(callbacks, "LiveLoss", lambda path: SimpleNamespace(finish=lambda: None))
    with contextlib.ExitStack() as at_end:
        views = view_callbacks(trainer(progress=progress), at_end, widget)
    assert [type(v) for v in views] == ([expected] if expected else [])
