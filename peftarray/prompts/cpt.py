"""Context-aware prompt tuning (CPT): the words of a few examples, each moved within a small ball.

Source: Blau et al., Context-aware Prompt Tuning: Advancing In-Context Learning with Adversarial Methods, 2024, section
3, arXiv:2410.17222.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from peftarray.arrays import Array, Params, constant, integers, namespace, stop_gradient
from peftarray.autodiff.fused import log_softmax
from peftarray.errors import ConfigError
from peftarray.method import Param
from peftarray.method_dropout import Drop
from peftarray.prompts.prompt import EMBEDDINGS, TokenPrompt, words
from peftarray.random import zeros
from peftarray.settings import Rule, number, one_of, setting, text, whole

__all__ = ["CPTConfig"]

_BASE, _MOVE = "embedding.weight", "delta_embedding.weight"
_FORMAT, _INPUT, _LABEL_FORMAT = 1, 2, 3
"""What a token is, its type modulo 4: the format of an input, an input, the format of a label; 0 is a label."""
_FIXED = 1e-10
_IGNORED = -100
_numbers = Rule(
    lambda value: value is None or (isinstance(value, (list, tuple)) and all(whole(0).allows(item) for item in value)),
    "None or a list of whole numbers of at least 0",
)


@dataclass(frozen=True, kw_only=True)
class CPTConfig(TokenPrompt):
    """The tokens are `E + D`: E are the embedding's rows for `cpt_token_ids`, D is trained, a row within a ball each.

    Row i of D has a norm of at most `e_i sqrt(token_dim / 2048)`, where e_i is `opt_projection_epsilon` for tokens of
    an input and `opt_projection_format_epsilon` for those of a format; labels stay where they are. What is longer is
    scaled back, and gradients pass as if it were not. A file holds the sums alone. At initialisation D is zero.

    Attributes:
        cpt_token_ids: the words; one word, number 0, if None.
        cpt_mask: as many numbers; of no effect, in PEFT as well.
        cpt_tokens_type_mask: what each word is: 4 k + 1 to 4 k + 4 for the input's format, the input, the label's
            format and the label of example k; 1 each if None.
        opt_weighted_loss_type: `"none"` or `"decay"`, with which older examples count less in the loss.
        opt_loss_decay_factor: how much less, from example to example.
        opt_projection_epsilon, opt_projection_format_epsilon: radius of the balls.
        tokenizer_name_or_path: which tokenizer numbered the words; of no effect.

    Example:
        >>> import numpy as np
        >>> config = CPTConfig(task_type="CAUSAL_LM", cpt_token_ids=[2, 0], token_dim=4)
        >>> embedding = np.arange(12, dtype=np.float32).reshape(3, 4)
        >>> config.tokens(config.init_params(embedding, embedding=embedding)).tolist()
        [[8.0, 9.0, 10.0, 11.0], [0.0, 1.0, 2.0, 3.0]]
    """

    peft_type: ClassVar[str] = "CPT"

    cpt_token_ids: list[int] | tuple[int, ...] | None = setting(None, _numbers)
    cpt_mask: list[int] | tuple[int, ...] | None = setting(None, _numbers)
    cpt_tokens_type_mask: list[int] | tuple[int, ...] | None = setting(None, _numbers)
    opt_weighted_loss_type: str = setting("none", one_of("none", "decay"))
    opt_loss_decay_factor: float = setting(1.0, number())
    opt_projection_epsilon: float = setting(0.1, number(0.0))
    opt_projection_format_epsilon: float = setting(0.1, number(0.0))
    tokenizer_name_or_path: str | None = setting(None, text)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.task_type != "CAUSAL_LM":
            message = f"CPTConfig.task_type is {self.task_type!r}; it must be 'CAUSAL_LM', the one that it is for"
            raise ConfigError(message)
        ids = [0] if self.cpt_token_ids is None else self.cpt_token_ids
        # They follow from the words, so that they are set and not asked for.
        for name, value in (
            ("cpt_token_ids", ids),
            ("num_virtual_tokens", len(ids)),
            ("cpt_mask", self.cpt_mask if self.cpt_mask is not None else [1] * len(ids)),
            (
                "cpt_tokens_type_mask",
                self.cpt_tokens_type_mask if self.cpt_tokens_type_mask is not None else [1] * len(ids),
            ),
        ):
            object.__setattr__(self, name, value)
        for name in ("cpt_mask", "cpt_tokens_type_mask"):
            if len(getattr(self, name)) != len(ids):
                message = f"CPTConfig.{name} has {len(getattr(self, name))} entries for {len(ids)} cpt_token_ids"
                raise ConfigError(message)

    def params(self) -> dict[str, Param]:
        shape = (self.total, self.size("token_dim"))
        return {_BASE: Param("token dim", shape, frozen=True), _MOVE: Param("token dim", shape, init=zeros)}

    def derive(
        self, like: Array, *, seed: int, embedding: Array | None, token_ids: Sequence[int] | None, source: Params | None
    ) -> dict[str, Array]:
        super().derive(like, seed=seed, embedding=embedding, token_ids=token_ids, source=source)
        assert self.cpt_token_ids is not None
        return {_BASE: words(embedding, self.cpt_token_ids, "CPTConfig")}

    def tokens(self, p: Params, *, drop: Drop | None = None) -> Array:
        if EMBEDDINGS in p:
            return p[EMBEDDINGS]
        move = p[_MOVE]
        free = constant(self._column([float(kind % 4 > 0) for kind in self._types]), move) * move
        return p[_BASE] + (free + stop_gradient(self.projected(move) - free))

    def projected(self, move: Array) -> Array:
        """The rows of D, those that are too long scaled back to their balls; after a step, to go on from there."""
        xp = namespace(move)
        radius = self._column([self._radius(kind) for kind in self._types])
        norm = xp.sqrt(xp.sum(move * move, axis=1, keepdims=True))
        least = constant(np.maximum(radius, _FIXED), move)
        return move * (constant(radius, move) / xp.maximum(norm, least))

    def labelled(self, labels: Array, input_types: Array | None = None) -> tuple[Array, Array]:
        """Labels and types of the prompt's words and of a text's behind them, for `weighted_loss`.

        Args:
            labels: the text's words `(batch, length)`; what is -100 does not count.
            input_types: what each word of the text is, numbered as in `cpt_tokens_type_mask` from the text's own first
                example on; 4 each, a label, if None.

        Returns:
            `(batch, total + length)` twice. Words that are no label have the label -100.
        """
        assert self.cpt_token_ids is not None
        xp, batch = namespace(labels), labels.shape[0]
        ids, kinds = (
            xp.astype(xp.broadcast_to(integers(list(values), labels), (batch, self.total)), labels.dtype)
            for values in (self.cpt_token_ids, self._types)
        )
        own = xp.full_like(labels, 4) if input_types is None else xp.astype(input_types, labels.dtype)
        # Whole examples are counted on, so that a word stays what it is.
        own = xp.where(own > 0, own + 4 * -(-max(self._types) // 4), own)
        types = xp.concat([kinds, own], axis=1)
        return xp.where(_are_labels(types), xp.concat([ids, labels], axis=1), _IGNORED), types

    def weighted_loss(self, logits: Array, labels: Array, types: Array) -> Array:
        """The mean cross-entropy of each next label, those of older examples by `opt_loss_decay_factor` less.

        With the decay, the labels of the last example have weight 1, those of the one before it the factor, then its
        square and so on; the sum is divided by how many there are, and not by their weights.

        Args:
            logits: of prompt and text, `(batch, total + length, vocabulary)`.
            labels, types: from `labelled`.
        """
        shares, labels, types = log_softmax(logits[:, :-1, :]), labels[:, 1:], types[:, 1:]
        xp, counts = namespace(shares), labels != _IGNORED
        chosen = xp.take_along_axis(shares, xp.where(counts, labels, 0)[..., None], axis=-1)[..., 0]
        weights = xp.astype(counts, shares.dtype)
        number = xp.sum(weights)
        if self.opt_weighted_loss_type == "decay":
            weights = weights * self.opt_loss_decay_factor ** xp.astype(_newer(types), shares.dtype)
        return -xp.sum(chosen * weights) / number

    @property
    def _types(self) -> Sequence[int]:
        return self.cpt_tokens_type_mask or ()

    def _radius(self, kind: int) -> float:
        share = {
            _FORMAT: self.opt_projection_format_epsilon,
            _INPUT: self.opt_projection_epsilon,
            _LABEL_FORMAT: self.opt_projection_format_epsilon,
        }
        return share[kind % 4] * math.sqrt(self.size("token_dim") / 2048) if kind % 4 else _FIXED

    @staticmethod
    def _column(values: Sequence[float]) -> np.ndarray:
        return np.asarray(values, np.float32)[:, None]


def _are_labels(types: Array) -> Array:
    return (types > 0) & (types % 4 == 0)


def _newer(types: Array) -> Array:
    """How many examples in a text have their label behind that of each word's example, `(batch, length)`."""
    xp, labels = namespace(types), _are_labels(types)
    earlier = integers(np.tri(types.shape[1], k=-1), types) > 0  # (a word, those before it)
    repeated = xp.any((types[:, :, None] == types[:, None, :]) & earlier, axis=2)
    first = labels & ~repeated
    later = first[:, None, :] & (types[:, None, :] > types[:, :, None])
    return xp.sum(xp.astype(later, types.dtype), axis=2)
