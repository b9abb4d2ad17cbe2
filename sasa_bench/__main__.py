"""`python -m sasa_bench`: the command line."""

from sasa_bench.cli import main

if __name__ == "__main__":
    main()
