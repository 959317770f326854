"""The table of the image data sets."""

from __future__ import annotations

from manyheads.core.datasets import DataSet, File

_FASHION = "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion"

DATASETS: tuple[DataSet, ...] = (
    DataSet(
        name="fashion_mnist",
        domain="vision",
        summary="Articles of clothing in 10 classes, 28 x 28, grey: 60,000 train and 10,000 test images",
        licence="MIT (Zalando SE)",
        files=(
            File(
                path="vision/fashion_mnist/train-images-idx3-ubyte",
                size=47040016,
                sha256="c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
                address=f"{_FASHION}/train-images-idx3-ubyte.gz",
            ),
            File(
                path="vision/fashion_mnist/train-labels-idx1-ubyte",
                size=60008,
                sha256="bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
                address=f"{_FASHION}/train-labels-idx1-ubyte.gz",
            ),
            File(
                path="vision/fashion_mnist/t10k-images-idx3-ubyte",
                size=7840016,
                sha256="5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
                address=f"{_FASHION}/t10k-images-idx3-ubyte.gz",
            ),
            File(
                path="vision/fashion_mnist/t10k-labels-idx1-ubyte",
                size=10008,
                sha256="0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
                address=f"{_FASHION}/t10k-labels-idx1-ubyte.gz",
            ),
        ),
        split="given",
        shape=(70000, 28, 28),
    ),
    DataSet(
        name="cifar10_10k",
        domain="vision",
        summary="CIFAR-10, a part: 10 classes, 32 x 32, colour: 10,000 train and 2,000 test images",
        licence="none stated (for local evaluation only; cite Krizhevsky 2009)",
        files=(
            File(
                path="vision/cifar10/cifar10_train_10000.parquet",
                size=3077760,
                sha256="d457350433bbe1a2fb501f5f67a561b286612f725069ff9b9399f67be1435c00",
            ),
            File(
                path="vision/cifar10/cifar10_test_2000.parquet",
                size=619620,
                sha256="ae64855879f9ec7d4493931043a0d0a054a3d16d50c4c368575d45c251d87c5f",
            ),
            File(
                path="vision/cifar10/classes.json",
                size=90,
                sha256="fcdc2e1a755ed3463be7e0a84987dac8d36a8636d40302c9b309ab53f8679071",
            ),
        ),
        split="given",
        shape=(12000, 32, 32, 3),
        columns=("image", "label", "name"),
    ),
    DataSet(
        name="imagenet_samples",
        domain="vision",
        summary="100 photos of ImageNet, one of every tenth class, to try a pretrained model on",
        licence="photos of their owners; ImageNet's terms: non-commercial research",
        files=(
            File(
                path="vision/imagenet_samples/labels.csv",
                size=6892,
                sha256="07c7daacacca7b1728b88cbb4bec5f029677404ce55c3f425f1dd88bb72b0efd",
            ),
            File(
                path="vision/imagenet_samples/imagenet_class_index.json",
                size=51573,
                sha256="5c16a2f85e11707cd0836b5a47865bd2ac1487e765f3cfc0883ff2ae608c3f3a",
            ),
        ),
        split="test only",
        shape=(100,),
        columns=("file", "class_index", "wnid", "name", "width", "height", "orig_width", "orig_height"),
    ),
)
