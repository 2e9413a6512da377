"""The headlines that README shows, and how each is made of the rows of a benchmark's file."""

import statistics
from collections.abc import Callable, Iterable
from typing import Any

from _report_tables import COLD, Headline, largest, pick
from _results import Row


def _spread(row: Row) -> str:
    return f"{row['median_ms']:.4g} ms, {row['low_ms']:.4g} to {row['high_ms']:.4g}, n = {row['n']}"


def _step(batch_size: int) -> Callable[[list[Row]], str | None]:
    """Images/s of the best fused provider, beside the best peer and the report's own."""

    def figure(rows: list[Row]) -> str | None:
        size = (batch_size, 20, 16)
        timed = [row for row in rows if "images_per_second" in row and _size(row) == size]
        ours = [row for row in timed if row["provider"].startswith("fused")]
        peers = [row for row in timed if not row["provider"].startswith("fused")]
        if not ours or not peers:
            return None
        best, peer = (max(some, key=lambda r: r["images_per_second"]) for some in (ours, peers))
        words = (
            f"{best['images_per_second']:,.0f} images/s ({best['provider']}; {_spread(best)}), "
            f"{peer['median_ms'] / best['median_ms']:.2f} × the best peer ({peer['provider']}; "
            f"{_spread(peer)})"
        )
        plain = pick(peers, provider="eager fp32 NCHW")
        if plain and plain is not peer:
            words += f", {plain['median_ms'] / best['median_ms']:.2f} × eager fp32 NCHW"
        return words + _absent(r for r in rows if _size(r) == size and r not in timed)

    return figure


def _size(row: Row) -> tuple[int | None, ...]:
    return tuple(row.get(key) for key in ("batch_size", "depth", "width"))


def _absent(rows: Iterable[Row]) -> str:
    """A peer that has no figure might have been the best one: it is named."""
    names = dict.fromkeys(
        f"{row['provider']} ({row.get('failed') or row['not_measured']})"
        for row in rows if "provider" in row
    )  # fmt: skip
    return f"; without {', '.join(names)}" if names else ""


def _ratio(rows: list[Row]) -> str | None:
    row = pick(rows, batch_size=128, depth=20, width=16)
    if row is None:
        return None
    return f"{row['median']:.2f} × ({row['lowest']:.2f} to {row['highest']:.2f}, n = {row['n']})"


def _cold(rows: list[Row]) -> str | None:
    mine = [row for row in rows if _size(row) == (128, 20, 16)]
    words = ", ".join(
        f"{row['provider']} {row['median_ms'] / 1000:.1f} s ({row['low_ms'] / 1000:.1f} to "
        f"{row['high_ms'] / 1000:.1f}, n = {row['n']})"
        for row in mine if "median_ms" in row
    )  # fmt: skip
    return words + _absent(row for row in mine if "median_ms" not in row) if words else None


def _built(rows: list[Row]) -> str | None:
    return "; ".join(
        f"{row['target']}, {row['dtype']}: {row['binaries']} binaries in "
        f"{row['median_ms'] / 1000:.1f} s ({row['low_ms'] / 1000:.1f} to "
        f"{row['high_ms'] / 1000:.1f}, n = {row['n']}) by {row['threads']} threads"
        for row in rows if "median_ms" in row and row["depth"] == 20
    ) or None  # fmt: skip


def _dropped(rows: list[Row]) -> str | None:
    words = []
    for mode in ("batch", "subset", "row"):
        row = pick(rows, provider="fastres", mode=mode, depth=110, N=128, p=0.5)
        if row is not None:
            words.append(
                f"{mode}: {row['time_ratio']:.2f} of the time, {row['flops_ratio']:.2f} of the "
                f"FLOPs ({_spread(row)})"
            )
    return "; ".join(words) or None


