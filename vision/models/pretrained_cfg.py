"""What evaluation needs beside a model, by the names of timm's `pretrained_cfg`."""

from __future__ import annotations

from typing import Any

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CIFAR10 = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))

Statistics = tuple[tuple[float, ...], tuple[float, ...]]


def evaluation(
    input_size: tuple[int, int, int],
    statistics: Statistics,
    crop_pct: float,
    num_classes: int,
    first_conv: str,
    classifier: str,
) -> dict[str, Any]:
    """Return a model's evaluation settings.

    Args:
        input_size: Channels, height, width.
        statistics: Mean and standard deviation of the channels, of values in 0 to 1.
        crop_pct: Share of the resized image that the centre crop keeps.
        num_classes: Of the published classifier.
        first_conv, classifier: The modules that other channels or classes replace.
    """
    mean, std = statistics
    if input_size[0] != len(mean):  # of other channels nothing is known
        mean, std = (0.5,) * input_size[0], (0.5,) * input_size[0]
    return {
        "input_size": input_size,
        "mean": mean,
        "std": std,
        "crop_pct": crop_pct,
        "crop_mode": "center",
        "interpolation": "bicubic",
        "num_classes": num_classes,
        "first_conv": first_conv,
        "classifier": classifier,
    }
