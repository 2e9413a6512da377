"""What each row trains, without training it."""

from itertools import product
from pathlib import Path

import pytest
import recipes
from boost_config import BoostConfig
from boost_config import parse as parse_boost
from config import Config, parse, to_flags
from recipes import SWEEPS, TABLE, Changes, Setting
from table_runs import CONFIGS

BEST = Path(__file__).parents[2] / "train" / "best.toml"
FULL = Setting(epochs=200, half="fp16")
QUICK = Setting(epochs=4, half="bf16", quick=True)


@pytest.mark.parametrize("setting", [FULL, QUICK], ids=["full", "quick"])
def test_every_row_is_a_run_of_the_training_program(setting: Setting) -> None:
    found = [
        *recipes.table_rows(setting),
        *(r for sweep in SWEEPS.values() for r in sweep(setting)),
    ]
    assert len({recipe.name for recipe in found}) == len(found)
    for recipe in found:
        settings: Changes = {"epochs": setting.epochs, **recipe.changes}
        reads = {"main.py": parse, "boost.py": parse_boost}[recipe.program]
        assert reads(to_flags(settings)) == CONFIGS[recipe.program](**settings), recipe.name
        assert recipe.about and not recipe.about.endswith(".")


def test_settings_become_flags() -> None:
    settings: Changes = {
        "fused": True,
        "channels_last": False,
        "epochs": 3,
        "data_dir": None,
        "lr": 0.5,
    }
    assert to_flags(settings) == ["--fused", "--no-channels-last", "--epochs", "3", "--lr", "0.5"]
    assert parse(to_flags(settings)) == Config(**settings)


def test_the_reports_rows_are_the_reports() -> None:
    rows = {recipe.name: recipe for recipe in recipes.table_rows(FULL)}
    reported = [recipe.name for recipe in rows.values() if recipe.reported]
    assert reported == [
        "baseline", "half_precision", "pre_activation", "four_workers", "stochastic_depth", "best",
    ]  # fmt: skip
    base = Config(**rows["baseline"].changes)
    assert (base.block, base.batch_size, base.precision) == ("postact", 128, "fp32")
    assert not base.fused and base.drop_prob == 0 and base.epochs == 200
    half = Config(**rows["half_precision"].changes)
    assert half == Config(block="postact", precision="fp16")
    best = Config(**rows["best"].changes)
    assert (best.block, best.batch_size, best.micro_batches) == ("preact", 1024, 4)
    assert (best.drop_prob, best.drop_mode, best.drop_schedule) == (0.5, "batch", "uniform")
    assert best.warmup_epochs == 5 and best.peak_lr == pytest.approx(0.8)
    told = rows["best"].reported
    assert told and (told.minutes, told.train, told.test) == (32, 99.1, 93.4)


def test_a_growth_takes_no_more_passes_than_the_other_rows_have_epochs() -> None:
    """But for three end to end, which a quick row has at the least."""
    for setting in (FULL, QUICK, Setting(epochs=2, half="bf16", quick=True)):
        recipe = next(r for r in recipes.table_rows(setting) if r.name == "boostresnet")
        config = BoostConfig(**recipe.changes)
        # One of each unit, and as much for its classifier, edge and features.
        rest = setting.epochs - 2 * config.unit_epochs
        assert config.epochs < rest or config.epochs == min(3, setting.epochs)
        assert config.refine and config.fused and config.most_units == 9


def test_all_that_stacks_is_the_best_file_on_four_workers() -> None:
    everything = next(r for r in recipes.table_rows(FULL) if r.name == "everything")
    flags = to_flags(everything.changes)
    best = parse(["--config", str(BEST), "--micro-batches", "4"])
    assert parse(["--config", str(BEST), *flags]) == best
    assert parse(flags) == Config(**{**best.as_dict(), "config": None})


def test_the_stack_adds_one_thing_after_another() -> None:
    """The waterfall's steps are rows of the table, and each keeps what the one before has."""
    assert set(recipes.STACK) <= set(TABLE)
    before: Changes = {}
    for row in recipes.STACK:
        changes = row(FULL)
        kept = set(before) - {"block", "batch_size"}
        assert {key: changes[key] for key in kept} == {key: before[key] for key in kept}
        assert changes != before
        before = changes


def test_a_quick_run_takes_a_quarter_of_each_batch() -> None:
    for full, quick in zip(recipes.table_rows(FULL), recipes.table_rows(QUICK), strict=True):
        assert quick.changes["batch_size"] * 4 == full.changes["batch_size"]
        # Shared by four workers, with a few images each.
        assert quick.changes["batch_size"] % 16 == 0


def test_the_sweeps_span_the_reports() -> None:
    assert [r.x for r in SWEEPS["batch-size"](FULL)] == [128, 256, 512, 1024, 2048, 3072]
    survival = SWEEPS["survival"](FULL)
    assert {r.series for r in survival} == {"", "uniform", "linear"}
    for recipe in survival:
        assert recipe.changes.get("drop_prob", 0.0) == pytest.approx(1 - recipe.x)
    ratios = SWEEPS["meprop-ratio"](FULL)
    assert min(r.x for r in ratios) == 0.05 and max(r.x for r in ratios) == 1
    sparse = [r for r in ratios if r.x < 1]
    measured = {(r.changes["meprop_mode"], r.changes["width"], r.x) for r in sparse}
    assert measured == set(product(("unified", "row"), (16, 64, 256), (0.05, 0.1, 0.25, 0.5)))
    assert len(measured) == len(sparse)
    rates = SWEEPS["optimizer"](FULL)
    usual = {r.series: Config(optimizer=r.changes["optimizer"]).lr for r in rates}
    for name, lr in usual.items():
        assert lr in [r.x for r in rates if r.series == name]
