"""``beitv2-fast explore RUN``: a local page to see what the tokens of an image mean, and to play the mask game.

answers.py   what the page asks, answered by the models (``show.runs``) and the patches (``show.index``)
server.py    HTTP on 127.0.0.1
page/        the page: put together into one document that loads nothing from elsewhere
"""

from __future__ import annotations

from pathlib import Path

from ...config.show import ExploreConfig

__all__ = ["ExploreConfig", "explore"]


def explore(run: Path, config: ExploreConfig) -> int:
    """Index the data set, then serve the page until interrupted.

    Raises:
        UserError: no such run, no images, runs that do not belong together, a port in use.
    """
    from ..index import build_index
    from ..runs import open_runs
    from .answers import Answers  # these bring PIL and the models
    from .server import serve

    runs = open_runs(run, config)
    return serve(Answers(runs, build_index(runs, config), config.seed), config)
