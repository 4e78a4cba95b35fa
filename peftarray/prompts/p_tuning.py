"""P-tuning: virtual tokens that a small network makes, which is left behind when they are saved.

Source: Liu et al., GPT Understands, Too, 2021, section 2.2 (bidirectional LSTM and two layers), arXiv:2103.10385.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar, Self

from peftarray.arrays import Array, Params
from peftarray.errors import ConfigError
from peftarray.method import Param
from peftarray.method_dropout import Drop
from peftarray.prompts.encoders import linear, linear_params, lstm, lstm_params, relu
from peftarray.prompts.host import Host
from peftarray.prompts.prompt import EMBEDDINGS, TokenPrompt
from peftarray.random import normal
from peftarray.settings import number, one_of, optional, setting, whole

__all__ = ["PromptEncoderConfig"]

_SEEDS = "embedding.weight"


@dataclass(frozen=True, kw_only=True)
class PromptEncoderConfig(TokenPrompt):
    """The tokens are `f(E)`, with `E` the rows of `embedding.weight (total, token_dim)`.

    f is three layers with ReLU between them (`mlp_head.0`, `.2`, `.4`), or a bidirectional LSTM over the tokens and two
    layers (`lstm_head`, `mlp_head.0`, `.2`). A file holds the tokens alone, as `prompt_embeddings`: training cannot go
    on from it. At initialisation E is standard normal and the layers are those of `torch.nn`.

    Attributes:
        encoder_reparameterization_type: `"MLP"` or `"LSTM"`.
        encoder_hidden_size: inner width of the network; `token_dim` if None.
        encoder_num_layers: layers of the LSTM. The MLP has its three whatever this says: only 2 is taken for it.
        encoder_dropout: between the layers of the LSTM; the MLP has none.

    Example:
        >>> import numpy as np
        >>> config = PromptEncoderConfig(num_virtual_tokens=3, token_dim=4, encoder_hidden_size=5)
        >>> p = config.init_params(np.ones(1, np.float32))
        >>> config.tokens(p).shape, list(config.to_store(p))
        ((3, 4), ['prompt_embeddings'])
    """

    peft_type: ClassVar[str] = "P_TUNING"

    encoder_reparameterization_type: str = setting("MLP", one_of("MLP", "LSTM"))
    encoder_hidden_size: int | None = setting(None, optional(whole(1)))
    encoder_num_layers: int = setting(2, whole(1))
    encoder_dropout: float = setting(0.0, number(0.0, 1.0))

    def for_model(self, host: Host) -> Self:
        known = super().for_model(host)
        return dataclasses.replace(known, encoder_hidden_size=self.encoder_hidden_size or known.token_dim)

    def params(self) -> dict[str, Param]:
        dim, hidden = self.size("token_dim"), self.encoder_hidden_size or self.size("token_dim")
        table = {_SEEDS: Param("token dim", (self.total, dim), init=normal)}
        if self.encoder_reparameterization_type == "LSTM":
            table |= lstm_params("lstm_head", dim, hidden, self.encoder_num_layers)
            return (
                table
                | linear_params("mlp_head.0", 2 * hidden, 2 * hidden)
                | linear_params("mlp_head.2", 2 * hidden, dim)
            )
        self._check_mlp()
        table |= linear_params("mlp_head.0", dim, hidden) | linear_params("mlp_head.2", hidden, hidden)
        return table | linear_params("mlp_head.4", hidden, dim)

    def tokens(self, p: Params, *, drop: Drop | None = None) -> Array:
        if EMBEDDINGS in p:
            return p[EMBEDDINGS]
        if self.encoder_reparameterization_type == "LSTM":
            share = self.encoder_dropout
            hidden = lstm(p, "lstm_head", p[_SEEDS], self.encoder_num_layers, lambda x: drop(x, share) if drop else x)
            return linear(p, "mlp_head.2", relu(linear(p, "mlp_head.0", hidden)))
        hidden = relu(linear(p, "mlp_head.2", relu(linear(p, "mlp_head.0", p[_SEEDS]))))
        return linear(p, "mlp_head.4", hidden)

    def _check_mlp(self) -> None:
        for name, usual in (("encoder_num_layers", 2), ("encoder_dropout", 0.0)):
            if getattr(self, name) != usual:
                message = (
                    f"PromptEncoderConfig.{name} is {getattr(self, name)!r}, which the MLP has no use for; set it to "
                    f"{usual!r}, or encoder_reparameterization_type to 'LSTM'"
                )
                raise ConfigError(message)
