"""Where a tied head would stand, told from a file that does not hold it: against the classes of transformers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from peftarray.formats.names import BaseNames

# Classes whose head is tied unless their configuration says otherwise: every name that a head has, and every trace that
# it leaves or does not leave in a file.
TIED = """
    AlbertForMaskedLM BartForConditionalGeneration BertForMaskedLM BertForPreTraining BioGptForCausalLM
    Blip2ForConditionalGeneration BloomForCausalLM CTRLLMHeadModel DebertaV2ForMaskedLM DistilBertForMaskedLM
    ElectraForMaskedLM FunnelForMaskedLM GPT2DoubleHeadsModel GPT2LMHeadModel GPTNeoXJapaneseForCausalLM
    Gemma2ForCausalLM Kosmos2ForConditionalGeneration MPNetForMaskedLM MarianMTModel ModernBertForMaskedLM
    MoonshineForConditionalGeneration OPTForCausalLM RobertaForCausalLM RobertaForMaskedLM SeamlessM4TForTextToText
    SpeechT5ForSpeechToText T5ForConditionalGeneration T5GemmaForConditionalGeneration TrOCRForCausalLM
    WhisperForConditionalGeneration XLMRobertaForMaskedLM XLMWithLMHeadModel XLNetLMHeadModel
""".split()
# These have no head for tokens, or keep it in the file.
WITHOUT = """
    BertForSequenceClassification BertModel ElectraForPreTraining GPT2Model LlamaForCausalLM LlamaModel
    Pix2StructForConditionalGeneration T5EncoderModel ViTForImageClassification WhisperForAudioClassification
""".split()


@dataclass(frozen=True)
class Info:
    shape: tuple[int, ...]


class File(dict[str, Info]):
    """As much of a checkpoint as names need."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], config: dict[str, Any]) -> None:
        super().__init__({name: Info(shape) for name, shape in shapes.items()})
        self.path, self.config = Path("model"), config


def built(name: str) -> Any:
    """A model of a class with its default configuration, without memory for its tensors."""
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    model_class = getattr(transformers, name)
    with torch.device("meta"):
        return model_class(model_class.config_class())


def names_of(model: Any, *, tied: bool) -> BaseNames:
    """The names of what `save_pretrained` would write."""
    left_out = model.get_expanded_tied_weights_keys(all_submodels=True) if tied else {}
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in left_out}
    config = model.config.to_dict() | {"architectures": [type(model).__name__]}
    return BaseNames(File(shapes, config))  # type: ignore[arg-type]


def module_of(model: Any, wanted: Any) -> str:
    return next(name for name, module in model.named_modules() if module is wanted)


@pytest.mark.parametrize("name", TIED)
def test_the_head_that_a_file_lacks(name):
    model = built(name)
    names = names_of(model, tied=True)
    head = module_of(model, model.get_output_embeddings())
    ties = model.get_expanded_tied_weights_keys(all_submodels=True)
    assert names.missing_head() == head
    assert f"{names.input_embedding(head)}.weight" == ties[f"{head}.weight"]
    names.untie(head)
    # What is tied to the embedding, and the bias that a masked head shares with the module around it.
    assert names.untied == {tie: ties[tie] for tie in (f"{head}.weight", f"{head}.bias") if tie in ties}


@pytest.mark.parametrize("name", WITHOUT)
def test_no_head_where_none_is_missing(name):
    assert names_of(built(name), tied=False).missing_head() is None
