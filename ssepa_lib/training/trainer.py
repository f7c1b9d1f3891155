"""The training loop: recipe in, run folder out; interrupted runs go on where they stopped (on a CPU, bit for bit).

A run folder holds `recipe.yaml`, `history.csv`, `state.pt` (to resume), and at the end `weights.safetensors`.
"""

import csv
import json
import math
import os
import pickle  # only to name the exception of an unreadable file
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ssepa_lib.data.datasets import build_dataset
from ssepa_lib.data.views import Batch, train_loader
from ssepa_lib.device import precision, rank_and_world, resolve_device
from ssepa_lib.errors import UserError
from ssepa_lib.labels.par import PixelAdaptiveRefinement
from ssepa_lib.methods.objectives import Step, build_objectives, total_loss
from ssepa_lib.model.network import Network, build_network, optimiser_groups
from ssepa_lib.recipe import Recipe, load_recipe, save_recipe

OnStep = Callable[[dict[str, Any]], None]


def learning_rate_factor(recipe: Recipe, step: int) -> float:
    """Multiplier of every learning rate at `step` (counted from 0).

    Linear warm-up from `warmup_factor`, then (1 − t/T)^0.9 ("poly", ToCo) or half a cosine to 0 ("cosine", FSR).
    """
    total, warmup, first = recipe.train.steps, recipe.warmup_steps, recipe.optim.warmup_factor
    if step < warmup:
        return first + (1 - first) * step / warmup
    if recipe.optim.schedule == "poly":
        return max(0.0, 1 - step / total) ** 0.9
    return (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2


class Trainer:
    """Network, objectives and optimiser of one recipe; `step(batch)` does one update.

    Args:
        recipe: what to train.
        classes: names of the foreground classes.
        device: where.
        world: number of processes; gradients are averaged over them.
    """

    def __init__(self, recipe: Recipe, classes: tuple[str, ...], device: torch.device, world: int = 1):
        self.recipe, self.device, self.world, self.index = recipe, device, world, 0
        self.network: Network = build_network(recipe, classes).to(device).train()
        torch.manual_seed(
            recipe.train.seed + 1
        )  # heads start alike in every method, whatever the network drew
        self.objectives = build_objectives(recipe, self.network).to(device)
        self.par = PixelAdaptiveRefinement(recipe.cam.par_dilations, recipe.cam.par_iterations).to(device)
        groups = self.network.parameter_groups(recipe.optim, recipe.affinity.haaf_lr)
        groups += optimiser_groups(
            self.objectives, recipe.optim.lr * recipe.optim.head_lr_factor, recipe.optim
        )
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), fused=device.type == "cuda")
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: learning_rate_factor(recipe, step)
        )
        self.bf16 = precision(recipe.train.precision, device) == "bf16"
        if recipe.train.compile:
            for block in self.network.backbone.vit.blocks:
                block.compile()

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        """All loss terms of one batch at the current step, unweighted."""
        seed = self.recipe.train.seed * 1_000_003 + self.index
        # drop path, another one in every process; the views have generators of their own
        torch.manual_seed(seed + 500_009 * rank_and_world()[0])
        generator = torch.Generator().manual_seed(seed)
        step = Step(self.network, self.recipe, batch, self.index, self.par, generator)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            return {name: value for part in self.objectives for name, value in part(step).items()}

    def step(self, batch: Batch) -> dict[str, Tensor]:
        """One update; returns the detached terms and their weighted sum `loss`."""
        terms = self.terms(batch.to(self.device))
        loss = total_loss(terms, self.recipe)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if self.world > 1:
            self._average_gradients()
        self.optimizer.step()
        self.scheduler.step()
        self.index += 1
        for part in self.objectives:
            if hasattr(part, "finish"):
                part.finish(self.network, self.index / self.recipe.train.steps)
        names, values = zip(*{"loss": loss, **terms}.items(), strict=True)
        logged = torch.stack([value.detach().float() for value in values])
        if self.world > 1:
            torch.distributed.all_reduce(logged)
        return dict(zip(names, logged / self.world, strict=True))

    def _average_gradients(self) -> None:
        """One all-reduce over all gradients. Several forward passes feed one backward pass, which bucketed DDP hooks
        do not support. A gradient that only some processes have counts as zero in the others; parameters without any
        (the decoder before its terms count) stay without, so that AdamW leaves them alone as it does in one process."""
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        has = torch.tensor([p.grad is not None for p in parameters], dtype=torch.uint8, device=self.device)
        torch.distributed.all_reduce(has, torch.distributed.ReduceOp.MAX)
        parameters = [p for p, anywhere in zip(parameters, has.tolist(), strict=True) if anywhere]
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
        torch.distributed.all_reduce(flat)
        for p, grad in zip(
            parameters, (flat / self.world).split([p.numel() for p in parameters]), strict=True
        ):
            p.grad = grad.view_as(p)

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs; plain tensors and numbers."""
        return {
            "index": self.index,
            "network": self.network.state_dict(),
            "objectives": self.objectives.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.index = state["index"]
        for group in state["optimizer"]["param_groups"]:  # a run may go on on another device
            group["fused"] = self.device.type == "cuda"
        for name in ("network", "objectives", "optimizer", "scheduler"):
            getattr(self, name).load_state_dict(state[name])


def atomic(path: Path, write: Callable[[Path], None]) -> None:
    """Write a file beside its place, then rename it: readers never see half of it."""
    part = path.with_name(path.name + ".part")
    write(part)
    part.replace(path)


class _History:
    """history.csv: one row every `log_every` steps; per term the mean over the steps since the last row that had it."""

    def __init__(self, path: Path, start: int):
        self.path, self.sums = path, {}  # term → (sum, number of steps that had it)
        rows = list(csv.DictReader(path.open())) if path.is_file() else []
        self.rows: list[dict[str, Any]] = [row for row in rows if int(row["step"]) <= start]
        self.seconds = float(self.rows[-1]["seconds"]) if self.rows else 0.0
        self.clock = time.perf_counter()

    def add(self, terms: dict[str, Tensor]) -> None:
        for name, value in terms.items():
            total, count = self.sums.get(name, (0, 0))
            self.sums[name] = total + value, count + 1

    def flush(self, step: int, lr: float) -> dict[str, float]:
        now = time.perf_counter()
        self.seconds, self.clock = self.seconds + now - self.clock, now
        row = {"step": step, "lr": lr, "seconds": round(self.seconds, 2)}
        row |= {name: float(total) / count for name, (total, count) in self.sums.items()}
        self.sums = {}
        self.rows.append(row)
        names = list(dict.fromkeys(name for r in self.rows for name in r))
        atomic(self.path, lambda part: self._write(part, names))
        return row

    def _write(self, part: Path, names: list[str]) -> None:
        with part.open("w", newline="") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(self.rows)


def save_weights(network: nn.Module, recipe: Recipe, path: Path, step: int) -> None:
    """Write the network's weights with its class names, recipe hash and step in the file's metadata."""
    state = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    metadata = {"classes": json.dumps(network.classes), "recipe": recipe.hash(), "step": str(step)}
    atomic(path, lambda part: save_file(state, part, metadata))


def _prepare(recipe: Recipe, run_dir: Path, resume: bool) -> dict[str, Any] | None:
    """Create the run folder, or read the state it holds.

    Raises:
        UserError: the folder holds a run of another recipe, or an unreadable state.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    old = run_dir / "recipe.yaml"
    state = run_dir / "state.pt"
    if not resume:
        for name in ("state.pt", "weights.safetensors", "history.csv", "metrics.json"):
            (run_dir / name).unlink(missing_ok=True)
    elif old.is_file() and load_recipe(str(old)).hash() != recipe.hash():
        raise UserError(
            f"{run_dir} holds a run of another recipe; choose another run name or remove that folder."
        )
    atomic(old, lambda part: save_recipe(recipe, part))
    if not state.is_file():
        return None
    try:
        return torch.load(state, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
        raise UserError(
            f"{state} cannot be read; remove it to train this run again from the start."
        ) from error


def is_finished(recipe: Recipe, run_dir: Path) -> bool:
    """Whether the folder holds the final weights of exactly this recipe."""
    path = run_dir / "weights.safetensors"
    if not path.is_file():
        return False
    try:
        with safe_open(path, "pt") as file:
            meta = file.metadata()
    except SafetensorError:
        return False
    return bool(meta) and meta.get("recipe") == recipe.hash() and int(meta["step"]) == recipe.train.steps


def _take_over(recipe: Recipe, run_dir: Path) -> None:
    """Give a finished run what this recipe says outside the hash (evaluation, folders). Its name stays."""
    path = run_dir / "recipe.yaml"
    old = load_recipe(str(path)) if path.is_file() else recipe
    first = not int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or 0)
    if first and old != replace(recipe, name=old.name):
        atomic(path, lambda part: save_recipe(replace(recipe, name=old.name), part))


