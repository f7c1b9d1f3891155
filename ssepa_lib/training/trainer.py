"""The training loop: recipe in, run folder out; interrupted runs resume exactly (on a CPU, bit for bit)."""

import math
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ssepa_lib.data.datasets import SegmentationDataset, build_dataset
from ssepa_lib.data.loaders import require_classes, train_loader
from ssepa_lib.data.views import Batch
from ssepa_lib.device import launched, number_in, precision, rank_and_world, resolve_device
from ssepa_lib.errors import UserError
from ssepa_lib.files import FolderLock
from ssepa_lib.labels.pseudo_labels import PseudoLabeler
from ssepa_lib.methods import build_objectives, take_step, total_loss
from ssepa_lib.methods.teacher import Teacher
from ssepa_lib.model.frozen import FeatureCache
from ssepa_lib.model.network import Network, build_network, evaluating, optimiser_groups
from ssepa_lib.randomness import seeded
from ssepa_lib.recipe import Recipe
from ssepa_lib.training.history import History, read_history
from ssepa_lib.training.run import RunFolder

OnStep = Callable[[dict[str, Any]], None]
Watch = Callable[[Network, int], None]


def learning_rate_factor(recipe: Recipe, step: int) -> float:
    """Multiplier of every learning rate at `step` (counted from 0).

    Linear warm-up from `warmup_factor`, then (1 − t/T)^power ("poly", ToCo) or half a cosine to 0 ("cosine",
    FSR).
    """
    total, warmup, first = recipe.train.steps, recipe.warmup_steps, recipe.optim.warmup_factor
    if step < warmup:
        return first + (1 - first) * step / warmup
    if recipe.optim.schedule == "poly":
        return max(0.0, 1 - step / total) ** recipe.optim.power
    return (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup))) / 2


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
        self.network = build_network(recipe, classes).to(device).train()
        self.objectives = build_objectives(recipe, self.network).to(device)
        momentum = recipe.cam.teacher_momentum
        self.teacher = Teacher(self.network) if momentum > 0 else None  # makes the maps
        self.weights = {name: weight for part in self.objectives for name, weight in part.weights.items()}
        self.labeler = PseudoLabeler(recipe.cam).to(device)
        groups = self.network.parameter_groups(recipe.optim, recipe.affinity.haaf_lr)
        groups += optimiser_groups(
            self.objectives, recipe.optim.lr * recipe.optim.head_lr_factor, recipe.optim
        )
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), fused=device.type == "cuda")
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, partial(learning_rate_factor, recipe)
        )
        self.bf16 = precision(recipe.train.precision, device) == "bf16"
        if recipe.model.freeze and recipe.data.fixed_views:
            self.network.backbone.cache = FeatureCache(int(recipe.model.cache_gb * 1e9))
        if recipe.train.compile:
            for block in self.network.backbone.blocks:
                block.compile()

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        """All loss terms of one batch at the current step, unweighted."""
        active = [part for part in self.objectives if self.index >= part.start]
        needs = frozenset().union(*(part.needs for part in active))
        first = [part for part in active if "attention" in part.needs]
        # the seed is that of drop path; crops, masks and views have generators of their own
        drop_path = seeded("drop path", self.recipe.train.seed, self.index, rank_and_world()[0], self.device)
        with drop_path, torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            teacher = None if self.teacher is None else self.teacher.module
            step = take_step(self.network, self.recipe, batch, self.index, self.labeler, needs, teacher)
            terms = [part(step) for part in first]
            step.output = replace(step.output, attention=None)  # before the passes over further views
            terms += [part(step) for part in active if part not in first]
        found = {name: value for values in terms for name, value in values.items()}
        return {name: found[name] for name in self.weights if name in found}

    def step(self, batch: Batch) -> dict[str, Tensor]:
        """One update; returns the detached terms and their weighted sum `loss`."""
        terms = self.terms(batch.to(self.device))
        loss = total_loss(terms, self.weights)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if self.world > 1:
            self._average_gradients()
        self.optimizer.step()
        self.scheduler.step()
        self.index += 1
        if self.teacher is not None:
            self.teacher.follow(self.network, self.recipe.cam.teacher_momentum)
        for part in self.objectives:
            part.after_step(self.network, self.index / self.recipe.train.steps)
        values = {"loss": loss, **terms}
        logged = torch.stack([value.detach().float() for value in values.values()])
        if self.world > 1:
            dist.all_reduce(logged)
        return dict(zip(values, logged / self.world, strict=True))

    def _average_gradients(self) -> None:
        """One all-reduce over all gradients. Several forward passes feed one backward pass, which bucketed
        DDP hooks do not support. A gradient that only some processes have counts as zero in the others;
        parameters without any (the decoder before its terms count) stay without, so that AdamW leaves them
        alone as it does in one process."""
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        has = torch.tensor([p.grad is not None for p in parameters], dtype=torch.uint8, device=self.device)
        dist.all_reduce(has, dist.ReduceOp.MAX)
        parameters = [p for p, anywhere in zip(parameters, has.tolist(), strict=True) if anywhere]
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
        dist.all_reduce(flat)
        for p, grad in zip(
            parameters, (flat / self.world).split([p.numel() for p in parameters]), strict=True
        ):
            p.grad = grad.view_as(p)

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs; plain tensors and numbers."""
        return {"index": self.index} | {name: part.state_dict() for name, part in self._stateful().items()}

    def _stateful(self) -> dict[str, Any]:
        names = ("network", "objectives", "optimizer", "scheduler", "teacher")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state.

        Raises:
            UserError: it belongs to an earlier version.
        """
        try:
            self.index = state["index"]
            for group in state["optimizer"]["param_groups"]:  # a run may resume on another device
                group["fused"] = self.device.type == "cuda"
            for name, part in self._stateful().items():
                part.load_state_dict(state[name])
        except (RuntimeError, LookupError, ValueError, TypeError, AttributeError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"the unfinished run does not fit this version ({reason}); remove its state.pt to restart it."
            ) from error


