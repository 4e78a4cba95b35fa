"""A model with a soft prompt: the model's own weights, and beside them what the model reads of the prompt."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peftarray.arrays import Array, namespace
from peftarray.draws import dropout
from peftarray.errors import ConfigError, MatchError, UnsupportedError, nearest
from peftarray.formats.prompts import load_prompt, save_prompt, source_prompt
from peftarray.method_dropout import Drop
from peftarray.prompts import Host, Prompt, VirtualTokens
from peftarray.sites import saved_modules, with_heads
from peftarray.summary import trainable_summary
from peftarray.targets import is_saved

__all__ = ["PromptModel", "check_words"]


@dataclass(eq=False)
class PromptModel:
    """A model of `peftarray.models` with a soft prompt. Nothing in it changes but its `params`, when they are set.

    Attributes:
        base: the model.
        config: the prompt, with the model's sizes.
        arrays: the prompt's arrays: trained ones, or those of a file.
        whole: tensor of the model -> the array that takes its place (`modules_to_save`).
        trainable: whether training changes them.
        task_ids: the task of each text, for a prompt that has several; see `for_tasks`.
        extra: fields of its `adapter_config.json` that are not known here, which are written back.

    Example:
        >>> from peftarray import models
        >>> from peftarray.prompts import PromptTuningConfig
        >>> base = models.create({"model_type": "gpt2", "vocab_size": 11, "n_embd": 8, "n_layer": 1, "n_head": 2})
        >>> model = PromptModel.create(base, PromptTuningConfig(num_virtual_tokens=3))
        >>> model([[1, 2, 3, 4]]).shape, {name: array.shape for name, array in model.params.items()}
        ((1, 4, 11), {'prompt_embeddings': (3, 8)})
    """

    base: Any
    config: Prompt
    arrays: Mapping[str, Array]
    whole: Mapping[str, Array] = field(default_factory=dict)
    trainable: bool = True
    task_ids: Any = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.config, VirtualTokens) and self.config.submodules != 1:
            message = (
                f"{self.config.peft_type} with {self.config.submodules} submodules (task_type "
                f"{self.config.task_type}) is for an encoder with a decoder, and {type(self.base).__name__} is neither"
            )
            raise UnsupportedError(message)
        task = [0] if self.task_ids is None and "prefix_task_cols" in self.arrays else self.task_ids
        for name in self.config.weights(self.arrays, task_ids=task):
            if not self.base.reads(name):
                message = (
                    f"{type(self.base).__name__} does not read {name}, so {self.config.peft_type} has no effect on it"
                )
                raise UnsupportedError(message)

    @classmethod
    def create(
        cls, model: Any, config: Prompt, *, seed: int = 0, token_ids: Sequence[int] | None = None
    ) -> PromptModel:
        """A model with a new prompt.

        Args:
            model: one of `peftarray.models`.
            config: the prompt; sizes that are None are read from the model.
            seed: the same seed gives the same prompt on every library.
            token_ids: the words of `prompt_tuning_init_text`, as the model's tokenizer numbers them.

        Raises:
            PeftError: of the kind that fits; see `peftarray.errors`.
        """
        config = config.for_model(_host(model))
        embedding = _embedding(model)
        file = config.source_file()
        source = source_prompt(file) if file else None
        arrays = config.init_params(embedding, seed=seed, embedding=embedding, token_ids=token_ids, source=source)
        config, whole = _with_whole(model, config)
        return cls(model, config, arrays, whole)

    # The weights.

    @property
    def weights(self) -> dict[str, Array]:
        """The model's weights and, under names of its own, what it reads of the prompt."""
        return self._weights(None)

    def training_weights(self, key: Any) -> dict[str, Array]:
        """The same with the prompt's dropout, drawn by a step's key (`peftarray.draws.step_key`)."""
        places = itertools.count()

        def drop(x: Array, share: float) -> Array:
            return dropout(x, share, key, stream=f"prompt/{next(places)}")

        return self._weights(drop)

    def for_tasks(self, task_ids: Any) -> PromptModel:
        """The same model for texts of these tasks, `(batch,)`: a list, or an array of the model's library."""
        return dataclasses.replace(self, task_ids=task_ids)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """The model's answer, with the prompt before every text."""
        return self.base(self.weights, *arguments, **options)

    def generate(self, *arguments: Any, **options: Any) -> Any:
        """What the model writes after texts; see `peftarray.models.generate`."""
        return self.base.generate(self.weights, *arguments, **options)

    # Training.

    @property
    def peft_config(self) -> dict[str, Prompt]:
        """Name of the prompt -> its configuration."""
        return {"default": self.config}

    @property
    def params(self) -> dict[str, Array]:
        """Name -> array of what training changes. They may be set, all or some."""
        if not self.trainable:
            return {}
        own = {name: self.arrays[name] for name, row in self.config.params().items() if not row.frozen}
        return own | dict(self.whole)

    @params.setter
    def params(self, params: Mapping[str, Array]) -> None:
        changed = self.with_params(params)
        self.arrays, self.whole = changed.arrays, changed.whole

    def with_params(self, params: Mapping[str, Array]) -> PromptModel:
        """The same model with these in place of arrays of the same names among `params`.

        Raises:
            MatchError: a name is not among them.
        """
        known = self.params
        for name in params:
            if name not in known:
                message = f"{name} is not trained by this model{nearest(name, known)}"
                raise MatchError(message)
        arrays = {name: params.get(name, array) for name, array in self.arrays.items()}
        whole = {name: params.get(name, array) for name, array in self.whole.items()}
        return dataclasses.replace(self, arrays=arrays, whole=whole)

    def freeze(self) -> PromptModel:
        """The same model, of which training changes nothing."""
        return dataclasses.replace(self, trainable=False)

    def unfreeze(self) -> PromptModel:
        """The same model, whose prompt training changes.

        Raises:
            UnsupportedError: the file that it came from lacks what made the prompt.
        """
        self.config.check_trainable(self.arrays)
        return dataclasses.replace(self, trainable=True)

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """How many numbers training changes, and how many there are."""
        everything = [*self.base.weights.values(), *self.arrays.values(), *self.whole.values()]
        return _count(self.params.values()), _count(everything)

    def print_trainable_parameters(self) -> None:
        """Print how many numbers training changes, as PEFT words it."""
        print(trainable_summary(*self.get_nb_trainable_parameters()))

    # Ends.

    def merge_and_unload(self, safe_merge: bool = False) -> Any:
        """Refused.

        Raises:
            UnsupportedError: always.
        """
        message = f"{self.config.peft_type} cannot be merged: a soft prompt changes the input and not the weights"
        raise UnsupportedError(message)

    def unload(self) -> Any:
        """The model without the prompt."""
        return self.base

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the prompt as PEFT does: `adapter_config.json` and `adapter_model.safetensors`."""
        save_prompt(folder, self.config, self.arrays, replace=self.whole, extra=self.extra)

    @classmethod
    def from_pretrained(cls, model: Any, folder: str | Path, *, is_trainable: bool = False) -> PromptModel:
        """A model with the prompt that PEFT or `save_pretrained` wrote.

        Args:
            model: one of `peftarray.models`.
            folder: with `adapter_config.json` and `adapter_model.safetensors`.
            is_trainable: whether training goes on from it; what an encoder made cannot be trained further.

        Raises:
            PeftError: of the kind that fits; see `peftarray.errors`.
        """
        saved = load_prompt(folder, host=_host(model), like=_embedding(model))
        for name in saved.replace:
            if name not in model.weights:
                message = f"{folder} brings {name}, which the model does not have{nearest(name, model.weights)}"
                raise MatchError(message)
        found = cls(model, saved.config, saved.params, saved.replace, trainable=False, extra=saved.extra)
        return found.unfreeze() if is_trainable else found

    def _weights(self, drop: Drop | None) -> dict[str, Array]:
        own = self.config.weights(self.arrays, task_ids=self.task_ids, drop=drop)
        return dict(self.base.weights) | dict(self.whole) | own


def check_words(config: Any, token_ids: Sequence[int] | None) -> None:
    """Refuse words to start from for what is no prompt.

    Raises:
        ConfigError: some are given.
    """
    if token_ids is not None and not isinstance(config, Prompt):
        message = f"{type(config).__name__} starts from no token_ids, which are a soft prompt's words; leave them out"
        raise ConfigError(message)


def _with_whole(model: Any, config: Prompt) -> tuple[Prompt, dict[str, Array]]:
    """The prompt with the heads that its task trains whole, and a copy of what is trained whole."""
    if not isinstance(config, VirtualTokens):
        return config, {}
    modules = {name.rpartition(".")[0] for name in model.weights}
    config = with_heads(config, modules)
    saved_modules(modules, config)
    names = [name for name in model.weights if is_saved(name.rpartition(".")[0], config)]
    return config, {name: namespace(model.weights[name]).asarray(model.weights[name], copy=True) for name in names}


def _host(model: Any) -> Host:
    if not callable(getattr(model, "reads", None)):
        message = (
            f"a soft prompt is read by the model, and {type(model).__name__} is none that does; load one of "
            "peftarray.models, or give your own function what config.weights(params) makes"
        )
        raise ConfigError(message)
    return Host.read(vars(model.config), model.weights)


def _embedding(model: Any) -> Array:
    """The table of the model's words, its first of so many rows."""
    return next(array for array in model.weights.values() if array.shape[0] == model.config.vocab_size)


def _count(arrays: Any) -> int:
    return sum(math.prod(array.shape) for array in arrays)