def _meprop(**size: Any) -> Callable[[list[Row]], str | None]:
    def figure(rows: list[Row]) -> str | None:
        found = []
        for ratio in (1 / 4, 1 / 16):
            row = pick(rows, mode="unified", ratio=ratio, dtype="fp32", **size)
            if row:
                found.append(f"{row['speedup']:.1f} × at ratio 1/{1 / ratio:.0f} ({_spread(row)})")
        return ", ".join(found) or None

    return figure


def _mlp(rows: list[Row]) -> str | None:
    found = [
        f"{row['speedup']:.1f} × at k = {row['k']} (the original: {row['original_speedup']} ×; "
        f"{_spread(row)})"
        for row in rows
        if row.get("pass") == "backward" and "speedup" in row and "original_speedup" in row
    ]
    return ", ".join(found) or None


def accuracies(**wanted: Any) -> Callable[[list[Row]], str | None]:
    """Of each row of the table: mean and standard deviation over its seeds; † emulated workers."""

    def figure(rows: list[Row]) -> str | None:
        words = []
        counted = [r for r in rows if "failed" not in r and wanted.items() <= r.items()]
        for name in dict.fromkeys(row["provider"] for row in rows):
            all_ = [row for row in rows if row["provider"] == name]
            mine = [row for row in all_ if wanted.items() <= row.items() and "failed" not in row]
            if mine:
                emulated = any(row["processes"] < row["workers"] for row in mine)
                minutes = _mean([row["training_seconds"] / 60 for row in mine], 2)
                tests = _mean([row["test_accuracy"] for row in mine], 1)
                some = "" if len(mine) == len(all_) else f" ({len(mine)} of {len(all_)} seeds)"
                words.append(f"{name} {tests} % in {minutes}{'†' * emulated} min{some}")
            elif any("failed" in row for row in all_):
                words.append(f"{name} failed")
        if not counted:
            return "; ".join(words) or None
        of = [*sorted({row["data"] for row in counted})]
        of.append(f"n = {len({row['seed'] for row in counted})}")
        of += sorted(f"half precision is {r}" for r in {r["precision"] for r in counted} - {"fp32"})
        return f"{'; '.join(words)} ({', '.join(of)})"

    return figure


def _boost_steps(depth: int) -> Callable[[list[Row]], str | None]:
    """Of the units' steps the least and the most, beside the whole network's: time and memory."""

    def figure(rows: list[Row]) -> str | None:
        size = {"depth": depth, "batch_size": 128, "width": 16}
        whole = pick(rows, provider="end to end", **size)
        units = [row for row in rows if row["provider"] == "unit" and "median_ms" in row]
        units = [row for row in units if size.items() <= row.items()]
        if whole is None or not units:
            return None
        words = []
        for key, unit, per in (("median_ms", "ms", 1), ("peak_memory_bytes", "MB", 1e6)):
            least, most = (f(row[key] for row in units) / per for f in (min, max))
            words.append(f"{least:,.3g} to {most:,.3g} {unit} of {whole[key] / per:,.0f}")
        return f"{' and '.join(words)} ({_spread(whole)})"

    return figure


# Written just before, a file is read from the host's memory.
_PLACES = {"disk": "disk, from the page cache"}


def _features(rows: list[Row]) -> str | None:
    return "; ".join(
        f"{_PLACES.get(row['place'], row['place'])}{', fetched ahead' * row['ahead']}: "
        f"{row['gb_per_s']:.2f} GB/s, "
        f"{row['images_per_second']:,.0f} images/s ({_spread(row)})"
        for row in rows if row["provider"] == "cache" and "gb_per_s" in row
    ) or None  # fmt: skip


def as_long(rows: list[Row]) -> str | None:
    """Of a growth, of its end, and of plain training: means over the seeds."""
    done = [row for row in rows if "test_accuracy" in row]
    words = []
    for name in dict.fromkeys(row["provider"] for row in done):
        mine = [row for row in done if row["provider"] == name]
        train, test = (_mean([r[f"{key}_accuracy"] for r in mine], 1) for key in ("train", "test"))
        minutes = _mean([row["training_seconds"] / 60 for row in mine], 1)
        words.append(f"{name}: train {train} %, test {test} % in {minutes} min")
    seeds = len({row["seed"] for row in done})
    images = {f"{row['train_images']:,} images" for row in done}
    return f"{'; '.join(words)} ({', '.join(sorted(images))}, n = {seeds})" if words else None


