"""Images: classification, features, explanations. Importing this registers our models with timm.

`timm.create_model("vim_tiny_patch16_224")` works afterwards, whichever of the two is imported first.
"""

from manyheads.vision.registration import register

register()
