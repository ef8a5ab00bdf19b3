"""`python -m ist`: the command, for `accelerate launch -m ist train …` and `torchrun -m ist train …`."""

import sys

from .cli.main import main

if __name__ == "__main__":
    sys.exit(main())
