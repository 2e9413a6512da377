"""Turn the files of results into README's tables and plots, so that no figure is typed by hand.

python benchmarks/report.py            print the headlines, and what is wrong with any file
python benchmarks/report.py --write    README.md, results/README.md and the plots
python benchmarks/report.py --check    exit status 1 where README no longer says what the files say

Of each benchmark the newest file of each hardware counts. Toy sizes (--small) never do.
"""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

from _report_figures import HEADLINES
from _report_plots import draw_all
from _report_tables import UNMEASURED, File, headlines, newest, table
from _results import ResultsError, load

_ROOT = Path(__file__).parent.parent
_RESULTS = Path(__file__).parent / "results"
_BEGIN = "<!-- figures: written by python benchmarks/report.py --write -->"
_END = "<!-- end of figures -->"
# The plots that README shows.
_SEEN = ("step-", "roofline-", "growth-", "boost_by_time-")


def read(folder: Path) -> list[File]:
    """The files that count. One that cannot be read is named, and costs no other."""
    files = []
    for path in sorted(folder.rglob("*.json")):
        try:
            files.append(File(path, load(path)))
        except ResultsError as error:
            print(f"left out: {error}", file=sys.stderr)
    return newest(files)


def readme(text: str, files: list[File], plots: list[Path]) -> str:
    """README with its figures exchanged; plots: those of the whole step, the first to be seen.

    Raises:
        ValueError: the marks of their place are not there.
    """
    before, begin, rest = text.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not begin or not end:
        raise ValueError(f"README.md: the lines {_BEGIN!r} and {_END!r} are not both there")
    images = "\n".join(
        f"![{p.stem}](benchmarks/results/plots/{p.name})" for p in plots if p.name.startswith(_SEEN)
    )
    figures = "\n\n".join(part for part in (headlines(files, HEADLINES), images) if part)
    return f"{before}{begin}\n{figures}\n{end}{after}"


def all_tables(files: list[File], folder: Path, plots: list[Path]) -> str:
    """results/README.md: every row that was measured, and every plot."""
    parts = [
        "# Results\n\nWritten by `python benchmarks/report.py --write` from the files in this "
        f"folder. What is not here is {UNMEASURED}."
    ]
    for file in files:
        where = file.path.relative_to(folder)
        # What a person had to say of it.
        note = f"\n\n{file.content['note']}" if "note" in file.content else ""
        parts.append(
            f"## {file.benchmark}, {file.hardware}\n\n{file.about}; `{file.content['command']}`, "
            f"[{where}]({where}){note}\n\n<details>\n\n{table(file)}\n\n</details>"
        )
    parts += [f"![{p.stem}](plots/{p.name})" for p in plots]
    return "\n\n".join(parts) + "\n"


def main() -> int:
    head, _, rest = (__doc__ or "").partition("\n")
    p = argparse.ArgumentParser(
        description=head, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--results", type=Path, default=_RESULTS, help="folder of JSON files")
    p.add_argument("--readme", type=Path, default=_ROOT / "README.md")
    what = p.add_mutually_exclusive_group()
    what.add_argument("--write", action="store_true", help="write README.md, tables and plots")
    what.add_argument("--check", action="store_true", help="see that they are up to date")
    args = p.parse_args()
    if not args.results.is_dir():
        print(f"error: --results {args.results}: no such folder", file=sys.stderr)
        return 1
    files = read(args.results)
    if not args.write and not args.check:
        print(headlines(files, HEADLINES))
        return 0
    with tempfile.TemporaryDirectory() as drawn:
        try:
            plots = draw_all(files, Path(drawn))
            wanted = {
                args.readme: readme(args.readme.read_text(), files, plots),
                args.results / "README.md": all_tables(files, args.results, plots),
            }
            if args.write:
                # Those that no file stands behind any more go.
                shutil.rmtree(args.results / "plots", ignore_errors=True)
                shutil.copytree(drawn, args.results / "plots")
                for path, content in wanted.items():
                    path.write_text(content)
                return 0
        except (OSError, ValueError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    stale = [p for p, content in wanted.items() if not p.exists() or p.read_text() != content]
    for path in stale:
        print(
            f"error: {path.name} does not say what the results say: run "
            "python benchmarks/report.py --write",
            file=sys.stderr,
        )
    return int(bool(stale))


if __name__ == "__main__":
    sys.exit(main())
