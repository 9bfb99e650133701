"""`make app`: the notebooks of this folder as pages; see nbs/10_compare/11_serve.ipynb."""

import sys
from pathlib import Path

from smfnet.compare.serve import main

if __name__ == "__main__":
    sys.exit(main(folder=Path(__file__).resolve().parent))
