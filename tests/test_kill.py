"""A run killed with SIGKILL at any moment goes on bit for bit: dropout, accumulation, an epoch's end, evaluations and saves in between."""
import random
from concurrent.futures import ThreadPoolExecutor

import kill_child as child
import pytest

INTERVAL = child.OPTIONS["save_steps"]
# the seed decides the step and the delay; the machine's own unevenness does the rest
TRIALS = {"plain": (1, {}), "workers": (2, dict(dataloader_workers=1)), "plots": (3, dict(plot_loss=True)), "again": (4, {}),
          "epoch-saves": (5, dict(dataloader_workers=1, save_strategy="epoch"))}


def moment(seed, after):
    "Step and delay of a kill"
    rng = random.Random(seed)
    return rng.randrange(after, child.STEPS-1), rng.uniform(0, .06)


@pytest.fixture(scope="module")
def works(tmp_path_factory):
    "The uninterrupted run and all killed ones, two at a time"
    folder = tmp_path_factory.mktemp("kill")
    def killed(name):
        seed, options = TRIALS[name]
        return child.trial(folder/name, *moment(seed, 30 if "save_strategy" in options else 1), **options)
    with ThreadPoolExecutor(2) as pool:
        ref, jobs = pool.submit(child.reference, folder/"reference"), {n: pool.submit(killed, n) for n in TRIALS}
        yield dict(reference=ref.result, **{n: j.result for n, j in jobs.items()})   # each test meets its own trial's failure


@pytest.mark.parametrize("name", TRIALS)
def test_killed_and_resumed(works, name):
    by_epoch = "save_strategy" in TRIALS[name][1]     # other saves, the same course
    reference, interval = works["reference"](), INTERVAL
    if by_epoch: interval = child.epoch_steps(reference)
    got = child.compare(works[name](), reference, same_saves=not by_epoch)
    assert got.identical, got.differ
    assert got.killed_at > 0 and (got.resumed or got.killed_at <= interval)
    assert got.repeated <= interval, "more than one save interval was lost"
    assert not got.leftovers


def test_it_crosses_an_epoch(works):
    assert child.epoch_steps(works["reference"]()) < child.STEPS-INTERVAL