def _mean(values: list[float], digits: int) -> str:
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


_CASE = {"N", "C", "H", "dtype", "layout", "residual"}


def _bandwidth(rows: list[Row]) -> str | None:
    """The largest case of each pass, beside the best peer at the same."""
    words, cases = [], []
    for direction, case in largest(rows).items():
        ours = next((row for row in case if row["provider"] == "fastres"), None)
        peers = [row for row in case if row["provider"] != "fastres"]
        if ours is not None and peers:
            peer = min(peers, key=lambda r: r["median_ms"])
            size = "×".join(str(ours[axis]) for axis in ("N", "C", "H", "H"))
            cases.append({key: ours[key] for key in ours.keys() & _CASE})
            more = " with residual" if ours.get("residual") else ""
            faster = peer["median_ms"] / ours["median_ms"]
            words.append(
                f"{direction} of {size} {ours['dtype']} {ours['layout']}{more}: "
                f"{ours['gb_per_s']:,.0f} GB/s, "
                f"{ours['share_of_copy']:.0%} of a copy's, {faster:.2f} × the best peer "
                f"({peer['provider']}; {_spread(ours)})"
            )
    return "; ".join(words) + _absent(_missing(rows, cases)) if words else None


def _missing(rows: list[Row], cases: list[Row]) -> list[Row]:
    """The rows without figures of these cases."""
    unmeasured = [row for row in rows if "failed" in row or "not_measured" in row]
    return [row for row in unmeasured if any(case.items() <= row.items() for case in cases)]


def _units(rows: list[Row]) -> str | None:
    """Of each stage at batch 1024, forward and backward together, over the best peer."""
    words = []
    cases: list[Row] = [{"N": 1024, "C": C, "stride": 1, "dtype": "fp16"} for C in (16, 32, 64)]
    for case in cases:
        passes: dict[str, dict[str, float]] = {}
        for row in rows:
            if "median_ms" in row and row["timer"] == COLD and case.items() <= row.items():
                passes.setdefault(row["provider"], {})[row["pass"]] = row["median_ms"]
        both = {"forward", "backward"}
        times = {name: sum(ms.values()) for name, ms in passes.items() if ms.keys() == both}
        peers = {name: ms for name, ms in times.items() if name not in ("fastres", "layers")}
        if "fastres" in times and peers:
            peer = min(peers, key=lambda name: peers[name])
            words.append(
                f"C = {case['C']}: {peers[peer] / times['fastres']:.2f} × {peer} "
                f"({times['fastres']:.4g} ms)"
            )
    return "; ".join(words) + _absent(_missing(rows, cases)) if words else None


def _builds(rows: list[Row]) -> str | None:
    nvidia = [row for row in rows if row["target"].startswith("sm_")]
    amd = [row for row in rows if not row["target"].startswith("sm_")]
    return (
        f"{sum(row['spilling'] for row in rows)} of {sum(row['builds'] for row in rows):,} builds "
        f"spill; at most {max(row['registers'] for row in nvidia)} registers on NVIDIA, "
        f"{max(row['registers'] for row in amd)} on AMD"
    )


def _account(rows: list[Row]) -> str | None:
    return "; ".join(
        f"{row['provider']} {row['passes']:.1f} passes, {row['launches']} launches "
        f"({row['dtype']}, batch {row['batch_size']})"
        for row in rows if row["name"] == "total" and row["depth"] == 20 and row["width"] == 16
    ) or None  # fmt: skip


