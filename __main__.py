"""`python -m terrazzo` is the `terrazzo` command, for launchers that run modules: `torchrun -m terrazzo train`."""

from terrazzo.tools.cli import main

if __name__ == "__main__":
    main()
