"""Files of other tools as records of ours. A reader a tool; none needs the tool itself.

A reader is a module with `NAME`, `NAMES` (what the tool's figures are called here), `recognises`
and `read`. What has rows for requests becomes rows; what has only sums is kept under `source`, by
the tool's own names, because the same name means different things.
"""

from __future__ import annotations

from types import ModuleType
from typing import Final

from penstock.measure.results.readers import aiperf, guidellm, llmperf, lm_eval, vllm_bench

READERS: Final[dict[str, ModuleType]] = {
    module.NAME: module for module in (guidellm, aiperf, vllm_bench, lm_eval, llmperf)
}
