"""Where `spac` and `python -m spac` begin. Imports late, so that Ctrl-C is quiet from the start."""

from __future__ import annotations

import sys


def main() -> None:
    try:
        from spac.cli import main as run
    except KeyboardInterrupt:
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
