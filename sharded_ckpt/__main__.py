"""`python -m sharded_ckpt` is `sharded-ckpt`."""

from __future__ import annotations

import sys

from sharded_ckpt.cli import main

if __name__ == "__main__":
    sys.exit(main())
