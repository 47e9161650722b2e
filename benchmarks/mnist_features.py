"""How well does the small classifier, whose features measure samples, tell MNIST's digits apart?

    python benchmarks/mnist_features.py --mnist FOLDER [--evaluate FOLDER | --out FOLDER]

Trains it in about two minutes on two cores, or takes one that was saved before, and prints its accuracy on
the test images: as they are, and padded to 32 x 32. It is saved, in under 1 MB, in a folder that
`gaussnet.metrics.load_extractor` opens, such as tests/fixtures/mnist_features.
"""

from __future__ import annotations

import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from results import Record, parser
from torch import Tensor

from gaussnet import ImageData, from_pretrained, open_images
from gaussnet.hub import WEIGHTS_NAME
from gaussnet.hub import record as provenance
from gaussnet.metrics import SmallClassifier

EPOCHS, BATCH, RATE, DECAY = 5, 128, 4e-3, 0.02
SHIFT = 2  # pixels, each way: digits at all places of a canvas of 32


def train(model: SmallClassifier, data: ImageData, seed: int = 0) -> None:
    """Trains the classifier by AdamW, with a rate that rises and falls once, on shifted images."""
    images, labels = data.tensor(), data[range(len(data))][1]
    images = F.pad(images, (2 * SHIFT,) * 4, value=-1.0)
    steps = EPOCHS * math.ceil(len(images) / BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for epoch in range(EPOCHS):
        total, start = 0.0, time.perf_counter()
        for index in torch.randperm(len(images), generator=generator).split(BATCH):
            loss = F.cross_entropy(
                model(shifted(images[index], generator)), labels[index], label_smoothing=0.05
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += float(loss.detach()) * len(index)
        seconds = time.perf_counter() - start
        print(f"epoch {epoch + 1}: loss {total / len(images):.4f}, {seconds:.0f} s", flush=True)
    model.eval()


def shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """The images (B, C, H + 4 SHIFT, W + 4 SHIFT), cut by 2 SHIFT at a random place of the batch's."""
    top, left = torch.randint(2 * SHIFT + 1, (2,), generator=generator).tolist()
    return images[..., top : top + images.shape[-2] - 2 * SHIFT, left : left + images.shape[-1] - 2 * SHIFT]


@torch.no_grad()
def accuracy(model: SmallClassifier, images: Tensor, labels: Tensor) -> float:
    """The share of images whose class is found."""
    found = torch.cat([model(batch).argmax(1) for batch in images.split(500)])
    return float((found == labels).double().mean())


def save(model: SmallClassifier, accuracy: float, folder: Path) -> None:
    """Saves the classifier with what it was made from."""
    settings = {"epochs": EPOCHS, "batch": BATCH, "rate": RATE, "decay": DECAY, "shift": SHIFT}
    model.provenance = provenance({"name": "MNIST", "test accuracy": accuracy}, settings)
    (folder / "README.md").unlink(missing_ok=True)  # save_pretrained keeps one that is there
    model.save_pretrained(folder)
    print(f"{folder}: {(folder / WEIGHTS_NAME).stat().st_size / 1e6:.2f} MB")


def main() -> None:
    """Trains, prints the accuracy and saves."""
    made = parser(__doc__)
    made.add_argument("--mnist", required=True, help="a folder of MNIST's four files, or torchvision:MNIST")
    made.add_argument("--evaluate", type=Path, help="folder of a classifier, in place of training one")
    made.add_argument("--out", type=Path, help="folder to save the classifier in")
    options = made.parse_args()
    record = Record(options)
    torch.set_num_threads(options.threads)

    if options.evaluate:
        model = from_pretrained(options.evaluate).eval()
        assert isinstance(model, SmallClassifier)
    else:
        torch.manual_seed(0)  # the initialisation of a network takes no generator
        model = SmallClassifier()
        train(model, open_images(options.mnist), seed=0)
    test = open_images(options.mnist, split="test")
    images, labels = test.tensor(), test[range(len(test))][1]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    record.text(f"{parameters} parameters, {model.num_features} features\n")
    sizes = {"28 x 28": images, "32 x 32": F.pad(images, (2,) * 4, value=-1.0)}
    accuracies = {
        size: record.number(
            f"test accuracy on MNIST at {size}", 100 * accuracy(model, pixels, labels), ">= 98.5", unit="%"
        )
        for size, pixels in sizes.items()
    }
    record.table(["test images", "accuracy"], ([size, f"{value:.2f}%"] for size, value in accuracies.items()))
    if options.out:
        save(model, accuracies["28 x 28"] / 100, options.out)
    record.close()


if __name__ == "__main__":
    main()
