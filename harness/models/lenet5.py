"""LeNet-5 (LeCun, Bottou, Bengio, Haffner 1998, figure 2) in the form commonly trained today."""

from __future__ import annotations

from torch import Tensor, nn

from harness.errors import ConfigError


class LeNet5(nn.Module):
    """conv 5×5 (6) - pool - conv 5×5 (16) - pool - 120 - 84 - classes: ReLU and max-pooling.

    The first convolution pads by 2, so that 28 × 28 stands in for the paper's 32 × 32. For one
    channel of 28 × 28 and 10 classes it has 61,706 parameters.
    """

    def __init__(
        self, num_classes: int, shape: tuple[int, int, int], *, batch_norm: bool = False
    ) -> None:
        """Images are ``shape`` = (C, H, W); ``batch_norm``: after each convolution. Raises
        ConfigError if nothing would be left of the images."""
        super().__init__()
        channels, height, width = shape
        if channels < 1 or height < 12 or width < 12:
            raise ConfigError(
                f"model.name lenet5 needs images of at least 1 × 12 × 12 (C × H × W), not "
                f"{channels} × {height} × {width}"
            )
        rows, columns = ((side // 2 - 4) // 2 for side in (height, width))
        self.features = nn.Sequential(
            nn.Conv2d(channels, 6, kernel_size=5, padding=2),
            *([nn.BatchNorm2d(6)] if batch_norm else []),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(6, 16, kernel_size=5),
            *([nn.BatchNorm2d(16)] if batch_norm else []),
            nn.ReLU(),
            nn.MaxPool2d(2),
        )
        self.classifier = nn.Sequential(
            nn.Flatten(),
            nn.Linear(16 * rows * columns, 120),
            nn.ReLU(),
            nn.Linear(120, 84),
            nn.ReLU(),
            nn.Linear(84, num_classes),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Logits (m, classes) of float images (m, C, H, W)."""
        logits: Tensor = self.classifier(self.features(images))
        return logits