def train(recipe: Recipe, run_dir: Path, *, resume: bool = True, on_step: OnStep | None = None) -> Path:
    """Train a recipe, or finish training it.

    Under `torchrun` (or SLURM) every process takes its share of `data.batch`, which stays the total.

    Args:
        run_dir: the run folder, created if missing.
        resume: continue from `state.pt`; False starts again.
        on_step: called after every logged row with {step, steps, loss, seconds_left, …}.

    Returns:
        `run_dir`. A finished run returns at once, and takes over what the recipe says of evaluation and folders.

    Raises:
        UserError: bad data, weights or settings; a folder that holds another recipe; a loss that is not finite.
    """
    run_dir = Path(run_dir)
    if resume and is_finished(recipe, run_dir):
        _take_over(recipe, run_dir)
        return run_dir
    device = resolve_device(recipe.train.device)
    rank, world, device = _launch(device)
    dataset = build_dataset(recipe.data, "train")
    state = _prepare(recipe, run_dir, resume) if rank == 0 or world == 1 else None
    if world > 1:
        box = [state]
        torch.distributed.broadcast_object_list(box, src=0)
        state = box[0]
    trainer = Trainer(recipe, dataset.classes, device, world)
    if state is not None:
        trainer.load_state_dict(state)
    _loop(trainer, dataset, run_dir, rank, on_step)
    if rank == 0:
        save_weights(trainer.network, recipe, run_dir / "weights.safetensors", recipe.train.steps)
    return run_dir


