"""`python -m spac` is the same as `spac`."""

from spac.cli import main

if __name__ == "__main__":
    main()
