"""The training loop: a flat function on Accelerate.

A run is a pure function of its configuration: killed at any moment and started again, it goes on from its
last whole checkpoint and ends with the same weights, and several processes train on what one would.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, broadcast, broadcast_object_list, set_seed
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from train.augment import check_images
from train.callbacks import Heldout, Probes, Run, Samples
from train.checkpoints import check_data, data_facts, load_checkpoint
from train.config import Config, ConfigError
from train.data import Data, StepSampler, generator_for, load_data, loader, reading
from train.ema import EMA
from train.frechet import Frechet
from train.loss import denoising_loss, make_batch
from train.models import build_network, fit_analytic, fit_folds, fit_wrapping, remember_less, wrap
from train.optim import Interrupt, learning_rate, zero_bad_gradients
from train.report import provenance, write_report
from train.rundir import RunFolder, files
from train.writing import RunError, naming, write_atomically

log = logging.getLogger("train")

T = TypeVar("T")


def run(config: Config) -> None:
    """Trains, or resumes, or reports what a complete run has shown.

    Raises:
        ConfigError: if the configuration does not fit the data, the processes, or the run in its folder, or
            another run is writing there.
        RunError: if gradients are not finite for many steps in a row, and the state is saved; if the weights
            are not, and it is not; if an image cannot be read.
        OSError: if a file cannot be written.
    """
    folder = RunFolder(config.out)
    folder.check(config)
    accelerator = make_accelerator(config)
    log.setLevel(logging.INFO if accelerator.is_main_process else logging.ERROR)
    if folder.report.is_file():
        log.info(f"{folder.path} is complete: {config.train.steps} steps.\n\n{folder.report.read_text()}")
        return
    from_main(accelerator, folder.lock)
    fits = logging.getLogger("gaussnet.fit")
    level = fits.level
    fits.setLevel(logging.ERROR)  # components of few images have fewer axes than asked for: no news in a run
    try:
        fit_and_train(config, folder, accelerator)
    finally:
        fits.setLevel(level)
        folder.unlock()


def fit_and_train(config: Config, folder: RunFolder, accelerator: Accelerator) -> None:
    """Trains in a folder that is this run's alone."""
    is_main, device, world = accelerator.is_main_process, accelerator.device, accelerator.num_processes
    make_optimizer(config, nn.Linear(1, 1))  # one that cannot be made is told before anything is computed
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.train.tf32

    # Fit.
    data = load_data(config.data)
    try:
        check_images(config.augment, data.event_shape)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    log.info(f"data: {data.train}; {len(data.heldout)} held out")
    started = time.perf_counter()
    analytic = fit_analytic(config, data, accelerator)
    wrapping = fit_wrapping(config, data, analytic, accelerator)
    cross = fit_folds(config, data, accelerator)
    told = f", those of training in {len(cross.denoisers)} folds," if cross is not None else ""
    log.info(f"fit: {', '.join(analytic.named())}{told} in {time.perf_counter() - started:.1f} s")

    # Build.
    set_seed(config.seed)
    network = build_network(config, data).to(device)
    averages = {
        halflife: EMA(network, 1000 * halflife, config.ema.rampup) for halflife in config.ema.halflife_kimg
    }
    if config.network.checkpoint:
        remember_less(network)
    model = wrap(config, network, wrapping).to(device)
    if config.train.compile:
        torch.compiler.reset()  # else another network of this process, of another size, makes shapes symbolic
        network.compile()
    optimizer = make_optimizer(config, model)
    # Accelerate has no argument for the successor of broadcast_buffers yet.
    warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    for fitted in (model, *([] if cross is None else [cross])):
        broadcast(list(fitted.buffers()))  # one fit for all, whatever the machines round to
    for average in averages.values():
        accelerator.register_for_checkpointing(average)
    averaged = {k: wrap(config, ema.network, wrapping).to(device).eval() for k, ema in averages.items()}
    state = Run(config, folder, accelerator, data, analytic.gaussian, model, averaged)
    probes = Probes(state, analytic)
    callbacks = (probes, Heldout(state), Samples(state), Frechet(state))

    # Start or resume.
    facts = data_facts(data, analytic.gaussian)
    checkpoint = from_main(accelerator, folder.last_checkpoint)
    first = 0 if checkpoint is None else int(checkpoint.name.removeprefix("step-"))
    if checkpoint is not None:
        check_data(checkpoint, facts)
        load_checkpoint(accelerator, checkpoint, model, optimizer)
        log.info(f"resuming {folder.path} at step {first} of {config.train.steps}")
    if is_main:
        folder.start(config)
        folder.discard_after(first if checkpoint is not None else -1)
    accelerator.init_trackers("gaussnet", config=_flat(config))
    accelerator.wait_for_everyone()

    def look(step: int) -> None:
        model.eval()
        for callback in callbacks:
            callback(step)
        model.train()

    # Train.
    parameters = sum(parameter.numel() for parameter in network.parameters())
    log.info(
        f"training {parameters:,} parameters for {config.train.steps} steps of {config.train.batch} images "
        f"on {world} process(es), {device}"
    )
    share = config.train.batch // world
    mine = slice(accelerator.process_index * share, (accelerator.process_index + 1) * share)
    batches = iter(load_batches(config, data, first, mine, device))
    wrapped.train()
    if first == 0:
        look(0)
    bar = tqdm(
        range(first, config.train.steps),
        initial=first,
        total=config.train.steps,
        disable=not is_main,
        unit="step",
        mininterval=1.0,
        dynamic_ncols=True,
    )
    losses: list[Tensor] = []
    streak = torch.zeros((), device=device)  # of steps with gradients that were not finite
    bad_steps = torch.zeros((), device=device)
    began = since = time.perf_counter()
    waited = 0.0
    with Interrupt() as interrupt:
        for step in bar:
            started = time.perf_counter()
            with reading(f"step {step + 1}: "):
                raw, labels = next(batches)
            raw, labels = (part.to(device, non_blocking=True) for part in (raw, labels))
            waited += time.perf_counter() - started
            lr = learning_rate(step, config.train.lr, config.train.warmup)
            for group in optimizer.param_groups:
                group["lr"] = lr
            batch = make_batch(raw, labels, step, mine, data, config)
            # Dropout takes no generator: seed the global one, by process.
            torch.manual_seed(
                generator_for(config.seed, "dropout", step, accelerator.process_index).initial_seed()
            )
            optimizer.zero_grad()
            teacher = analytic.gaussian if step < config.loss.gaussian_steps else None
            parts, loss = config.train.accumulate, torch.zeros((), device=device)
            for index in range(parts):
                with accelerator.no_sync(wrapped) if index < parts - 1 else nullcontext():
                    part = denoising_loss(wrapped, model, batch.part(index, parts), teacher, cross) / parts
                    accelerator.backward(part)
                loss = loss + part.detach()
            # The scaler of fp16 has to see what overflows, and then skips the step by itself.
            bad = None if accelerator.scaler is not None else zero_bad_gradients(network.parameters())
            if config.train.clip is not None:
                accelerator.clip_grad_norm_(wrapped.parameters(), config.train.clip)
            optimizer.step()
            if bad is None:
                bad = torch.tensor(bool(optimizer.step_was_skipped), device=device)
            streak, bad_steps = (streak + 1) * bad, bad_steps + bad
            for average in averages.values():
                average.update(network, (step + 1) * config.train.batch, config.train.batch)
            losses.append(loss)

            done = step + 1
            stopping = asked_to_stop(interrupt, accelerator, done)
            saves = done % config.checkpoint.every == 0 or done == config.train.steps or stopping
            logs = done % config.train.log_every == 0 or saves
            broken = (logs or device.type == "cpu") and float(streak) >= config.train.bad_steps
            if logs or broken:
                mean = float(cast(Tensor, accelerator.reduce(torch.stack(losses).mean(), reduction="mean")))
                now = time.perf_counter()
                row = {
                    "step": done,
                    "loss": mean if math.isfinite(mean) else None,
                    "lr": lr,
                    "images_per_second": len(losses) * config.train.batch / (now - since),
                    "waiting": waited / (now - since),  # share of the time that data took
                    "bad_steps": int(bad_steps),
                }
                losses, since, waited = [], now, 0.0
                accelerator.log({key: value for key, value in row.items() if value is not None}, step=done)
                if is_main:
                    folder.log(row)
                    bar.set_postfix(loss=f"{mean:.4f}", images_per_s=f"{row['images_per_second']:.0f}")
            if (saves or broken) and not finite(network):
                last = folder.last_checkpoint() if is_main else None
                raise RunError(
                    f"weights are not finite at step {done}, which is not saved: lower train.lr with --fork, "
                    f"from {last or 'the start'}"
                )
            if broken:
                save_checkpoint(accelerator, folder, done, config, facts)
                raise RunError(
                    f"gradients were not finite in {int(streak)} steps in a row, up to step {done}; they "
                    f"were zeroed, and the weights are saved in {folder.last_checkpoint()}"
                )
            paused = time.perf_counter()
            look(done)
            if saves:
                save_checkpoint(accelerator, folder, done, config, facts)
            since += time.perf_counter() - paused  # neither counts as training
            if stopping and done < config.train.steps:
                bar.close()
                why = interrupt.signal.name if interrupt.signal else "a signal to another process"
                log.info(f"{why}: saved step {done}; the same command resumes")
                accelerator.end_training()
                return
    bar.close()
    total = max(time.perf_counter() - began, 1e-9)
    log.info(f"score probes took {probes.seconds:.1f} s, {probes.seconds / total:.1%} of the run")

    # Report.
    text = write_report(state, analytic)
    if is_main:
        state.average.provenance = provenance(config, data, text)
        with naming(folder.path):
            state.average.save_pretrained(folder.path)
        write_atomically(folder.report, text)  # last: with it, the run is complete
        names = ", ".join(path.name for path in files(folder))
        log.info(f"\n{text}\nwritten to {folder.path}: {names}")
    accelerator.wait_for_everyone()
    accelerator.end_training()


