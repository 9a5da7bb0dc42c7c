"""``python -m beitv2_fast``: the command ``beitv2-fast``."""

from .cli import main

main()
