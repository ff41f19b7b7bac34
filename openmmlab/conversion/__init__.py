"""Conversion: a trained ViT is taught to do without softmax attention.

`AttentionConversion` (`model`) is the mmengine model. It trains a student, the teacher with mixers in place of softmax
attention, in stages. A stage is a class (`stages`): what it trains, what it compares, and when.

    matrix   the matrices of mixers become like those of softmax attention              (`layerwise`)
    hidden   the outputs of attention layers become like the teacher's                  (`layerwise`)
    select   numbers learn which layers keep softmax attention                          (`selection`)
    distil   the whole student becomes like the whole teacher                           (`distil`, `adapters`)

The first two stages train every layer by itself, on the teacher's own tokens (`forcing`). All comparisons are in
`losses`. `sharing` lets student and teacher use the same memory for what they have in common.
`finishing` writes the student of a stage that trains more than the student.
"""

from terrazzo.openmmlab.conversion.fidelity import Fidelity
from terrazzo.openmmlab.conversion.finishing import StudentHook
from terrazzo.openmmlab.conversion.model import AttentionConversion

__all__ = ["AttentionConversion", "Fidelity", "StudentHook"]
