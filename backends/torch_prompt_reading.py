"""How a model of transformers reads a soft prompt: what it is called with, and what of its output is the text's."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from peftarray.backends.torch_prompt_checks import embedding_of
from peftarray.backends.torch_prompt_inputs import (
    Inputs,
    alone,
    is_behind,
    scored_at_the_end,
    text_size,
    with_keys,
    with_labels,
    with_rows,
)

from peftarray.errors import ConfigError, UnsupportedError
from peftarray.method_dropout import Drop
from peftarray.prompts import MultitaskPromptTuningConfig, PrefixTuningConfig, TokenPrompt
from peftarray.prompts.prompt import TOKENS, without_tasks

__all__ = ["Reading"]


@dataclass(frozen=True, eq=False)
class Reading:
    """How a model reads a prompt.

    Attributes:
        module: the model.
        config: the prompt.
        arrays: its arrays, by the names of its table.
        task_ids: the task of each text, where there are several.
        drop: the prompt's dropout; None outside of training.
    """

    module: Any
    config: PrefixTuningConfig | TokenPrompt
    arrays: Mapping[str, torch.Tensor]
    task_ids: torch.Tensor | None = None
    drop: Drop | None = None

    def inputs(self, given: Inputs) -> Inputs:
        """The model's arguments with the prompt before the texts.

        Raises:
            PeftError: of the kind that fits, where they cannot have one.
        """
        config, embed = self.config, embedding_of(self.module)
        if isinstance(config, PrefixTuningConfig):
            without_tasks(config, self.task_ids)
            self._check_keys_are_kept()
            pairs = [(k.to(embed.weight), v.to(embed.weight)) for k, v in config.key_values(self.arrays)]
            return with_keys(self._with_decoder(given), pairs, self._side)
        first, second = self._rows()
        if not self._side:
            moved = given if is_behind(given) else with_labels(given, self._count, of_texts=self._labels_texts)
            return with_rows(moved, first, embed)
        if self._decodes_behind_rows:
            given = with_labels(with_rows(self._with_decoder(given), second, embed, self._side), self._count)
        # What was encoded stands behind the prompt already.
        return given if given.get("encoder_outputs") is not None else with_rows(given, first, embed)

    def encoder_inputs(self, given: Inputs) -> Inputs:
        """The arguments of `generate`, which runs an encoder before it calls the model."""
        if not self._side or isinstance(self.config, PrefixTuningConfig):
            return given
        if given.get("input_ids") is None and given.get("inputs") is not None:
            given = {**given, "input_ids": given["inputs"]}
        return with_rows({n: x for n, x in given.items() if n != "inputs"}, self._rows()[0], embedding_of(self.module))

    def length(self, given: Inputs) -> int:
        """How long the texts are that the model says something of."""
        return text_size(self._with_decoder(given), self._side)[1]

    def scoring(self, given: Inputs) -> AbstractContextManager[None]:
        """In this context a model that scores whole texts reads their ends where they are."""
        in_rows = not isinstance(self.config, PrefixTuningConfig)
        return scored_at_the_end(self.module, given) if in_rows and not self._side else nullcontext()

    def of_text(self, output: Any, length: int) -> Any:
        """The output, with what the model says of each token for those of the text alone."""
        in_rows = not isinstance(self.config, PrefixTuningConfig)
        return alone(output, length) if in_rows and (not self._side or self._decodes_behind_rows) else output

    @property
    def _count(self) -> int:
        return self.config.size("num_virtual_tokens")

    @property
    def _side(self) -> str:
        """Before the names of the arguments that what the model says of tokens is about."""
        return "decoder_" if getattr(self.module.config, "is_encoder_decoder", False) else ""

    @property
    def _decodes_behind_rows(self) -> bool:
        # The second half of other prompts' rows is read by nothing, as in PEFT.
        config = self.config
        return bool(self._side) and config.submodules == 2 and isinstance(config, MultitaskPromptTuningConfig)

    @property
    def _labels_texts(self) -> bool:
        """Whether a label is that of a text and not of a token."""
        return self.config.task_type == "SEQ_CLS" or "SequenceClassification" in type(self.module).__name__

    def _rows(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The rows before a text, and those before a decoder's, which may be none."""
        rows = self.config.weights(self.arrays, task_ids=self.task_ids, drop=self.drop)[TOKENS]
        return rows[..., : self._count, :], rows[..., self._count :, :]

    def _with_decoder(self, given: Inputs) -> Inputs:
        """The arguments with the decoder's text, which follows from labels where it is not given."""
        if not self._side or any(given.get(f"decoder_{name}") is not None for name in ("input_ids", "inputs_embeds")):
            return given
        if given.get("labels") is None:
            message = "neither decoder_input_ids nor labels are given; the decoder reads one of them"
            raise ConfigError(message)
        made = self.module.prepare_decoder_input_ids_from_labels(labels=given["labels"])
        return {**given, "decoder_input_ids": made}

    def _check_keys_are_kept(self) -> None:
        parts = self.module.modules() if self.module.training else ()
        if any(getattr(part, "gradient_checkpointing", False) for part in parts):
            message = (
                "gradient checkpointing keeps no keys and values, so a prefix has no effect under it; turn it off by "
                "gradient_checkpointing_disable()"
            )
            raise UnsupportedError(message)
