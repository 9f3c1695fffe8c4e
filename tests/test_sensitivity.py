"""benchmarks/sensitivity.py without its trainings: what is run, what is known, and the table of docs/results.md."""

from pathlib import Path

from benchmarks import sensitivity
from benchmarks.sensitivity import PAPER, SEEDS, Setting, fingerprint, runs, settings, table
from tweo_timm.records import read_rows

DOCS = Path(__file__).parents[1] / "docs"


def row(setting, seed, **values):
    numbers = {
        "top1": 80.0 + seed,
        "peak_abs": 10.0,
        "training_peak_abs": 12.0,
        "w8a8-tt+res": 79.0,
        "w4a4-tt+res": 40.0,
    }
    return {"name": setting.name(seed), "processor_s": 1.0, **numbers, **values}


def test_one_factor_at_a_time_leaves_the_papers_point_and_no_run_is_planned_twice():
    planned = list(settings())
    assert len(set(planned)) == len(planned)
    for setting in planned:
        assert sum(getattr(setting, name) != value for name, value in PAPER.items()) <= 1
    peers = [setting for setting in planned if setting.clipped]
    assert planned[-4:] == peers
    assert all(setting.weight == 0 for setting in peers)
    assert len({setting.name(seed) for setting, seed in runs()}) == len(planned) * len(SEEDS)
    assert planned[:2] == [Setting("ViT", "healthy", weight=0), Setting("ViT", "healthy", weight=0.001)]


def test_a_fingerprint_is_of_settings_seed_images_and_versions(monkeypatch):
    one = Setting("ViT", "healthy")
    first = fingerprint(one, 0, "images")
    assert fingerprint(Setting("ViT", "healthy"), 0, "images") == first
    others = [(Setting("ViT", "healthy", tau=2), 0, "images"), (one, 1, "images"), (one, 0, "others")]
    assert first not in {fingerprint(*other) for other in others}
    monkeypatch.setattr(sensitivity, "versions", lambda: {"tweo_timm": "9", "git": "abc"})
    assert fingerprint(one, 0, "images") != first


def test_the_table_has_means_and_says_what_broke_and_what_was_not_run():
    setting = Setting("ViT", "stress", weight=10)
    rows = [row(setting, 0), row(setting, 1), {"name": setting.name(2), "processor_s": 1.0, "broke": "not finite"}]
    lines = table(rows).splitlines()
    assert lines[2].startswith("| ViT, stress, 1 of 3 broke | 10 | 3 | 4 | 80.5 (80.0 to 81.0) |")
    assert lines[-1] == f"Not run: {len(list(runs())) - 3} of {len(list(runs()))} runs."


def test_the_table_of_the_docs_is_that_of_the_rows_beside_it():
    rows = sensitivity.of_one_version(read_rows(DOCS / "sensitivity.jsonl"))
    assert table(rows) in (DOCS / "results.md").read_text()
