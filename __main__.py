"""`python -m terrazzo` is the `terrazzo` command, for launchers of modules, as in `torchrun -m terrazzo train`."""

from terrazzo.tools.cli import main

if __name__ == "__main__":
    main()
