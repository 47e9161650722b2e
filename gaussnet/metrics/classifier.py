r"""A small classifier of grey images, whose penultimate features measure samples of MNIST-like data.

With x + 1 in place of x, so that the zeros around a convolution are background:

    h = relu(norm(conv(h))),    once for each entry of `widths`
    features = mean of h over all pixels,    logits = W features + w

Images smaller than `img_resolution` are padded with background on all sides: one of 28 x 28 pixels and the
same one padded to 32 x 32 have the same features. Larger ones are taken as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch.nn.functional as F
from huggingface_hub import ModelCard, ModelCardData
from torch import Tensor, nn

from gaussnet.hub import Pretrained, tell

CARD = """---
{{ card_data }}
---

# Classifier of {{ classes }} kinds of grey images

Its {{ features }} penultimate features measure samples of such images:
`gaussnet.metrics.load_extractor` takes the path of this folder.
{%- for name, text in provenance.items() %}

## {{ name }}

{{ text }}
{% endfor -%}
"""


class SmallClassifier(Pretrained):
    """Convolutions with batch norm, the mean over all pixels, and one linear layer.

    Args:
        num_classes: classes to tell apart.
        in_channels: of the images.
        img_resolution: smaller images are padded with -1 to this side.
        widths: channels of the convolutions. The first one, with 5 x 5 pixels, and every other one after it
            halve the sides; the last entry is the number of features.

    Raises:
        ValueError: if a number is below 1, or there are no widths.

    Example:
        >>> import torch
        >>> classifier, x = SmallClassifier().eval(), torch.rand(2, 1, 28, 28)
        >>> padded = F.pad(x, (2, 2, 2, 2), value=-1.0)  # with background, to 32 x 32
        >>> torch.equal(classifier.features(x), classifier.features(padded))
        True
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_channels: int = 1,
        img_resolution: int = 32,
        widths: Sequence[int] = (16, 32, 64, 64, 96),
    ) -> None:
        super().__init__()
        self.config: dict[str, Any] = {
            "num_classes": num_classes,
            "in_channels": in_channels,
            "img_resolution": img_resolution,
            "widths": list(widths),
        }
        for name, value in self.config.items():
            if min(value if name == "widths" else [value], default=0) < 1:
                raise ValueError(f"{name}: got {value!r}, expected at least 1")
        layers: list[nn.Module] = []
        for i, (before, width) in enumerate(zip((in_channels, *widths), widths, strict=False)):
            side = 3 if i else 5
            stride = 1 + (i % 2 == 0)
            layers += [
                nn.Conv2d(before, width, side, stride, padding=side // 2, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(),
            ]
        self.body: nn.Sequential = nn.Sequential(*layers)
        self.head: nn.Linear = nn.Linear(widths[-1], num_classes)

    @property
    def num_features(self) -> int:
        """Length of the features."""
        return self.head.in_features

    def features(self, x: Tensor) -> Tensor:
        """Penultimate features (B, num_features) of images (B, in_channels, H, W) in [-1, 1].

        Raises:
            ValueError: if the images are of another shape.
        """
        channels, side = self.config["in_channels"], self.config["img_resolution"]
        if x.ndim != 4 or x.shape[1] != channels:
            raise ValueError(f"x: got shape {tuple(x.shape)}, expected (B, {channels}, H, W)")
        rows, columns = (max(0, side - size) for size in x.shape[2:])
        border = (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2)
        return self.body(F.pad(x + 1, border)).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, num_classes) of images (B, in_channels, H, W) in [-1, 1]."""
        return self.head(self.features(x))

    def to_arguments(self) -> dict[str, Any]:
        """The constructor's arguments, for config.json."""
        return dict(self.config)

    @classmethod
    def from_arguments(cls, arguments: Mapping[str, Any]) -> Self:
        """A classifier of the same architecture, with new weights."""
        return cls(**arguments)

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """The README.md of a saved classifier."""
        return ModelCard.from_template(
            card_data=ModelCardData(library_name="gaussnet", tags=["image-classification"], license=None),
            template_str=CARD,
            classes=self.config["num_classes"],
            features=self.num_features,
            provenance={name: tell(value) for name, value in self.provenance.items()},
            **kwargs,
        )