def _loop(trainer: Trainer, dataset: Any, run_dir: Path, rank: int, on_step: OnStep | None) -> None:
    recipe, start = trainer.recipe, trainer.index
    history = _History(run_dir / "history.csv", start)
    began = time.perf_counter()
    for batch in train_loader(dataset, recipe, start_step=start, rank=rank, world=trainer.world):
        history.add(trainer.step(batch))
        done, last = trainer.index, trainer.index == recipe.train.steps
        if rank:
            continue
        if done % recipe.train.log_every == 0 or last:
            row = history.flush(done, trainer.scheduler.get_last_lr()[0])
            if not math.isfinite(row["loss"]):
                raise UserError(
                    f"the loss is no longer finite at step {done} of {run_dir.name}; lower optim.lr or set "
                    "train.precision to fp32, and train it again with another run name."
                )
            if on_step:
                left = (time.perf_counter() - began) / (done - start) * (recipe.train.steps - done)
                on_step({**row, "steps": recipe.train.steps, "seconds_left": left})
        if done % recipe.train.save_every == 0 or last:
            atomic(run_dir / "state.pt", lambda part: torch.save(trainer.state_dict(), part))


def _launch(device: torch.device) -> tuple[int, int, torch.device]:
    """Rank, world size and device of this process; several processes only under torchrun or SLURM."""
    world = int(os.environ.get("WORLD_SIZE") or os.environ.get("SLURM_NTASKS") or 1)
    if world == 1:
        return 0, 1, device
    try:
        from lightning.fabric import Fabric
    except ImportError:
        from lightning_fabric import Fabric
    local = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("SLURM_NTASKS_PER_NODE") or world)
    fabric = Fabric(accelerator=device.type, devices=local, num_nodes=max(1, world // local), strategy="ddp")
    fabric.launch()
    return fabric.global_rank, fabric.world_size, fabric.device


def load_run(run_dir: Path, device: str = "auto") -> tuple[Network, Recipe]:
    """A trained network in evaluation mode, and its recipe.

    Raises:
        UserError: the folder holds no finished run, or its files do not fit each other.
    """
    run_dir = Path(run_dir)
    weights = run_dir / "weights.safetensors"
    if not weights.is_file():
        raise UserError(
            f"{run_dir} holds no finished run; train it first (notebook 03, or python -m ssepa_lib train)."
        )
    recipe = load_recipe(str(run_dir / "recipe.yaml"))
    try:
        with safe_open(weights, "pt") as file:
            classes = json.loads(file.metadata()["classes"])
        blank = replace(recipe, model=replace(recipe.model, weights="none"))
        network = Network(blank, classes)
        network.load_state_dict(load_file(weights))
    except (SafetensorError, RuntimeError, KeyError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{weights} does not fit {run_dir / 'recipe.yaml'} ({reason}); train again."
        ) from error
    return network.to(resolve_device(device)).eval(), recipe
