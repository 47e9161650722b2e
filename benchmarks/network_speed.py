"""What does a training step of our U-Nets cost, against NVlabs/edm's own modules?

    git clone https://github.com/NVlabs/edm && git -C edm checkout 008a4e5
    python benchmarks/network_speed.py --edm edm [--repeats 15] [--compile]

Forward and backward pass in training mode, dropout on, float32, of two networks with the same weights, in one
process and in turn; ratios of the medians. The memory column is the peak of what a step allocates. Of the
checkout only training/networks.py is imported.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from results import Record, parser
from timing import Call, compare, peak_memory
from torch import Tensor, nn

from gaussnet.networks import DhariwalUNet, SongUNet

SIZE = {"img_resolution": 32, "dropout": 0.13}
# name: class, arguments, batch, how many times faster it should be
CASES: dict[str, tuple[type[nn.Module], dict[str, Any], int, str]] = {
    "mini-EDM MNIST (16; 1 2 3 4; 1 block), batch 128": (
        SongUNet,
        {
            "in_channels": 1,
            "out_channels": 1,
            "model_channels": 16,
            "channel_mult": [1, 2, 3, 4],
            "num_blocks": 1,
            "attn_resolutions": [],
        },
        128,
        ">= 1.2",
    ),
    "mini-EDM CIFAR (96; 1 2 2; 2 blocks; attention at 16), batch 16": (
        SongUNet,
        {
            "in_channels": 3,
            "out_channels": 3,
            "model_channels": 96,
            "channel_mult": [1, 2, 2],
            "num_blocks": 2,
            "attn_resolutions": [16],
        },
        16,
        ">= 1.08",
    ),
    "ADM (64; 1 2 2; 1 block; attention at 16, 8), batch 16": (
        DhariwalUNet,
        {
            "in_channels": 3,
            "out_channels": 3,
            "model_channels": 64,
            "channel_mult": [1, 2, 2],
            "num_blocks": 1,
            "attn_resolutions": [16, 8],
        },
        16,
        "",
    ),
}


def import_networks(checkout: str) -> ModuleType:
    """training/networks.py of the checkout, without the decorator that makes its classes picklable."""
    torch_utils, persistence = ModuleType("torch_utils"), ModuleType("torch_utils.persistence")
    persistence.persistent_class = lambda cls: cls  # pyright: ignore[reportAttributeAccessIssue]
    torch_utils.persistence = persistence  # pyright: ignore[reportAttributeAccessIssue]
    sys.modules |= {"torch_utils": torch_utils, "torch_utils.persistence": persistence}
    sys.path.insert(0, checkout)
    return import_module("training.networks")


def step(net: Any, x: Tensor, noise_labels: Tensor) -> Call:
    """Forward and backward pass."""

    def call() -> None:
        net.zero_grad(set_to_none=True)
        net(x, noise_labels, None).square().mean().backward()

    return call


def rows(record: Record, theirs: ModuleType) -> Iterator[list[str]]:
    """A row for each network and mode."""
    for name, (cls, config, batch, bound) in CASES.items():
        torch.manual_seed(0)
        reference: nn.Module = getattr(theirs, cls.__name__)(**SIZE, **config)
        with torch.no_grad():  # awake: no layer is zero
            for parameter in reference.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.02)
        ours = cls(**SIZE, **config)
        ours.load_state_dict(reference.state_dict())
        x = torch.randn(batch, config["in_channels"], 32, 32)
        noise_labels = torch.randn(batch)
        with torch.no_grad():
            outs = [net.eval()(x, noise_labels, None) for net in (reference, ours)]
        difference = ((outs[0] - outs[1]).abs().max() / outs[0].std()).item()
        for mode in ["eager", *(["compiled"] if record.options.compile else [])]:
            nets = {"theirs": reference.train(), "ours": ours.train()}
            if mode == "compiled":
                nets = {key: torch.compile(net) for key, net in nets.items()}
            calls = {key: step(net, x, noise_labels) for key, net in nets.items()}
            times = compare(calls, record.options.repeats)
            memory = {key: peak_memory(call) for key, call in calls.items()}
            asked = bound if mode == "eager" else ""
            faster = record.number(
                f"{name.partition(' (')[0]}, {mode} training step: times faster",
                times["theirs"] / times["ours"],
                asked,
                "NVlabs/edm's modules",
                headline=bool(asked),
            )
            sizes = [f"{memory[key]:.0f}" for key in ("ours", "theirs")]
            yield [name, mode, f"{faster:.2f}", *sizes, f"{difference:.1e}"]


def main() -> None:
    """Prints the table."""
    made = parser(__doc__)
    made.add_argument("--edm", required=True, help="checkout of NVlabs/edm")
    made.add_argument("--repeats", type=int, default=15)
    made.add_argument("--compile", action="store_true", help="compile both, too (minutes)")
    record = Record(made.parse_args())
    torch.set_num_threads(record.options.threads)
    head = ["network", "mode", "times faster", "memory, MB", "NVlabs/edm's memory, MB", "largest difference"]
    record.table(head, rows(record, import_networks(record.options.edm)))
    record.close()


if __name__ == "__main__":
    main()
