"""``peft.tuners.lora.layer``: a layer is of the class that PEFT's wrapper around it would have."""

from rankfold.lora.layers.attention import LoraMultiheadAttention as MultiheadAttention
from rankfold.lora.layers.conv import LoraConv1d as Conv1d
from rankfold.lora.layers.conv import LoraConv2d as Conv2d
from rankfold.lora.layers.conv import LoraConv3d as Conv3d
from rankfold.lora.layers.embedding import LoraEmbedding as Embedding
from rankfold.lora.layers.factors import LoraLayer
from rankfold.lora.layers.linear import LinearUpdates as Linear
from rankfold.lora.layers.parameters import ParameterFactors as ParamWrapper

__all__ = [
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "Embedding",
    "Linear",
    "LoraLayer",
    "MultiheadAttention",
    "ParamWrapper",
]