def _scaling(rows: list[Row]) -> str | None:
    """Of measured rows alone: a model's prediction is no figure."""
    steps = [row for row in rows if row.get("kind") == "step" and "efficiency" in row]
    return "; ".join(
        f"{row['processes']} processes, {row['scaling']}: {row['efficiency']:.0%} ({_spread(row)})"
        for row in steps if row["processes"] > 1
    ) or None  # fmt: skip


_LINEAR, _CONV = {"in": 4096, "out": 4096}, {"C": 256, "layout": "NHWC"}
HEADLINES = (
    Headline("whole step, depth 20, batch 128", "step", _step(128), "bench_step.py"),
    Headline("whole step, depth 20, batch 1024", "step", _step(1024), "bench_step.py"),
    Headline(
        "whole step, depth 20, batch 128: fused over eager channels_last, step by step in turn",
        "step_ratio", _ratio, "bench_step.py --ratio 15",
    ),
    Headline(
        "from process start to the first finished step, no kernel built",
        "step_cold", _cold, "bench_step.py --cold",
    ),
    Headline(
        "all kernels of a depth-20 step built from a cold cache, with no GPU present (--prebuild)",
        "builds", _built, "bench_builds.py", anywhere=True,
    ),
    Headline(
        "`batch_norm_relu`, the largest case",
        "batch_norm_relu", _bandwidth, "bench_batch_norm_relu.py",
    ),
    Headline(
        "pre-activation unit as one op, fp16, batch 1024: forward and backward over the best peer",
        "preact_unit", _units, "bench_preact_unit.py",
    ),
    Headline(
        "data-parallel efficiency of the step (on a CPU the processes share its cores)",
        "scaling", _scaling, "bench_scaling.py",
    ),
    Headline(
        "every kernel built at every configuration, for sm_80, sm_90, sm_100 and gfx942",
        "kernel_report", _builds, "kernel_report.py", anywhere=True,
    ),
    Headline(
        "bytes and launches of a step, depth 20, counted as it runs "
        "(a pass: the bytes of all convolutions' outputs; of so few images most of what the units "
        "move are slabs of weights' gradients, which hardly grow with the batch)",
        "step_account", _account, "step_account.py", anywhere=True,
    ),
    Headline(
        "stochastic depth, p = 0.5 uniform, depth 110: a step beside p = 0",
        "stochastic_depth_unit", _dropped, "bench_stochastic_depth_unit.py",
    ),
    Headline(
        "meProp unified, linear 4096×4096, fp32: backward over the dense one, selection included",
        "meprop_linear", _meprop(**_LINEAR), "bench_meprop_linear.py",
    ),
    Headline(
        "meProp unified, 3×3 conv of 256 channels, NHWC, fp32: the same",
        "meprop_conv2d", _meprop(**_CONV), "bench_meprop_conv2d.py",
    ),
    Headline(
        "meProp unified, the original's MLP (784-8192-8192-10, batch 50, fp32): backward over the "
        "dense one", "meprop_mlp", _mlp, "bench_meprop_mlp.py",
    ),
    *(
        Headline(
            f"BoostResNet, depth {depth}, batch 128: the step of a unit, of that end to end; time "
            "and peak memory", "boost", _boost_steps(depth), "bench_boost.py",
        )
        for depth in (20, 56, 122)
    ),
    Headline(
        "BoostResNet's cached features, 16×32×32 an image, batches of 128 in random order",
        "boost", _features, "bench_boost.py",
    ),
    Headline(
        "BoostResNet, depth 20, beside plain training for as long", "boost_training", as_long,
        "bench_boost_training.py --folder DIR",
    ),
    Headline(
        "Table 1, depth 20, 200 epochs: test accuracy and time of training († emulated workers)",
        "training_table_20", accuracies(epochs=200, train_size=None),
        'bench_training.py --table="--dataset cifar10"',
    ),
    Headline(
        "the same, quick (4 epochs of 5,000 images, a quarter of each batch): shows that all rows "
        "learn, not what they are worth", "training_table_20_quick",
        accuracies(epochs=4, train_size=5000), "bench_training.py --folder DIR",
    ),
)  # fmt: skip
