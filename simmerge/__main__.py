"""`python -m simmerge` is the command line."""

from simmerge.cli import run

if __name__ == "__main__":
    run()
