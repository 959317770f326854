"""Images: classification, features, explanations. Importing this registers our models with timm.

`timm.create_model("vim_tiny_patch16_224")` works afterwards, whichever of the two is imported first.
"""

from manyheads.vision.models.core_attention import with_core_attention
from manyheads.vision.models.timm_weights import load_timm_weights
from manyheads.vision.registration import register

__all__ = ["load_timm_weights", "with_core_attention"]

register()
