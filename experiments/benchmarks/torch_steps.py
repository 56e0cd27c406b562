"""The benchmark's networks and BiSAM's step in PyTorch, which this project does not install."""

import math
from collections.abc import Callable
from typing import Any

import torch  # pyright: ignore[reportMissingImports]
import torch.nn.functional as F  # noqa: N812 # pyright: ignore[reportMissingImports]
from torch import nn  # pyright: ignore[reportMissingImports]

RHO = 0.05
_INVERSE_E = 1 / math.e


def torch_convolution(n_in: int, n_out: int, size: int = 3, stride: int = 1) -> nn.Conv2d:
    """Returns a convolution without bias."""
    return nn.Conv2d(n_in, n_out, size, stride, size // 2, bias=False)


def torch_convolutions(n_in: int, n_out: int, stride: int) -> tuple[nn.Conv2d, nn.Conv2d]:
    """Returns the two 3x3 convolutions of a block."""
    return torch_convolution(n_in, n_out, stride=stride), torch_convolution(n_out, n_out)


class TorchCifarBlock(nn.Module):
    """See :class:`experiments.models.cifar_resnet.CifarBlock`."""

    def __init__(self, n_in: int, n_out: int, stride: int) -> None:
        super().__init__()
        self.first, self.norm_1 = (
            torch_convolution(n_in, n_out, stride=stride),
            nn.BatchNorm2d(n_out),
        )
        self.second, self.norm_2 = torch_convolution(n_out, n_out), nn.BatchNorm2d(n_out)
        self.stride, self.new_channels = stride, n_out - n_in

    def forward(self, x: Any) -> Any:
        """Returns the images of the next block."""
        y = self.norm_2(self.second(F.relu(self.norm_1(self.first(x)))))
        shortcut = x[:, :, :: self.stride, :: self.stride]
        return F.relu(y + F.pad(shortcut, (0, 0, 0, 0, 0, self.new_channels)))


class TorchWideBlock(nn.Module):
    """See :class:`experiments.models.wide_resnet.WideBlock`."""

    def __init__(self, n_in: int, n_out: int, stride: int) -> None:
        super().__init__()
        self.norm_1, self.first = (
            nn.BatchNorm2d(n_in),
            torch_convolution(n_in, n_out, stride=stride),
        )
        self.norm_2, self.second = nn.BatchNorm2d(n_out), torch_convolution(n_out, n_out)
        self.shortcut = torch_convolution(n_in, n_out, 1, stride) if n_in != n_out else None

    def forward(self, x: Any) -> Any:
        """Returns the images of the next block."""
        activated = F.relu(self.norm_1(x))
        y = self.second(F.relu(self.norm_2(self.first(activated))))
        return y + (x if self.shortcut is None else self.shortcut(activated))


def _blocks(block: Any, channels: tuple[int, ...], count: int) -> list[nn.Module]:
    n_in, made = 16, []
    for group, n_out in enumerate(channels):
        for number in range(count):
            made.append(block(n_in, n_out, 2 if group > 0 and number == 0 else 1))
            n_in = n_out
    return made


def cifar_resnet(depth: int) -> nn.Module:
    """Returns the network of :mod:`experiments.models.cifar_resnet`."""
    blocks = _blocks(TorchCifarBlock, (16, 32, 64), (depth - 2) // 6)
    first = [torch_convolution(3, 16), nn.BatchNorm2d(16), nn.ReLU()]
    last = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)]
    return nn.Sequential(*first, *blocks, *last)


def wide_resnet(depth: int, width: int) -> nn.Module:
    """Returns the network of :mod:`experiments.models.wide_resnet`."""
    channels = (16 * width, 32 * width, 64 * width)
    blocks = _blocks(TorchWideBlock, channels, (depth - 4) // 6)
    last = [nn.BatchNorm2d(channels[-1]), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(torch_convolution(3, 16), *blocks, *last, nn.Linear(channels[-1], 10))


def vgg19() -> nn.Module:
    """Returns the network of :mod:`experiments.models.vgg`."""
    layers, n_in = [], 3
    for n_out, count in zip((64, 128, 256, 512, 512), (2, 2, 4, 4, 4), strict=True):
        for _ in range(count):
            layers += [nn.Conv2d(n_in, n_out, 3, padding=1), nn.BatchNorm2d(n_out), nn.ReLU()]
            n_in = n_out
        layers.append(nn.MaxPool2d(2))
    layers.append(nn.Flatten())
    for _ in range(2):
        layers += [nn.Dropout(0.5), nn.Linear(512, 512), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(512, 10))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet20": lambda: cifar_resnet(20),
    "resnet56": lambda: cifar_resnet(56),
    "wrn28_2": lambda: wide_resnet(28, 2),
    "vgg19_bn": vgg19,
}


def torch_perturbation_loss(logits: Any, labels: Any) -> Any:
    """Returns BiSAM's -log: see :func:`bisam_jax.perturbation_loss`."""
    margins = logits - logits.gather(1, labels[:, None])
    bounds = 1 / (_INVERSE_E + (1 - _INVERSE_E) * torch.exp(-margins))
    return torch.log(bounds.sum(1)).mean()


def torch_step(name: str, images: Any, labels: Any) -> tuple[Callable[[], None], int]:
    """Returns a step of BiSAM, channels last, and the number of parameters.

    It runs on the first GPU, if there is one.

    Args:
        name: a key of `NETWORKS`.
        images: float32[batch, height, width, channels].
        labels: int[batch].
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = NETWORKS[name]().to(device, memory_format=torch.channels_last)  # pyright: ignore
    x = torch.from_numpy(images).to(device).permute(0, 3, 1, 2)  # which is channels last
    y = torch.from_numpy(labels).to(device).long()
    params = list(model.parameters())
    optimizer = torch.optim.SGD(params, 0.1, momentum=0.9, weight_decay=5e-4)

    def step() -> None:
        ascent = torch.autograd.grad(torch_perturbation_loss(model(x), y), params)
        with torch.no_grad():
            norm = torch.stack([g.square().sum() for g in ascent]).sum().sqrt()
            eps = [g * (RHO / (norm + 1e-12)) for g in ascent]
            for p, e in zip(params, eps, strict=True):
                p.add_(e)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y, label_smoothing=0.1).backward()
        with torch.no_grad():
            for p, e in zip(params, eps, strict=True):
                p.sub_(e)
        optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()

    return step, sum(p.numel() for p in params)
