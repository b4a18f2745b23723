"""Compare runs on one self-contained HTML page: `launch/report.py RUN... [--evaluation DIR ...] [--out report.html]`."""

from __future__ import annotations

import argparse
from pathlib import Path

from warm_dist import errors
from warm_dist.paths import path_argument


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "runs", metavar="RUN", type=path_argument, nargs="+", help="folders of runs, also of runs under way"
    )
    text = "output folders of launch/evaluate.py"
    parser.add_argument("--evaluation", type=path_argument, nargs="+", action="extend", default=[], help=text)
    parser.add_argument("--out", type=path_argument, default=Path("report.html"), help="default: report.html")
    args = parser.parse_args()

    from warm_dist.report.page import write_report

    write_report(args.runs, args.evaluation, args.out)
    size = f"{len(args.runs)} run{'s' * (len(args.runs) > 1)}, {args.out.stat().st_size / 1e6:.1f} MB"
    errors.tell(f"{args.out}: {size}; open it in a browser")
    return errors.EXIT_OK


if __name__ == "__main__":
    errors.run(main)
