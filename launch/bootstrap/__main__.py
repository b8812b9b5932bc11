"""The command line of the set-up: `python3 -m launch.bootstrap`."""

from __future__ import annotations

import sys

if sys.version_info < (3, 11):  # noqa: UP036 - before imports that older versions cannot do
    sys.exit(
        f"The harness needs Python 3.11 or later; {sys.executable} is {sys.version.split()[0]}"
    )

import argparse
import errno
from pathlib import Path

from .console import BootstrapError, Console
from .environment import CONSTRAINTS, ROOT, checked_extras
from .steps import Setup, horovod_only


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(prog="python3 -m launch.bootstrap", description=__doc__)
    result.add_argument("--venv", type=Path, default=ROOT / ".venv", help="default: .venv here")
    result.add_argument("--extras", default="train,dev", help="of pyproject.toml (train,dev)")
    only = result.add_mutually_exclusive_group()
    only.add_argument(
        "--horovod-only", action="store_true", help="Horovod into the active environment"
    )
    only.add_argument(
        "--constraints", action="store_true", help="where the pinned versions are, for pip's -c"
    )
    only.add_argument(
        "--print-key", action="store_true", help="what the wheel depends on, and its key"
    )
    return result


def print_key(setup: Setup) -> None:
    recipe = setup.recipe()
    for name, value in recipe.ingredients().items():
        print(f"{name}: {value}", file=sys.stderr)
    print(recipe.key())


def main() -> int:
    options = parser().parse_args()
    try:
        if options.constraints:
            print(CONSTRAINTS)
        elif options.horovod_only:
            horovod_only(Console())
        else:
            setup = Setup(options.venv.absolute(), checked_extras(options.extras), Console())
            print_key(setup) if options.print_key else setup.run()
    except BootstrapError as error:
        print(f"Set-up failed: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("Set-up interrupted; the next run goes on from here.", file=sys.stderr)
        return 130
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        print(f"Set-up failed: {'no disk space is left: ' if full else ''}{error}", file=sys.stderr)
    else:
        return 0
    return 1


if __name__ == "__main__":
    sys.exit(main())
