"""Prompt tuning: rows that are trained stand before the embedded tokens of every text.

Source: Lester et al., The Power of Scale for Parameter-Efficient Prompt Tuning, 2021, section 2, arXiv:2104.08691.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from peftarray.arrays import Array, Params
from peftarray.errors import ConfigError
from peftarray.method import Param
from peftarray.method_dropout import Drop
from peftarray.prompts.prompt import EMBEDDINGS, TokenPrompt, words
from peftarray.random import normal, uniform
from peftarray.settings import Rule, one_of, setting, text

__all__ = ["PromptTuningConfig", "check_text", "text_rows"]

options = Rule(lambda value: value is None or isinstance(value, dict), "None or a mapping of options")


@dataclass(frozen=True, kw_only=True)
class PromptTuningConfig(TokenPrompt):
    """`prompt_embeddings (total, token_dim)` are the virtual tokens.

    At initialisation the rows are standard normal numbers, rows of the embedding for words drawn at random, or those of
    a text, which is repeated or cut to the number of tokens.

    Attributes:
        prompt_tuning_init: `"RANDOM"`, `"SAMPLE_VOCAB"` or `"TEXT"`.
        prompt_tuning_init_text: the text, for `"TEXT"`.
        tokenizer_name_or_path: the tokenizer that numbers its words.
        tokenizer_kwargs: how that tokenizer is loaded.

    Example:
        >>> import numpy as np
        >>> config = PromptTuningConfig(num_virtual_tokens=3, token_dim=4)
        >>> p = config.init_params(np.ones(1, np.float32))
        >>> config.tokens(p).shape
        (3, 4)
    """

    peft_type: ClassVar[str] = "PROMPT_TUNING"

    prompt_tuning_init: str = setting("RANDOM", one_of("RANDOM", "SAMPLE_VOCAB", "TEXT"))
    prompt_tuning_init_text: str | None = setting(None, text)
    tokenizer_name_or_path: str | None = setting(None, text)
    tokenizer_kwargs: dict[str, Any] | None = setting(None, options)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_text(self)

    def params(self) -> dict[str, Param]:
        return {EMBEDDINGS: Param("token dim", (self.total, self.size("token_dim")), init=normal)}

    def tokens(self, p: Params, *, drop: Drop | None = None) -> Array:
        return p[EMBEDDINGS]

    def derive(
        self, like: Array, *, seed: int, embedding: Array | None, token_ids: Sequence[int] | None, source: Params | None
    ) -> dict[str, Array]:
        if self.prompt_tuning_init == "TEXT":
            return {EMBEDDINGS: text_rows(self, embedding, token_ids)}
        super().derive(like, seed=seed, embedding=embedding, token_ids=token_ids, source=source)
        if self.prompt_tuning_init == "RANDOM":
            return {}
        vocabulary = 0 if embedding is None else embedding.shape[0]
        drawn = uniform(seed, "prompt/words", (self.total,)).astype("float64") * vocabulary
        return {EMBEDDINGS: words(embedding, drawn.astype("int64").tolist(), "prompt_tuning_init SAMPLE_VOCAB")}


def check_text(config: Any) -> None:
    """Check the fields that belong to a prompt that starts from a text.

    Raises:
        ConfigError: one is missing, or has no use.
    """
    if config.prompt_tuning_init == "TEXT":
        for name in ("tokenizer_name_or_path", "prompt_tuning_init_text"):
            if not getattr(config, name):
                message = (
                    f"{type(config).__name__}.{name} is {getattr(config, name)!r}; prompt_tuning_init TEXT needs it"
                )
                raise ConfigError(message)
    elif config.tokenizer_kwargs:
        message = (
            f"{type(config).__name__}.tokenizer_kwargs is set, and prompt_tuning_init is "
            f"{config.prompt_tuning_init}, which needs no tokenizer; use TEXT or leave it out"
        )
        raise ConfigError(message)


def text_rows(config: TokenPrompt, embedding: Array | None, token_ids: Sequence[int] | None) -> Array:
    """The rows of a text's words, repeated or cut to the number of virtual tokens.

    Raises:
        ConfigError: there are no words.
    """
    if not token_ids:
        message = (
            "prompt_tuning_init TEXT starts from a text's words; give token_ids, what the tokenizer makes of "
            "prompt_tuning_init_text"
        )
        raise ConfigError(message)
    repeated = [token_ids[place % len(token_ids)] for place in range(config.total)]
    return words(embedding, repeated, "prompt_tuning_init TEXT")
