"""torch's modules that are more than layers with an adapter: copies that are trained whole, and rows of embeddings."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from peftarray.backends.torch_forwarding import Forwarding
from peftarray.backends.torch_layers import AdaptedLayer
from peftarray.backends.torch_switch import Switch
from torch import nn
from torch.nn import functional

from peftarray.errors import UnsupportedError
from peftarray.methods import TrainableTokensConfig

__all__ = ["SavedModule", "TiedHead", "TokenRows"]


class TokenRows(Forwarding):
    """An embedding of which some rows are trained as they are, under PEFT's name for it."""

    holds: ClassVar[tuple[str, ...]] = ("token_adapter",)

    def __init__(self, embedding: AdaptedLayer) -> None:
        super().__init__()
        self.token_adapter = embedding

    @property
    def behind(self) -> nn.Module:
        return self.token_adapter

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Rows of the embedding, those that are trained in place of the base's."""
        return self.token_adapter(x)


class TiedHead(Forwarding):
    """An output layer whose weight is an embedding's: the rows that the embedding trains are its rows too."""

    def __init__(self, base_layer: nn.Linear, rows: AdaptedLayer) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.training = base_layer.training
        self._rows = (rows,)  # in a tuple it is no child: its parameters belong to the embedding

    @property
    def behind(self) -> nn.Module:
        return self.base_layer

    @property
    def embedding(self) -> AdaptedLayer:
        """The embedding that it is tied to."""
        return self._rows[0]

    @property
    def weight(self) -> Any:
        return self.embedding.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Scores, those of the trained rows by the rows that are trained."""
        now, embedding = self.embedding.switch.now, self.embedding
        if now.rows is None:
            return self._scores(x, now.names)
        rows = now.rows.seen_as(embedding.methods)
        if not rows.adapters:
            return self.base_layer(x)

        def score(name: str | None, places: torch.Tensor) -> torch.Tensor:
            return self._scores(x.index_select(0, places), () if name is None else (name,))

        return rows.of_batch(x.shape[0], "the output layer").by_segment(score, x.device)

    def _scores(self, x: torch.Tensor, names: tuple[str, ...]) -> torch.Tensor:
        scores, scales = self.base_layer(x), self.embedding.switch.now.scales
        base = scores
        here = [name for name in names if name in self.embedding.methods]
        for name in here:
            adapter, scale = self.embedding.read(name), scales.get(name, 1.0)
            assert isinstance(adapter.config, TrainableTokensConfig)
            places = torch.as_tensor(adapter.config.token_indices, device=x.device)
            mine = functional.linear(x, adapter.params["trainable_tokens_delta"].to(x.dtype))
            if self.base_layer.bias is not None:
                mine = mine + self.base_layer.bias[places]
            if len(here) == 1 and scale == 1:
                scores = scores.index_copy(-1, places, mine.to(scores.dtype))
            else:
                change = (mine - base.index_select(-1, places)) * scale
                scores = scores.index_add(-1, places, change.to(scores.dtype))
        return scores


class SavedModule(Forwarding):
    """A module that is trained whole, as a copy for each adapter beside the one that the model came with."""

    holds: ClassVar[tuple[str, ...]] = ("original_module", "modules_to_save")

    def __init__(self, original_module: nn.Module, switch: Switch) -> None:
        super().__init__()
        self.original_module = original_module
        self.training = original_module.training
        self.modules_to_save = nn.ModuleDict()
        self.switch = switch

    @property
    def behind(self) -> nn.Module:
        """The module that acts."""
        return self.of(self.switch.now.whole)

    def of(self, names: tuple[str, ...]) -> nn.Module:
        """The module that acts with these adapters; at most one of them has a copy."""
        return next(
            (self.modules_to_save[name] for name in names if name in self.modules_to_save), self.original_module
        )

    def forward(self, *arguments: Any, **options: Any) -> Any:
        """What the copy that acts makes."""
        now = self.switch.now
        if now.rows is None:
            return self.of(now.whole)(*arguments, **options)
        rows = now.rows.seen_as(self.modules_to_save)
        if not rows.adapters:
            return self.original_module(*arguments, **options)
        first = next(value for value in (*arguments, *options.values()) if isinstance(value, torch.Tensor))
        rows = rows.of_batch(first.shape[0], "a module of modules_to_save")

        def run(name: str | None, places: torch.Tensor) -> torch.Tensor:
            def chosen(value: Any) -> Any:
                is_batch = isinstance(value, torch.Tensor) and value.shape[:1] == first.shape[:1]
                return value.index_select(0, places) if is_batch else value

            module = self.of(() if name is None else (name,))
            made = module(*map(chosen, arguments), **{key: chosen(value) for key, value in options.items()})
            if not isinstance(made, torch.Tensor):
                message = (
                    f"modules_to_save holds a {type(module).__name__}, which gives a {type(made).__name__} and no "
                    "tensor, so rows with different adapters cannot be brought together; run one adapter at a time"
                )
                raise UnsupportedError(message)
            return made

        return rows.by_segment(run, first.device)
