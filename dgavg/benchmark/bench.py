"""Bench: one fold's data and an empty model, to score weights that runs left."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.func import functional_call

from dgavg.averaging.batchnorm import batchnorm_layers
from dgavg.averaging.parameters import check_same
from dgavg.benchmark.scored import splits_to_score
from dgavg.data import DomainDataset, Splits, TrainingBatches, make_splits, seed_hash
from dgavg.data.domains import as_floats
from dgavg.errors import UserError
from dgavg.evaluation import Scorer, Split
from dgavg.evaluation.selection import validation_score
from dgavg.run import autocast
from dgavg.trainer import Candidate, Weights

Scores = dict[str, dict[str, float]]  # by split: accuracy, loss, n


@dataclass(frozen=True, eq=False)
class Setup:
    """What weights are scored with, the same for all folds."""

    dataset: DomainDataset
    model: Callable[[tuple[int, int, int], int], nn.Module]
    protocol: Mapping[str, Any]
    device: torch.device
    precision: str
    eval_batch_size: int


class Bench:
    """One fold and seed; without a seed, of all of them.

    Then a training domain has no part that all runs left out, so that nothing of it is scored;
    batch norm is recalibrated over the whole of it. `batchnorm` is the policy of what is scored.
    """

    def __init__(self, setup: Setup, held_out: str, seed: int | None, batchnorm: str) -> None:
        dataset, self.setup, self.held_out = setup.dataset, setup, held_out
        self.batchnorm = batchnorm
        index = dataset.index(held_out)
        fraction = setup.protocol["holdout_fraction"]
        kind = setup.protocol.get("splits", "domainbed")
        splits = make_splits(dataset, fraction, trial_seed=seed or 0, kind=kind)
        self.splits = splits_to_score(dataset, splits, [index], setup.protocol, setup.device)
        if seed is None:
            self.splits = {k: v for k, v in self.splits.items() if self._is_held_out(k)}
            whole = tuple(np.arange(len(domain), dtype=np.int64) for domain in dataset.domains)
            splits = Splits(out=splits.out, in_=whole)
        self.batches = TrainingBatches(
            dataset,
            splits,
            [i for i in range(len(dataset.domains)) if i != index],
            batch_size=1,
            seed=0,
            device=setup.device,
        )
        self.model = setup.model(dataset.input_shape, len(dataset.classes))
        self.model.to(setup.device)
        self.model.train()

    def _is_held_out(self, split: str) -> bool:
        return split.rpartition("/")[0] == self.held_out

    def load(self, path: Path) -> Weights:
        """The weights in a file, on the device.

        Raises `UserError` for one that is missing, damaged or of another model.
        """
        try:
            found = load_file(path, device=str(self.setup.device))
        except (OSError, SafetensorError) as error:
            run = path.parent.parent
            raise UserError(
                f"{path} is missing or damaged; delete {run} to train that run anew"
            ) from error
        try:
            check_same(self.model.state_dict(), found)
        except ValueError as error:
            raise UserError(f"{path} does not fit the model of the runs: {error}") from None
        return found

    def forward(self, model: nn.Module, images: Tensor) -> Tensor:
        """Logits (N, classes) in float32."""
        with autocast(self.setup.precision, self.setup.device):
            logits: Tensor = model(images)
        return logits.float()

    def score(self, weights: Weights) -> tuple[Scores, Weights]:
        """Scores on all splits, and the weights that have them, recalibrated as they were."""
        return self._score(weights, self.splits)

    def validation(self, weights: Weights) -> float:
        """Mean accuracy on the validation parts of the training domains, and nothing else read."""
        found, _ = self._score(weights, self._training())
        return validation_score(found, self.held_out)

    def _training(self) -> dict[str, Split]:
        return {k: v for k, v in self.splits.items() if not self._is_held_out(k)}

    def _score(self, weights: Weights, splits: Mapping[str, Split]) -> tuple[Scores, Weights]:
        size = self.setup.eval_batch_size
        scorer = Scorer(
            self.model,
            splits,
            lambda: self.batches.pooled(size),
            batch_size=size,
            forward=self.forward,
            held_out=frozenset(filter(self._is_held_out, splits)),  # batches as in a run
        )
        found = scorer.score({"": Candidate(weights, self.batchnorm)})[""]
        return {k: asdict(score) for k, score in found.items()}, scorer.weights("")

    def learning(self, steps: int) -> tuple[nn.Module, Callable[..., Tensor], Iterator[Any]]:
        """What `learned_soup` needs: a model, a loss, and `steps` batches of validation images.

        Where batch norm will be recalibrated, the model normalises by the batch meanwhile.
        """
        self.model.train()
        layers = [m for m in batchnorm_layers(self.model) if m.training]
        self.model.eval()
        for layer in layers if self.batchnorm == "recalibrate" else []:
            layer.train()

        def loss(model: nn.Module, batch: tuple[Tensor, Tensor], beta: Tensor) -> Tensor:
            return F.cross_entropy(beta * self.forward(model, batch[0]), batch[1])

        return self.model, loss, self._validation_batches(steps)

    def _validation_batches(self, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Passes over the validation images, each in a new order."""
        parts = list(self._training().values())
        images = torch.cat([part.images for part in parts])
        labels = torch.cat([part.labels for part in parts])
        step, passes = 0, 0
        while step < steps:
            random = torch.Generator().manual_seed(seed_hash("learned soup", passes))
            order = torch.randperm(len(labels), generator=random).to(labels.device)
            parts_of = -(-len(order) // self.setup.eval_batch_size)
            for rows in order.tensor_split(parts_of)[: steps - step]:  # none of them tiny
                yield as_floats(images[rows]), labels[rows]
                step += 1
            passes += 1

    @torch.no_grad()
    def logits(self, weights: Weights) -> Tensor:
        """Logits (N, classes) of all images of all splits in a row; batch norm as in `weights`."""
        self.model.eval()
        found = []
        for split in self.splits.values():
            size = getattr(self.model, "support", self.setup.eval_batch_size)
            for images in split.batches(size):
                args = (as_floats(images),)
                with autocast(self.setup.precision, self.setup.device):
                    # tied weights come from a file as two equal ones
                    part = functional_call(self.model, weights, args, tie_weights=False)
                found.append(part.float())
        return torch.cat(found)

    def score_logits(self, logits: Tensor) -> Scores:
        """Scores of predictions for all images of all splits in a row."""
        sizes = [len(split.labels) for split in self.splits.values()]
        found: Scores = {}
        for (name, split), rows in zip(
            self.splits.items(), torch.split(logits, sizes), strict=True
        ):
            right = (rows.argmax(dim=1) == split.labels).sum().item() / len(split.labels)
            loss = F.cross_entropy(rows, split.labels).item()
            found[name] = {"accuracy": right, "loss": loss, "n": len(split.labels)}
        return found
