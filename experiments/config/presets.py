"""Published recipes to start from.

SGD, SAM and BiSAM on CIFAR as in BiSAM's paper (arXiv 2407.12993): 200 epochs of SGD with momentum
and a cosine schedule, label smoothing, crops, flips and Cutout; rho 0.05 on CIFAR-10 and 0.1 on
CIFAR-100. Hyperparameters that are not set here have the paper's values as defaults: learning rate
0.1, momentum 0.9, weight decay 5e-4; mu 1 for -log, mu 10 and alpha 0.1 for tanh. The authors'
script passes mu = 1 to both.
"""

import dataclasses

from experiments.config.config import Config

_RECIPE = dataclasses.replace(
    Config(),
    model="resnet56",
    epochs=200,
    batch_size=128,
    base="sgd",
    label_smoothing=0.1,
    crop_padding=4,
    flip=True,
    cutout=0.5,
)
_METHODS = {"sgd": "sgd", "sam": "sam", "bisam": "bisam-log", "bisam-tanh": "bisam-tanh"}

PRESETS = {
    f"{name}-{dataset}": dataclasses.replace(_RECIPE, dataset=dataset, method=method)
    for dataset in ("cifar10", "cifar100")
    for name, method in _METHODS.items()
}
# On CIFAR-10, rho is the methods' default, 0.05.
for name in _METHODS.keys() - {"sgd"}:
    PRESETS[f"{name}-cifar100"] = dataclasses.replace(PRESETS[f"{name}-cifar100"], rho=0.1)
