"""A run killed with SIGKILL at any moment resumes bit for bit.

It has dropout, gradient accumulation, an epoch boundary, evaluations, saves, snapshots and a
backup. In some trials the machine is lost with the kill and only the backup is left; a second kill
comes during the restore.
"""

import random
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.harness import kill_child as child

INTERVAL, PAUSE = child.OPTIONS["save_steps"], 0.01
# the seed decides the step and the delay; the timing of the machine adds randomness
TRIALS = {
    "plain": (1, {}),
    "workers": (2, dict(dataloader_workers=1)),
    "plots": (3, dict(plot_loss=True)),
    "again": (4, {}),
    "epoch-saves": (5, dict(dataloader_workers=1, save_strategy="epoch")),
    "best-only": (6, dict(save_best_only=True)),
    **{f"step-{n}": (n, {}) for n in range(7, 11)},
    **{f"backup-{n}": (n, dict(backup=True)) for n in range(11, 16)},
    **{f"lost-{n}": (n, dict(lost=True, kills=2)) for n in range(16, 21)},
}
assert len(TRIALS) == 20


def moment(seed, after):
    "Return the step and the delay of a kill."
    rng = random.Random(seed)
    return rng.randrange(after, child.STEPS - 1), rng.uniform(0, 0.06)


@pytest.fixture(scope="module")
def works(tmp_path_factory):
    "The uninterrupted run and all killed runs, two at a time."
    folder = tmp_path_factory.mktemp("kill")

    def killed(name):
        seed, options = TRIALS[name]
        inside = []
        work = child.trial(
            folder / name,
            *moment(seed, 30 if "save_strategy" in options else 12 if "lost" in options else 1),
            pause=PAUSE,
            inspect=lambda w: inside.append(child.killed_in_save(w)),
            **options,
        )
        return work, any(inside)

    with ThreadPoolExecutor(2) as pool:
        ref, jobs = (
            pool.submit(child.reference, folder / "reference", pause=PAUSE),
            {n: pool.submit(killed, n) for n in TRIALS},
        )
        yield dict(
            reference=ref.result, **{n: j.result for n, j in jobs.items()}
        )  # a failed trial fails only its own test


@pytest.mark.parametrize("name", TRIALS)
def test_resume_is_bit_identical(works, name):
    options = TRIALS[name][1]
    reference, (work, killed_in_save), interval = works["reference"](), works[name](), INTERVAL
    if "save_strategy" in options:
        interval = child.epoch_steps(reference)
    other_saves = {
        "save_strategy",
        "save_best_only",
        "backup",
        "lost",
    } & options.keys()  # other checkpoints, the same losses
    outcome = child.compare(work, reference, same_saves=not other_saves)
    assert outcome.identical, outcome.differ
    assert outcome.killed_at > 0 and (
        outcome.resumed or outcome.killed_at <= interval * (1 + killed_in_save)
    )
    # A checkpoint that is being written does not count yet (the next save waits for it). If the
    # machine is lost, the backup may be one save behind, at each of the two kills.
    assert outcome.repeated <= interval * (1 + killed_in_save + 3 * ("lost" in options)), (
        "more than a save interval was repeated"
    )
    assert not outcome.leftovers


def test_run_crosses_an_epoch(works):
    assert child.epoch_steps(works["reference"]()) < child.STEPS - INTERVAL
