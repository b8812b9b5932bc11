"""Faults on real runs: a matrix of them, cycles of kills at random, a soak.

    make faults                                   the matrix; ARGS="--quick" for a row of each kind
    PYTHONPATH=tests python -m faults matrix kill nan-loss --repeats 3
    PYTHONPATH=tests python -m faults cycles --count 500
    PYTHONPATH=tests python -m faults soak --minutes 60
    PYTHONPATH=tests python -m faults publish     the last results into docs/reliability.md

Each goes on where it stopped: what is in the output directory is not done again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from faults import cycles, matrix, publish, soak

OUT = publish.ROOT / "runs" / "faults"


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns 0 if all promises were kept, 1 if not, 2 for bad usage."""
    options = _parser().parse_args(arguments)
    options.out = options.out.resolve()  # runs are started in folders of their own
    code: int = options.run(options)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="faults", description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    rows = commands.add_parser("matrix", help="every fault, each in a run of its own")
    rows.add_argument("rows", nargs="*", metavar="ROW", help="by name, or how names begin")
    rows.add_argument("--list", action="store_true", help="say which rows there are, and stop")
    rows.add_argument("--quick", action="store_true", help="only some, that stand for all")
    rows.add_argument("--repeats", type=_positive, default=1, metavar="N")
    rows.add_argument("--anew", action="store_true", help="do again what was done before")
    rows.set_defaults(run=_matrix)
    many = commands.add_parser("cycles", help="kill at random and go on, again and again")
    many.add_argument("--count", type=_positive, default=500, metavar="N")
    many.add_argument("--lanes", type=_positive, default=2, metavar="N", help="runs side by side")
    many.set_defaults(run=_cycles)
    long = commands.add_parser("soak", help="one long run with growth and faults")
    long.add_argument("--minutes", type=float, default=60.0, metavar="M")
    long.add_argument(
        "--between", type=float, default=60.0, metavar="S", help="from fault to fault"
    )
    long.set_defaults(run=_soak)
    last = commands.add_parser("publish", help="write the last results into docs/reliability.md")
    last.set_defaults(run=_publish)
    for command in (rows, many, long, last):
        command.add_argument("-o", "--out", type=Path, default=OUT, metavar="DIR")
    for command in (rows, many, long):
        command.add_argument("--seed", type=int, default=0)
    return parser


def _positive(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: write a whole number from 1 on")
    return int(text)


def _matrix(options: argparse.Namespace) -> int:
    try:
        rows = matrix.chosen(options.rows, options.quick)
    except ValueError as error:
        print(f"faults: {error}", file=sys.stderr)
        return 2
    if options.list:
        for row in rows:
            print(f"{row.name:22} {row.group}{' (quick)' if row.quick else ''}")
        return 0
    findings = matrix.run(rows, options.out, options.repeats, options.seed, options.anew)
    chosen = [found for found in findings if found.row in {row.name for row in rows}]
    found = matrix.summary(chosen)
    print(f"{found['kept']} of {found['tried']} kept all promises; {options.out / matrix.FILE}")
    return 0 if found["kept"] == found["tried"] else 1


def _cycles(options: argparse.Namespace) -> int:
    done = cycles.run(options.out, options.count, options.lanes, options.seed)
    print(cycles.sentence(done))
    return int(any(cycle.problems for cycle in done))


def _soak(options: argparse.Namespace) -> int:
    result = soak.run(options.out, options.minutes, options.between, options.seed)
    print(soak.sentence(result))
    print(soak.table(result))
    return int(bool(result["problems"]))


def _publish(options: argparse.Namespace) -> int:
    publish.publish(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
