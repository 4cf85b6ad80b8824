"""Models that write, without their head: for embeddings, or under a classifier of the last token.

What such a model is, the file of its kin with a head says.
"""

from __future__ import annotations

from dataclasses import replace

from penstock.layers.specs import ClassifierSpec
from penstock.models.config import ConfigReader
from penstock.models.spec import ModelSpec

_CLASSIFIES = "ForSequenceClassification"


def read(config: ConfigReader) -> ModelSpec:
    """Read the config of a `...Model` or of a `...ForSequenceClassification`."""
    from penstock.models.registry import read_from  # which knows this file

    name = config.architecture
    classifies = name.endswith(_CLASSIFIES)
    kin = name.removesuffix(_CLASSIFIES if classifies else "Model") + "ForCausalLM"
    spec = read_from(config.renamed(kin))
    classifier = None
    if classifies:
        classifier = ClassifierSpec(num_labels=config.num_labels, output="score", has_bias=False)
    return replace(
        spec,
        architecture=name,
        has_head=False,
        classifier=classifier,
        names=replace(
            spec.names,
            prefixes=(*spec.names.prefixes, ("model.", "")),
            ignored=(*spec.names.ignored, "lm_head."),
        ),
    )
