"""Families of the zoo on images and volumes."""

from __future__ import annotations

import torch
from architectures import cnn
from torch import nn

from families.family import NUM_CLASSES, Bars, Family, class_losses, measurements


class ResidualBlock(nn.Module):
    """Two 3×3 convolutions with group normalisation around a shortcut (He et al. 2016; Wu and He 2018)."""

    def __init__(self, num_in: int, num_out: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(num_in, num_out, 3, stride, padding=1, bias=False)
        self.first_norm = nn.GroupNorm(8, num_out)
        self.second = nn.Conv2d(num_out, num_out, 3, padding=1, bias=False)
        self.second_norm = nn.GroupNorm(8, num_out)
        same = num_in == num_out and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(num_in, num_out, 1, stride, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inside = torch.relu(self.first_norm(self.first(x)))
        return torch.relu(self.second_norm(self.second(inside)) + self.shortcut(x))


class ResNet(nn.Module):
    """A residual network for 32×32 images of three channels.

    Args:
        widths: Channels of each stage; every stage but the first halves the image.
        blocks: Residual blocks a stage.
    """

    def __init__(self, widths: tuple[int, ...], blocks: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, widths[0], 3, padding=1, bias=False)
        self.stem_norm = nn.GroupNorm(8, widths[0])
        layers, num_in = [], widths[0]
        for stage, width in enumerate(widths):
            for block in range(blocks):
                layers.append(ResidualBlock(num_in, width, 2 if stage and not block else 1))
                num_in = width
        self.blocks = nn.Sequential(*layers)
        self.head = nn.Linear(num_in, NUM_CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(torch.relu(self.stem_norm(self.stem(x)))).mean((-2, -1)))


def _mnist_cnn() -> nn.Module:
    """Build the network that Opacus' MNIST example trains (the same layers and sizes)."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 8, 2, padding=3),
        nn.ReLU(),
        nn.MaxPool2d(2, 1),
        nn.Conv2d(16, 32, 4, 2),
        nn.ReLU(),
        nn.MaxPool2d(2, 1),
        nn.Flatten(),
        nn.Linear(512, 32),
        nn.ReLU(),
        nn.Linear(32, NUM_CLASSES),
    )


def _volumes() -> nn.Module:
    return nn.Sequential(
        nn.Conv3d(1, 8, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool3d(2),
        nn.Conv3d(8, 16, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * 64, NUM_CLASSES),
    )


def _upsampling() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, 2, padding=1),
        nn.ReLU(),
        nn.ConvTranspose2d(8, 8, 4, 2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 64, NUM_CLASSES),
    )


def _instance_norm() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.InstanceNorm2d(8, affine=True),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.InstanceNorm2d(16, affine=True),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * 16, NUM_CLASSES),
    )


IMAGES = {
    "cnn": Family(title="CNN on 8×8", build=cnn, records=measurements(1, 8, 8), loss=class_losses, local_steps=10),
    "mnist-cnn": Family(
        title="CNN on 28×28 (Opacus' MNIST example)",
        build=_mnist_cnn,
        records=measurements(1, 28, 28),
        loss=class_losses,
    ),
    "resnet": Family(
        title="GroupNorm ResNet on 32×32×3",
        build=lambda: ResNet((16, 32, 64), 2),
        records=measurements(3, 32, 32),
        loss=class_losses,
        local_steps=1,
        shared_batch=256,
        bars=Bars(over_hooks=1.4, of_plain=0.8),
    ),
    "conv3d": Family(title="Conv3d on 8×8×8", build=_volumes, records=measurements(1, 8, 8, 8), loss=class_losses),
    "conv-transpose": Family(
        title="ConvTranspose2d on 8×8", build=_upsampling, records=measurements(1, 8, 8), loss=class_losses
    ),
    "instance-norm": Family(
        title="InstanceNorm on 8×8", build=_instance_norm, records=measurements(1, 8, 8), loss=class_losses
    ),
}
