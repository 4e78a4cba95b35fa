"""Multitask prompt tuning: one prompt for all tasks, scaled for each by a matrix of low rank.

Source: Wang et al., Multitask Prompt Tuning Enables Parameter-Efficient Transfer Learning, 2023, section 3.1 (equation
1), arXiv:2303.02861.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from peftarray.arrays import Array, Params, constant, namespace, to_host, wide
from peftarray.errors import ConfigError, ShapeError
from peftarray.method import Param
from peftarray.method_dropout import Drop
from peftarray.prompts.prompt import EMBEDDINGS, TokenPrompt
from peftarray.prompts.prompt_tuning import check_text, options, text_rows
from peftarray.random import normal, normal_of
from peftarray.settings import one_of, setting, text, whole

__all__ = ["MultitaskPromptTuningConfig"]

_COLUMNS, _ROWS = "prefix_task_cols", "prefix_task_rows"
_FROM_SOURCE = ("AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK", "ONLY_SOURCE_SHARED")


@dataclass(frozen=True, kw_only=True)
class MultitaskPromptTuningConfig(TokenPrompt):
    """The tokens of task t are `P * (C_t @ R_t)`.

    P is `prompt_embeddings (total, token_dim)`, C `prefix_task_cols (tasks, total, ranks)` and R `prefix_task_rows
    (tasks, ranks, token_dim)`. At initialisation P is standard normal or a text's, C and R have deviation 0.02; or they
    come from a trained prompt: P alone, all for one of its tasks, or the means of C and of R over its tasks.

    Attributes:
        prompt_tuning_init: `"RANDOM"`, `"TEXT"`, `"AVERAGE_SOURCE_TASKS"`, `"EXACT_SOURCE_TASK"` or
            `"ONLY_SOURCE_SHARED"`.
        prompt_tuning_init_state_dict_path: the file of the trained prompt that the last three start from.
        prompt_tuning_init_task: which of its tasks, for `"EXACT_SOURCE_TASK"`.
        num_ranks: rank of the scaling matrices.
        num_tasks: how many tasks.
        prompt_tuning_init_text, tokenizer_name_or_path, tokenizer_kwargs: as for `PromptTuningConfig`.

    Example:
        >>> import numpy as np
        >>> config = MultitaskPromptTuningConfig(num_virtual_tokens=3, token_dim=4, num_tasks=2)
        >>> config.tokens(config.init_params(np.ones(1, np.float32))).shape
        (2, 3, 4)
    """

    peft_type: ClassVar[str] = "MULTITASK_PROMPT_TUNING"

    prompt_tuning_init: str = setting("RANDOM", one_of("RANDOM", "TEXT", *_FROM_SOURCE))
    prompt_tuning_init_text: str | None = setting(None, text)
    tokenizer_name_or_path: str | None = setting(None, text)
    tokenizer_kwargs: dict[str, Any] | None = setting(None, options)
    prompt_tuning_init_state_dict_path: str | None = setting(None, text)
    prompt_tuning_init_task: int = setting(0, whole(0))
    num_ranks: int = setting(1, whole(1))
    num_tasks: int = setting(1, whole(1))

    def __post_init__(self) -> None:
        super().__post_init__()
        check_text(self)

    def params(self) -> dict[str, Param]:
        dim = self.size("token_dim")
        return {
            EMBEDDINGS: Param("token dim", (self.total, dim), init=normal),
            _COLUMNS: Param("task token rank", (self.num_tasks, self.total, self.num_ranks), init=normal_of(0.02)),
            _ROWS: Param("task rank dim", (self.num_tasks, self.num_ranks, dim), init=normal_of(0.02)),
        }

    def stored(self) -> dict[str, Param]:
        return self.params()

    def to_store(self, p: Params) -> dict[str, Array]:
        return {name: p[name] for name in self.params()}

    def tokens(self, p: Params, *, drop: Drop | None = None) -> Array:
        return p[EMBEDDINGS] * (p[_COLUMNS] @ p[_ROWS])

    def source_file(self) -> str | None:
        return self.prompt_tuning_init_state_dict_path if self.prompt_tuning_init in _FROM_SOURCE else None

    def derive(
        self, like: Array, *, seed: int, embedding: Array | None, token_ids: Sequence[int] | None, source: Params | None
    ) -> dict[str, Array]:
        if self.prompt_tuning_init == "TEXT":
            return {EMBEDDINGS: text_rows(self, embedding, token_ids)}
        if self.prompt_tuning_init not in _FROM_SOURCE:
            return super().derive(like, seed=seed, embedding=embedding, token_ids=token_ids, source=source)
        if source is None:
            message = (
                f"prompt_tuning_init {self.prompt_tuning_init} starts from a trained prompt; give source, the arrays "
                "of prompt_tuning_init_state_dict_path"
            )
            raise ConfigError(message)
        return self._checked({name: self._taken(array, like) for name, array in self._of_source(source).items()})

    def _of_source(self, source: Params) -> dict[str, Array]:
        shared = {EMBEDDINGS: source[EMBEDDINGS]}
        if self.prompt_tuning_init == "ONLY_SOURCE_SHARED":
            return shared
        if self.prompt_tuning_init == "AVERAGE_SOURCE_TASKS":
            return shared | {
                name: namespace(source[name]).mean(source[name], axis=0, keepdims=True) for name in (_COLUMNS, _ROWS)
            }
        task, tasks = self.prompt_tuning_init_task, source[_COLUMNS].shape[0]
        if task >= tasks:
            message = f"prompt_tuning_init_task is {task}; the source has tasks 0 to {tasks - 1}"
            raise ConfigError(message)
        return shared | {name: source[name][task : task + 1, ...] for name in (_COLUMNS, _ROWS)}

    def _checked(self, made: dict[str, Array]) -> dict[str, Array]:
        for name, row in self.params().items():
            if name in made and tuple(made[name].shape) != row.shape:
                message = (
                    f"the source gives {name} as {tuple(made[name].shape)}; this prompt wants {row.shape}: with one "
                    "task and the source's sizes they agree"
                )
                raise ShapeError(message)
        return made

    @staticmethod
    def _taken(array: Array, like: Array) -> Array:
        return constant(to_host(array), wide(like))
