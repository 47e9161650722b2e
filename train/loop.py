"""The training loop: a flat function on Accelerate.

Every random number of a step is a pure function of (seed, step), drawn for the whole batch and sliced by
process. A resumed run therefore sees what an uninterrupted one would, and several processes train on what
one process with the same batch would.
"""

from __future__ import annotations

import logging
import math
import time
import warnings
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, broadcast, set_seed
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch import Tensor
from tqdm import tqdm

from gaussnet import BypassPrecond, ScoreProbe
from train.config import Config, ConfigError
from train.data import Data, batch_indices, generator_for, load_data
from train.models import build_network, fit_analytic, fit_gate, wrap
from train.report import files, write_report
from train.rundir import RunFolder, write_atomically

log = logging.getLogger("train")


def run(config: Config) -> None:
    """Trains, or resumes, or reports what a complete run has shown.

    Raises:
        ConfigError: if the configuration does not fit the data, the processes, or the run in its folder.
        RuntimeError: if the loss is not finite.
    """
    folder = RunFolder(config.out)
    folder.check(config)
    accelerator = Accelerator(
        mixed_precision=config.train.precision.value,
        log_with="tensorboard",
        project_dir=config.out,
        # The analytic buffers never change: nothing to broadcast in every step.
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
    is_main, device = accelerator.is_main_process, accelerator.device
    log.setLevel(logging.INFO if is_main else logging.ERROR)
    if config.train.batch % accelerator.num_processes:
        raise ConfigError(
            f"train.batch: expected a multiple of {accelerator.num_processes}, the number of processes, "
            f"got {config.train.batch}"
        )
    if folder.report.is_file():
        log.info(f"{folder.path} is complete: {config.train.steps} steps.\n\n{folder.report.read_text()}")
        return

    # Fit. Every process does.
    data = load_data(config.data)
    data = Data(data.train.to(device), data.heldout.to(device))
    log.info(
        f"data: {config.data.name}, {len(data.train)} training and {len(data.heldout)} held-out images "
        f"of shape {tuple(data.event_shape)}"
    )
    started = time.perf_counter()
    analytic = fit_analytic(config, data)
    gate = fit_gate(config, data, analytic.gaussian)
    log.info(
        f"fit: isotropic, Gaussian, {analytic.mixture.n_components}-component mixture, delta"
        f"{', gate' if gate else ''} in {time.perf_counter() - started:.1f} s"
    )

    # Build.
    set_seed(config.seed)
    network = build_network(config, data).to(device)
    model = wrap(config, network, analytic.gaussian, gate).to(device)
    optimizer = create_optimizer_v2(model, opt=config.train.optimizer, lr=config.train.lr, weight_decay=0.0)
    ema = ModelEmaV3(network, decay=config.train.ema_decay, use_warmup=True)
    ema_model = wrap(config, ema.module, analytic.gaussian, gate).to(device).eval()
    # Accelerate has no argument for the successor of broadcast_buffers yet.
    warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    broadcast(list(model.buffers()))  # one fit for all, whatever the machines round to
    accelerator.register_for_checkpointing(ema)
    probe = ScoreProbe(
        analytic.named(),
        data.train[: config.probe.queries],
        config.probe.sigmas,
        generator_for(config.seed, "probe"),
    )
    probe_steps = log_spaced(config.train.steps, config.probe.times)

    # Start or resume.
    first = 0
    checkpoint = folder.last_checkpoint()
    accelerator.wait_for_everyone()
    if checkpoint is not None:
        first = int(checkpoint.name.removeprefix("step-"))
        accelerator.load_state(str(checkpoint))
        log.info(f"resuming {folder.path} at step {first} of {config.train.steps}")
    if is_main:
        folder.start(config)
        folder.discard_after(first if checkpoint is not None else -1)
    accelerator.init_trackers("tensorboard")
    accelerator.wait_for_everyone()

    def measure(step: int) -> None:
        if not is_main or step not in probe_steps:
            return
        model.eval()
        for weights, probed in (("raw", model), ("ema", ema_model)):
            folder.log_probes({"step": step, "weights": weights, **row} for row in probe(probed))
        model.train()

    # Train.
    parameters = sum(parameter.numel() for parameter in network.parameters())
    log.info(
        f"training {parameters:,} parameters for {config.train.steps} steps of {config.train.batch} images "
        f"on {accelerator.num_processes} process(es), {device}"
    )
    wrapped.train()
    if first == 0:
        measure(0)
    losses, since = [], time.perf_counter()
    bar = tqdm(
        range(first, config.train.steps),
        initial=first,
        total=config.train.steps,
        disable=not is_main,
        unit="step",
        mininterval=1.0,
        dynamic_ncols=True,
    )
    for step in bar:
        lr = config.train.lr * min((step + 1) / max(config.train.warmup, 1), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss = step_loss(wrapped, model, data, config, step, accelerator)
        optimizer.zero_grad()
        accelerator.backward(loss)
        if config.train.clip is not None:
            accelerator.clip_grad_norm_(wrapped.parameters(), config.train.clip)
        optimizer.step()
        ema.update(network, step=step)
        losses.append(loss.detach())

        done = step + 1
        saves = done % config.checkpoint.every == 0 or done == config.train.steps
        # Before each checkpoint, too: none may hold a state whose loss was not looked at.
        if done % config.train.log_every == 0 or saves:
            mean = float(cast(Tensor, accelerator.reduce(torch.stack(losses).mean(), reduction="mean")))
            if not math.isfinite(mean):
                raise RuntimeError(
                    f"the loss is {mean} after step {done}; the last checkpoint is {folder.last_checkpoint()}"
                )
            now = time.perf_counter()
            speed = len(losses) * config.train.batch / (now - since)
            losses, since = [], now
            row = {"step": done, "loss": mean, "lr": lr, "images_per_second": speed}
            accelerator.log({name: value for name, value in row.items() if name != "step"}, step=done)
            if is_main:
                folder.log(row)
                bar.set_postfix(loss=f"{mean:.4f}", images_per_s=f"{speed:.0f}")
        measure(done)
        if saves:
            save_checkpoint(accelerator, folder, done, config)
    bar.close()

    # Report.
    if is_main:
        text = write_report(folder, config, data, analytic, ema_model)
        ema_model.provenance = provenance(config, data, text)
        ema_model.save_pretrained(folder.path)
        write_atomically(folder.report, text)  # last: with it, the run is complete
        names = ", ".join(path.name for path in files(folder))
        log.info(f"\n{text}\nwritten to {folder.path}: {names}")
    accelerator.wait_for_everyone()
    accelerator.end_training()


def provenance(config: Config, data: Data, report: str) -> dict[str, Any]:
    """The numbers of a run, which its model carries."""
    training = config.train
    return {
        "data": {"name": config.data.name, "training": len(data.train), "held out": len(data.heldout)},
        "training": {
            "steps": training.steps,
            "images": training.steps * training.batch,
            "batch": training.batch,
            "optimizer": training.optimizer,
            "lr": training.lr,
            "P_mean, P_std": [config.loss.P_mean, config.loss.P_std],
            "seed": config.seed,
        },
        "report": report,
    }


def step_loss(
    wrapped: torch.nn.Module,
    model: BypassPrecond,
    data: Data,
    config: Config,
    step: int,
    accelerator: Accelerator,
) -> Tensor:
    """This process's share of the weighted denoising loss of a step, ln sigma ~ N(P_mean, P_std^2)."""
    batch = config.train.batch
    generator = generator_for(config.seed, "noise", step, device=accelerator.device)
    indices = batch_indices(len(data.train), batch, step, config.seed)
    clean = data.train[indices.to(accelerator.device)]
    sigma = torch.randn(batch, generator=generator, device=clean.device) * config.loss.P_std
    sigma = torch.exp(sigma + config.loss.P_mean)
    noise = torch.randn(clean.shape, generator=generator, device=clean.device)
    share = batch // accelerator.num_processes
    mine = slice(accelerator.process_index * share, (accelerator.process_index + 1) * share)
    clean, sigma, noise = clean[mine], sigma[mine], noise[mine]
    # Dropout takes no generator: seed the global one, by process.
    torch.manual_seed(generator_for(config.seed, "dropout", step, accelerator.process_index).initial_seed())
    denoised = wrapped(clean + sigma[:, None, None, None] * noise, sigma)
    error = (denoised - clean).square().flatten(1).mean(1)
    return (model.weight(sigma) * error).mean()


def save_checkpoint(accelerator: Accelerator, folder: RunFolder, step: int, config: Config) -> None:
    """Saves model, EMA, optimizer, scaler and random states of all processes."""
    accelerator.wait_for_everyone()

    def write(path: Path) -> None:
        accelerator.save_state(str(path))
        accelerator.wait_for_everyone()

    folder.save_checkpoint(step, config.checkpoint.keep, write, accelerator.is_main_process)
    accelerator.wait_for_everyone()


def log_spaced(steps: int, times: int) -> set[int]:
    """0, and about `times` steps up to the last, evenly spaced in their logarithm."""
    return {0} | {round(float(step)) for step in torch.logspace(0, torch.log10(torch.tensor(steps)), times)}
