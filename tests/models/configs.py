"""Small random configs for every registered architecture: the parity test draws from these.

An architecture that is registered and has no entry here fails the parity test.
"""

from __future__ import annotations

from tests.models.configs_dense import DENSE, Variants
from tests.models.configs_experts import EXPERTS

CONFIGS: dict[str, Variants] = DENSE | EXPERTS