def train(
    recipe: Recipe,
    run_dir: Path,
    *,
    resume: bool = True,
    on_step: OnStep | None = None,
    watch: Watch | None = None,
) -> Path:
    """Train a recipe, or finish training it.

    Under `torchrun` (or SLURM) every process takes its share of `data.batch`, which stays the total.

    Args:
        run_dir: the run folder, created if missing.
        resume: continue from `state.pt`; False starts again.
        on_step: called after every logged row with {step, start, steps, loss, seconds_left, …}, where this
            call began at step `start`; for a finished run once, without losses.
        watch: called with the network, in evaluation mode and without gradient, and the step: before the
            first step and after every logged row. What it does leaves the run as it is, bit for bit.

    Returns:
        `run_dir`. A finished run returns at once, and adopts what the recipe says of evaluation and folders.

    Raises:
        UserError: bad data, weights or settings; a folder that holds another recipe or that another process
            is writing to; a loss that is not finite.
    """
    folder = RunFolder(run_dir)
    if resume and folder.is_finished(recipe):
        folder.adopt_evaluation_settings(recipe)
        if on_step:
            on_step({"step": recipe.train.steps, "steps": recipe.train.steps, "seconds_left": 0.0})
        return folder.path
    rank, world, device = _launch(resolve_device(recipe.train.device))
    dataset = build_dataset(recipe.data, "train")
    if rank:
        trainer = Trainer(recipe, dataset.classes, device, world)
        return _train(trainer, folder, dataset, rank, None, on_step, watch)
    with FolderLock(folder.path):
        trainer = Trainer(recipe, dataset.classes, device, world)  # before a wrong setting can cost a run
        state = folder.prepare(recipe, resume)
        return _train(trainer, folder, dataset, rank, state, on_step, watch)


def _train(
    trainer: Trainer,
    folder: RunFolder,
    dataset: SegmentationDataset,
    rank: int,
    state: dict[str, Any] | None,
    on_step: OnStep | None,
    watch: Watch | None,
) -> Path:
    """Train in this process; `state` is that of rank 0, None: from the start."""
    if trainer.world > 1:
        box = [state]
        dist.broadcast_object_list(box, src=0)
        state = box[0]
    if state is not None:
        require_classes(dataset, state.get("classes", dataset.classes), "the unfinished run began with")
        trainer.load_state_dict(state)
    history = None if state is None else state.get("history") or read_history(folder.history, state["index"])
    _loop(trainer, dataset, folder, rank, History(folder.history, history), on_step, watch)
    if rank == 0:
        folder.save_weights(trainer.network, trainer.recipe, trainer.recipe.train.steps)
    return folder.path


def _show(trainer: Trainer, watch: Watch | None) -> None:
    """Call a watcher; the global random state, the mode and the gradients are as they were afterwards."""
    if watch is None:
        return
    devices = [trainer.device] if trainer.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.no_grad(), evaluating(trainer.network):
        watch(trainer.network, trainer.index)


def _loop(
    trainer: Trainer,
    dataset: SegmentationDataset,
    folder: RunFolder,
    rank: int,
    history: History,
    on_step: OnStep | None,
    watch: Watch | None,
) -> None:
    recipe, start = trainer.recipe, trainer.index
    if start == 0 and not rank:
        _show(trainer, watch)
    began = time.perf_counter()
    for batch in train_loader(dataset, recipe, start_step=start, rank=rank, world=trainer.world):
        history.add(batch.id, trainer.step(batch))
        done, last = trainer.index, trainer.index == recipe.train.steps
        log, save = (done % every == 0 or last for every in (recipe.train.log_every, recipe.train.save_every))
        if log or save:
            history.require_finite(done, folder.name)
        if rank:
            continue
        if log:
            row = history.flush(done, trainer.scheduler.get_last_lr()[0])
            if on_step:
                left = (time.perf_counter() - began) / (done - start) * (recipe.train.steps - done)
                on_step({**row, "start": start, "steps": recipe.train.steps, "seconds_left": left})
            _show(trainer, watch)
        if save:
            more = {"recipe": recipe.hash(), "classes": dataset.classes, "history": history.state_dict()}
            folder.save_state(trainer.state_dict() | more)


def _launch(device: torch.device) -> tuple[int, int, torch.device]:
    """Rank, world size and device of this process; several processes only under torchrun or SLURM."""
    world = launched()[1]
    if world == 1:
        return 0, 1, device
    try:
        from lightning.fabric import Fabric
    except ImportError:
        from lightning_fabric import Fabric
    local = number_in("LOCAL_WORLD_SIZE", "SLURM_NTASKS_PER_NODE", otherwise=world)
    fabric = Fabric(accelerator=device.type, devices=local, num_nodes=max(1, world // local), strategy="ddp")
    fabric.launch()
    return fabric.global_rank, fabric.world_size, fabric.device
