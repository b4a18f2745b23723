"""Compare runs on one page: `launch/report.py RUN... [--evaluation DIR ...] [--out report.html]`, one file that needs no network."""

from __future__ import annotations

import argparse
from pathlib import Path

from warm_dist import errors


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", metavar="RUN", type=Path, nargs="+", help="folders of runs, also of runs under way")
    parser.add_argument(
        "--evaluation", type=Path, nargs="+", action="extend", default=[], help="folders that launch/evaluate.py wrote"
    )
    parser.add_argument("--out", type=Path, default=Path("report.html"), help="default: report.html")
    args = parser.parse_args()

    from warm_dist.report.page import write_report

    write_report(args.runs, args.evaluation, args.out)
    print(
        f"{args.out}: {len(args.runs)} run{'s' * (len(args.runs) > 1)}, {args.out.stat().st_size / 1e6:.1f} MB; open it in a browser"
    )
    return errors.EXIT_OK


if __name__ == "__main__":
    errors.run(main)
