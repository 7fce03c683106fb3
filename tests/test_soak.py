"""Five methods composed, killed from outside again and again at random moments, end as if nothing had happened."""

from __future__ import annotations

import json
import random
import statistics
from pathlib import Path

import pytest
from killed import final, kill_at_random, outside

EXPERIMENT = Path(__file__).with_name("soak_experiment.py")


def unbroken(out: Path, *settings: str) -> list[dict[str, int]]:
    """Runs to the end in one process; what it held in memory and open after every stage, row 0 left out."""
    record = out.with_suffix(".gauge")
    child = outside(EXPERIMENT, out, *settings, pause=0, env={"JAXCL_TEST_GAUGE": str(record)})
    error = child.communicate()[1]
    assert child.returncode == 0, error
    return [json.loads(line) for line in record.read_text().splitlines()][1:]


def broken(out: Path, stages: list[int], rng: random.Random, *settings: str, pause: float = 0) -> int:
    """Runs to the end, killed once in every one of ``stages``, every second time in a save; how many met a save."""
    met = 0
    for k, stage in enumerate(sorted(stages)):
        child = outside(EXPERIMENT, out, *settings, pause=pause)
        met += kill_at_random(child, out, stage, rng, in_save=k % 2 == 0)
    child = outside(EXPERIMENT, out, *settings, pause=0)
    error = child.communicate()[1]
    assert child.returncode == 0, error
    return met


def test_three_stages_killed_three_times(tmp_path):
    settings = ("--set", "stages=3", "--set", "steps=20", "--set", "save_every=4")
    unbroken(tmp_path / "whole", *settings)
    met = broken(tmp_path / "killed", [0, 1, 2], random.Random(1), *settings, pause=0.01)
    assert met, "no kill met a save under way"
    assert final(tmp_path / "killed", 3) == final(tmp_path / "whole", 3)


@pytest.mark.slow
def test_twenty_stages_killed_twenty_five_times(tmp_path):
    """2,000 steps; what the unbroken run holds in memory and open does not grow with the stages."""
    rng = random.Random(5)
    held = unbroken(tmp_path / "whole")
    met = broken(tmp_path / "killed", [rng.randrange(20) for _ in range(25)], rng)
    print(json.dumps({"kills": 25, "in a save": met, "held": held}))
    assert met >= 5
    found, expected = final(tmp_path / "killed", 20), final(tmp_path / "whole", 20)
    assert found == expected
    assert expected[1].count(b"\n") == 2000
    early, late = held[5:10], held[15:20]
    memory = [statistics.median(h["bytes"] for h in part) for part in (early, late)]
    assert memory[1] < 1.02 * memory[0], held
    # A save under way holds up to eight event loops open, three files each; a file kept a stage would be ten more here.
    first, second = (max(h["files"] for h in part) for part in (held[:10], held[10:]))
    assert second <= first + 5, held
