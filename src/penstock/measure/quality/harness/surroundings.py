"""What lm-evaluation-harness finds around it: seeds, an offline hub, and no bars of its own."""

from __future__ import annotations

import logging
import os
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

SEED, NUMPY_SEED = 0, 1234  # lm-eval's defaults, which published scores have


def stay_offline() -> None:
    """Keep the hub's libraries from the network, whether or not they are imported."""
    for variable in ("HF_DATASETS_OFFLINE", "HF_HUB_OFFLINE", "HF_EVALUATE_OFFLINE"):
        os.environ[variable] = "1"
    for module, name in (
        ("datasets.config", "HF_DATASETS_OFFLINE"),
        ("datasets.config", "HF_HUB_OFFLINE"),
        ("huggingface_hub.constants", "HF_HUB_OFFLINE"),
        ("evaluate.config", "HF_EVALUATE_OFFLINE"),
    ):
        if module in sys.modules:
            setattr(sys.modules[module], name, True)


@contextmanager
def seeded() -> Iterator[None]:
    """lm-eval's seeds, which tasks draw from; the caller's generators are left as they were."""
    import numpy as np

    states = random.getstate(), np.random.get_state()  # noqa: NPY002  # what tasks draw from
    random.seed(SEED)
    np.random.seed(NUMPY_SEED)  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002


@contextmanager
def quiet() -> Iterator[None]:
    """What lm-eval says is told in marks; no bars of its own where stderr is no terminal."""
    import datasets
    from tqdm import tqdm

    logger = logging.getLogger("lm_eval")
    level, bars, before = logger.level, datasets.is_progress_bar_enabled(), tqdm.__init__

    def _disabled(bar: Any, *args: Any, **kwargs: Any) -> None:
        before(bar, *args, **{**kwargs, "disable": True})

    logger.setLevel(logging.ERROR)
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
        tqdm.__init__ = _disabled
    try:
        yield
    finally:
        logger.setLevel(level)
        tqdm.__init__ = before
        if bars:
            datasets.enable_progress_bars()