def make_accelerator(config: Config) -> Accelerator:
    """Devices, processes, precision and trackers.

    Raises:
        ConfigError: if the batch does not divide among processes and parts, a tracker is not installed, or
            the launcher was told of another precision.
    """
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launched not in ("no", config.train.precision.value):
        raise ConfigError(
            f"train.precision: expected {launched}, as `accelerate launch` was told (--mixed_precision, or "
            f"its own configuration), got {config.train.precision.value}"
        )
    try:
        accelerator = Accelerator(
            mixed_precision=config.train.precision.value,
            log_with=cast(Any, config.train.trackers or None),
            project_dir=config.out,
            # The analytic buffers never change: nothing to broadcast in every step.
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
        )
    except ValueError as error:
        raise ConfigError(f"train.trackers, train.precision: {error}") from error
    parts = accelerator.num_processes * config.train.accumulate
    if config.train.batch % parts:
        raise ConfigError(
            f"train.batch: expected a multiple of {parts}, processes times train.accumulate, "
            f"got {config.train.batch}"
        )
    return accelerator


def make_optimizer(config: Config, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of a model's parameters.

    Raises:
        ConfigError: if timm knows none of that name, or cannot make it.
    """
    options = config.train
    try:
        return create_optimizer_v2(
            model, opt=options.optimizer, lr=options.lr, weight_decay=options.weight_decay
        )
    except (ValueError, TypeError, ImportError, AssertionError, RuntimeError) as error:
        raise ConfigError(f"train.optimizer: {error}") from error


def load_batches(
    config: Config, data: Data, first: int, mine: slice, device: torch.device
) -> DataLoader[tuple[Tensor, Tensor]]:
    """This process's stored images and labels of every step from the first on."""
    sampler = StepSampler(len(data.train), config.train.batch, config.seed, first, config.train.steps, mine)
    return loader(data.train, sampler, config.data.workers, pin=device.type == "cuda")


def asked_to_stop(interrupt: Interrupt, accelerator: Accelerator, step: int) -> bool:
    """Whether any process got a signal; they agree every ten steps, and one alone with itself at once."""
    if accelerator.num_processes == 1:
        return interrupt.signal is not None
    if step % 10:
        return False
    flag = torch.tensor(float(interrupt.signal is not None), device=accelerator.device)
    return bool(cast(Tensor, accelerator.reduce(flag, reduction="sum")) > 0)


def from_main(accelerator: Accelerator, ask: Callable[[], T]) -> T:
    """What the main process finds, in all of them; its ConfigError, too."""
    answer: list[Any] = [None]
    if accelerator.is_main_process:
        try:
            answer = [ask()]
        except ConfigError as error:
            answer = [error]
    found = broadcast_object_list(answer)[0]
    if isinstance(found, ConfigError):
        raise found
    return cast(T, found)


def save_checkpoint(
    accelerator: Accelerator, folder: RunFolder, step: int, config: Config, data: dict[str, Any]
) -> None:
    """Saves model, averages, optimizer, scaler and random states of all processes, and facts of the data."""
    accelerator.wait_for_everyone()

    def write(path: Path) -> None:
        with naming(path):
            accelerator.save_state(str(path))
        accelerator.wait_for_everyone()

    folder.save_checkpoint(step, config.checkpoint.keep, write, accelerator.is_main_process, data)
    accelerator.wait_for_everyone()


def finite(network: nn.Module) -> bool:
    """Whether all weights are finite."""
    norms = torch._foreach_norm([parameter.detach() for parameter in network.parameters()], torch.inf)
    return bool(torch.stack(norms).isfinite().all())


def _flat(config: Config) -> dict[str, str]:
    """What trackers keep of a configuration."""
    return {"precond": config.precond.value, "config": json.dumps(asdict(config), default=str)}
