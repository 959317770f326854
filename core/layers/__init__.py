"""Modules with parameters over `manyheads.core.ops`, one idea a file."""

from manyheads.core.layers.attention import MultiHeadAttention
from manyheads.core.layers.deltanet import DeltaNet, DeltaNetState
from manyheads.core.layers.hydra import Hydra
from manyheads.core.layers.local_attention import LongformerAttention
from manyheads.core.layers.mamba import BidirectionalMamba, Mamba, MambaState
from manyheads.core.layers.mamba2 import Mamba2
from manyheads.core.layers.mlp import GatedMlp, Mlp
from manyheads.core.layers.norm import CRMSNorm, LayerNorm, RMSNorm
from manyheads.core.layers.position_bias import AlibiBias, BucketBias, RelativePositionBias
from manyheads.core.layers.positions import LearnedPositions, RotaryPositions, SinusoidalPositions
from manyheads.core.layers.s4 import S4, S4D, S4State
from manyheads.core.layers.transformer import PreNormBlock, PreNormStack

__all__ = [
    "S4",
    "S4D",
    "AlibiBias",
    "BidirectionalMamba",
    "BucketBias",
    "CRMSNorm",
    "DeltaNet",
    "DeltaNetState",
    "GatedMlp",
    "Hydra",
    "LayerNorm",
    "LearnedPositions",
    "LongformerAttention",
    "Mamba",
    "Mamba2",
    "MambaState",
    "Mlp",
    "MultiHeadAttention",
    "PreNormBlock",
    "PreNormStack",
    "RMSNorm",
    "RelativePositionBias",
    "RotaryPositions",
    "S4State",
    "SinusoidalPositions",
]
