"""How well does the small classifier, whose features measure samples, tell MNIST's digits apart?

    python benchmarks/mnist_features.py FOLDER_OF_MNIST

Trains it in about two minutes on two cores, and prints its accuracy on the test images: as they are, and
padded to 32 x 32. It is saved, in under 1 MB, in a folder that `gaussnet.metrics.load_extractor` opens.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from gaussnet import ImageData, open_images
from gaussnet.hub import WEIGHTS_NAME, record
from gaussnet.metrics import SmallClassifier

OUT = Path(__file__).parents[1] / "tests" / "fixtures" / "mnist_features"
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


def main() -> None:
    """Trains, prints the accuracy and saves."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", help="a folder of MNIST's four files, or torchvision:MNIST")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the classifier")
    arguments = parser.parse_args()

    torch.manual_seed(0)  # the initialisation of a network takes no generator
    model, start = SmallClassifier(), time.perf_counter()
    train(model, open_images(arguments.path), seed=0)
    seconds = time.perf_counter() - start
    test = open_images(arguments.path, split="test")
    images, labels = test.tensor(), test[range(len(test))][1]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    accuracies = {
        "28 x 28": accuracy(model, images, labels),
        "32 x 32": accuracy(model, F.pad(images, (2,) * 4, value=-1.0), labels),
    }
    for size, value in accuracies.items():
        print(f"test accuracy at {size}: {value:.2%}")
    print(f"{parameters} parameters, {model.num_features} features, trained in {seconds:.0f} s")

    data = {"name": "MNIST", "test accuracy": accuracies["28 x 28"]}
    settings = {"epochs": EPOCHS, "batch": BATCH, "rate": RATE, "decay": DECAY, "shift": SHIFT}
    model.provenance = record(data, settings)
    (arguments.out / "README.md").unlink(missing_ok=True)  # save_pretrained keeps one that is there
    model.save_pretrained(arguments.out)
    print(f"{arguments.out}: {(arguments.out / WEIGHTS_NAME).stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
