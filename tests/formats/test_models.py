"""`formats.models` against transformers itself: tiny models, saved, and found again tensor by tensor."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import pytest

from peftarray.errors import MatchError
from peftarray.formats.models import (
    BASE_PREFIXES,
    Place,
    input_embedding_names,
    is_conv1d,
    live_places,
    output_embedding_names,
    parameter_order,
    stored_transposed,
    types_inside,
)

DECODER = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}
BERT = {k: v for k, v in DECODER.items() if k not in ("num_key_value_heads", "head_dim")}
VIT = BERT | {"image_size": 8, "patch_size": 4, "num_channels": 3}
CLIP_VISION = {k: v for k, v in VIT.items() if k not in ("vocab_size", "pad_token_id", "max_position_embeddings")}
GPT2 = {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "n_inner": 24}
EXPERTS = DECODER | {"num_experts": 3, "num_local_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
DEEPSEEK = DECODER | {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "moe_intermediate_size": 12,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 4,
    "q_lora_rank": 4,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "num_key_value_heads": 2,
}
QWEN_VISION = {"depth": 2, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 1}
QWEN25_VISION = QWEN_VISION | {"intermediate_size": 24, "out_hidden_size": 16, "fullatt_block_indexes": [1]}
ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
LLAVA = {"vision_config": {"model_type": "clip_vision_model", **CLIP_VISION}, "image_token_index": 39}
SIGLIP = {"vision_config": {"model_type": "siglip_vision_model", **CLIP_VISION}, "image_token_index": 39}
SEGFORMER = {"num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [8, 16]} | {
    **{"patch_sizes": [7, 3], "strides": [4, 2], "num_attention_heads": [1, 2], "mlp_ratios": [2, 2]},
}
DETR = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 12], "depths": [1, 1], "layer_type": "bottleneck"}

# name of the model's class, settings of its configuration
TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", DECODER),
    "llama-tied": ("LlamaForCausalLM", DECODER | {"tie_word_embeddings": True}),
    "llama-classifier": ("LlamaForSequenceClassification", DECODER),
    "mistral": ("MistralForCausalLM", DECODER),
    "qwen2": ("Qwen2ForCausalLM", DECODER),
    "qwen3": ("Qwen3ForCausalLM", DECODER),
    "gemma": ("GemmaForCausalLM", DECODER),
    "gemma2": ("Gemma2ForCausalLM", DECODER),
    "gemma3_text": ("Gemma3ForCausalLM", DECODER),
    "phi3": ("Phi3ForCausalLM", DECODER),
    "gpt2": ("GPT2LMHeadModel", GPT2),
    "openai-gpt": ("OpenAIGPTLMHeadModel", GPT2),
    "gpt_neox": ("GPTNeoXForCausalLM", BERT),
    "bert": ("BertForSequenceClassification", BERT),
    "bert-masked": ("BertForMaskedLM", BERT),
    "roberta": ("RobertaForMaskedLM", BERT),
    "distilbert": (
        "DistilBertForMaskedLM",
        {"vocab_size": 40, "dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 2},
    ),
    "t5": ("T5ForConditionalGeneration", {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2}),
    "vit": ("ViTForImageClassification", VIT),
    "vit-bare": ("ViTModel", VIT),
    "deit": ("DeiTForImageClassification", VIT),
    "beit": ("BeitForImageClassification", VIT | {"use_relative_position_bias": True}),
    "beit-shared": ("BeitForImageClassification", VIT | {"use_shared_relative_position_bias": True}),
    "dinov2": ("Dinov2ForImageClassification", VIT),
    "swin": ("SwinForImageClassification", {"image_size": 16, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2]}),
    "segformer": ("SegformerForImageClassification", SEGFORMER),
    "segformer-masks": ("SegformerForSemanticSegmentation", SEGFORMER | {"decoder_hidden_size": 8}),
    "resnet": ("ResNetForImageClassification", RESNET),
    "detr": (
        "DetrForObjectDetection",
        DETR | {"use_timm_backbone": False, "backbone": None, "backbone_config": {"model_type": "resnet", **RESNET}},
    ),
    "clip": (
        "CLIPModel",
        {"text_config": CLIP_VISION | {"vocab_size": 40}, "vision_config": CLIP_VISION, "projection_dim": 8},
    ),
    "clip_vision_model": ("CLIPVisionModel", CLIP_VISION),
    "clip_text_model": ("CLIPTextModel", CLIP_VISION | {"vocab_size": 40}),
    "mixtral": ("MixtralForCausalLM", EXPERTS),
    "qwen2_moe": ("Qwen2MoeForCausalLM", EXPERTS | {"shared_expert_intermediate_size": 12}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", EXPERTS),
    "olmoe": ("OlmoeForCausalLM", EXPERTS),
    "phimoe": ("PhimoeForCausalLM", EXPERTS),
    "deepseek_v2": ("DeepseekV2ForCausalLM", DEEPSEEK),
    "deepseek_v3": ("DeepseekV3ForCausalLM", DEEPSEEK),
    "glm4_moe": ("Glm4MoeForCausalLM", DEEPSEEK),
    "dots1": ("Dots1ForCausalLM", DEEPSEEK),
    "hunyuan_v1_moe": ("HunYuanMoEV1ForCausalLM", EXPERTS | {"moe_topk": 2}),
    "lfm2_moe": ("Lfm2MoeForCausalLM", EXPERTS | {"num_dense_layers": 1, "layer_types": ["conv", "full_attention"]}),
    "jamba": ("JambaForCausalLM", EXPERTS | {"use_mamba_kernels": False, "mamba_d_state": 4, "mamba_dt_rank": 2}),
    "granitemoe": ("GraniteMoeForCausalLM", EXPERTS),
    "qwen3_5_text": (
        "Qwen3_5ForCausalLM",
        DECODER
        | {
            "layer_types": ["linear_attention", "full_attention"],
            "rope_parameters": ROPE | {"partial_rotary_factor": 1.0},
        }
        | {
            "linear_num_value_heads": 2,
            "linear_num_key_heads": 1,
            "linear_key_head_dim": 4,
            "linear_value_head_dim": 4,
        },
    ),
    "gpt_oss": ("GptOssForCausalLM", EXPERTS | {"layer_types": ["full_attention"] * 2}),
    "llama4_text": (
        "Llama4ForCausalLM",
        EXPERTS | {"intermediate_size_mlp": 20, "layer_types": ["full_attention"] * 2},
    ),
    "llava": ("LlavaForConditionalGeneration", LLAVA | {"text_config": {"model_type": "llama", **DECODER}}),
    "llava-mixtral": ("LlavaForConditionalGeneration", LLAVA | {"text_config": {"model_type": "mixtral", **EXPERTS}}),
    "video_llava": ("VideoLlavaForConditionalGeneration", LLAVA | {"text_config": {"model_type": "llama", **DECODER}}),
    "llava_next": ("LlavaNextForConditionalGeneration", LLAVA | {"text_config": {"model_type": "llama", **DECODER}}),
    "aya_vision": ("AyaVisionForConditionalGeneration", SIGLIP | {"text_config": {"model_type": "cohere2", **DECODER}}),
    "paligemma": ("PaliGemmaForConditionalGeneration", SIGLIP | {"text_config": {"model_type": "gemma", **DECODER}}),
    "gemma3": ("Gemma3ForConditionalGeneration", SIGLIP | {"text_config": DECODER, "mm_tokens_per_image": 4}),
    "qwen2_vl": (
        "Qwen2VLForConditionalGeneration",
        {"text_config": DECODER | {"rope_parameters": ROPE}, "vision_config": QWEN_VISION},
    ),
    "qwen2_5_vl": (
        "Qwen2_5_VLForConditionalGeneration",
        {"text_config": DECODER | {"rope_parameters": ROPE}, "vision_config": QWEN25_VISION},
    ),
    "qwen3_vl_moe": (
        "Qwen3VLMoeForConditionalGeneration",
        {
            "text_config": EXPERTS | {"rope_parameters": ROPE},
            "vision_config": QWEN25_VISION | {"deepstack_visual_indexes": [0], "num_position_embeddings": 16},
        },
    ),
    "vision-encoder-decoder": (
        "VisionEncoderDecoderModel",
        {
            "encoder": {"model_type": "vit", **VIT},
            "decoder": {"model_type": "bert", "is_decoder": True, "add_cross_attention": True, **BERT},
        },
    ),
}
# Built from their default configurations, without memory for their tensors; what TINY has is left out.
BY_DEFAULT = """
    AltCLIPModel AriaForConditionalGeneration AriaTextForCausalLM ASTModel AudioFlamingo3ForConditionalGeneration
    BeamForCausalLM ChineseCLIPVisionModel CLIPTextModel CLIPVisionModel Cohere2MoeForCausalLM
    Cohere2VisionForConditionalGeneration ColPaliForRetrieval DepthAnythingForDepthEstimation
    Dinov2WithRegistersForImageClassification DINOv3ConvNextModel DINOv3ViTModel Ernie4_5_MoeForCausalLM
    ExaoneMoeForCausalLM FlexOlmoForCausalLM FuyuForCausalLM Gemma3nForCausalLM Glm4MoeLiteForCausalLM
    Glm4vMoeForConditionalGeneration GotOcr2ForConditionalGeneration
    GraniteMoeHybridForCausalLM GraniteMoeSharedForCausalLM GraniteSpeechForConditionalGeneration
    IJepaForImageClassification InternVLForConditionalGeneration LagunaForCausalLM Lfm2VlForConditionalGeneration
    LlavaNextVideoForConditionalGeneration LlavaOnevisionForConditionalGeneration
    MaskFormerForInstanceSegmentation MellumForCausalLM MiMoV2FlashForCausalLM MiniMaxForCausalLM MiniMaxM2ForCausalLM
    Mistral3ForConditionalGeneration MllamaForConditionalGeneration NemotronHForCausalLM
    PaddleOCRVLForConditionalGeneration PromptDepthAnythingForDepthEstimation Qwen2_5OmniForConditionalGeneration
    Qwen2_5OmniThinkerForConditionalGeneration Qwen2AudioForConditionalGeneration Qwen3_5ForCausalLM
    Qwen3_5MoeForConditionalGeneration Qwen3NextForCausalLM Qwen3OmniMoeThinkerForConditionalGeneration
    RTDetrForObjectDetection RTDetrV2ForObjectDetection SiglipVisionModel SolarOpenForCausalLM
    VideoLlavaForConditionalGeneration VipLlavaForConditionalGeneration ViTMAEModel VivitModel
    VoxtralForConditionalGeneration
""".split()
# These embed no tokens, or not tokens alone.
IMAGES = {
    *("vit", "vit-bare", "deit", "beit", "beit-shared", "dinov2", "swin", "segformer", "segformer-masks", "resnet"),
    *("detr", "clip", "clip_vision_model", "vision-encoder-decoder"),
}
# Types whose disk names are all live already.
SAME = {
    *("llama", "llama-tied", "llama-classifier", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3"),
    *("gpt2", "openai-gpt", "bert", "bert-masked", "roberta", "distilbert", "t5", "resnet", "clip", "gpt_oss"),
    *("llama4_text", "qwen3_vl_moe", "clip_vision_model", "clip_text_model", "qwen3_5_text"),
}


@dataclass(frozen=True)
class Saved:
    """A model as transformers holds it, and as it wrote it."""

    model: Any
    config: dict[str, Any]
    disk: dict[str, np.ndarray]
    live: dict[str, np.ndarray] = field(repr=False)

    def places(self) -> dict[str, tuple[Place, ...]]:
        return places_of(self.config, self.disk)


def places_of(config: dict[str, Any], disk: dict[str, np.ndarray]) -> dict[str, tuple[Place, ...]]:
    shapes = {name: array.shape for name, array in disk.items()}
    return live_places(config["model_type"], shapes, types_inside(config))


def arrays_of(model: Any) -> dict[str, np.ndarray]:
    return {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers", minversion="5.0")
    from safetensors.numpy import load_file

    transformers.logging.set_verbosity_error()

    @cache
    def build(case: str) -> Saved:
        class_name, settings = TINY[case]
        model_class = getattr(transformers, class_name)
        torch.manual_seed(0)
        model = model_class(model_class.config_class(**settings))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_()
        folder = tmp_path_factory.mktemp("tiny")
        model.save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text())
        return Saved(model, config, load_file(folder / "model.safetensors"), arrays_of(model))

    return build


def assemble(places: tuple[Place, ...], disk: dict[str, np.ndarray]) -> np.ndarray:
    """The live tensor, put together from its places in a way of its own: experts stacked, parts concatenated."""
    pieces = [np.swapaxes(disk[place.disk], -1, -2) if place.flipped else disk[place.disk] for place in places]
    if places[0].expert is None:
        (piece,) = pieces
        return piece
    parts = places[0].part[1]
    assert [place.expert for place in places] == [e for e in range(len(places) // parts) for _ in range(parts)]
    assert [place.part for place in places] == [(i, parts) for _ in range(len(places) // parts) for i in range(parts)]
    return np.stack([np.concatenate(pieces[e : e + parts]) for e in range(0, len(pieces), parts)])


def check_all_found(live: dict[str, np.ndarray], disk: dict[str, np.ndarray], places: dict[str, tuple[Place, ...]]):
    assert sorted(place.disk for found in places.values() for place in found) == sorted(disk)
    assert set(places) <= set(live), sorted(set(places) - set(live))[:5]
    for name, found in places.items():
        np.testing.assert_array_equal(assemble(found, disk), live[name], err_msg=name)
    for name in set(live) - set(places):  # tied to a tensor that was written
        assert any(np.shares_memory(live[name], live[other]) for other in places), name


@pytest.mark.parametrize("case", TINY)
def test_every_live_tensor_is_found_on_disk(saved, case):
    tiny = saved(case)
    check_all_found(tiny.live, tiny.disk, tiny.places())
    assert (set(tiny.places()) == set(tiny.disk)) == (case in SAME)


@pytest.mark.parametrize("case", TINY)
def test_live_names_on_disk_pass_unchanged(saved, case):
    tiny = saved(case)
    assert places_of(tiny.config, tiny.live) == {name: (Place(name),) for name in tiny.live}


@pytest.mark.parametrize("class_name", BY_DEFAULT)
def test_names_of_default_models(class_name):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers", minversion="5.0")
    model_class = getattr(transformers, class_name)
    config = model_class.config_class()
    for part in (config, *(value for value in vars(config).values() if hasattr(value, "model_type"))):
        if getattr(part, "num_experts", None):
            part.num_experts = 8
    with torch.device("meta"):
        model = model_class(config)
    live = dict(model.state_dict())
    disk = transformers.core_model_loading.revert_weight_conversion(model, live)
    found = live_places(config.model_type, disk, types_inside(config.to_dict()))
    assert set(found) == set(live)
    assert sorted(place.disk for places in found.values() for place in places) == sorted(disk)
    assert live_places(config.model_type, live, types_inside(config.to_dict())) == {n: (Place(n),) for n in live}


def test_a_name_is_in_one_place_only(saved):
    """No live name is the disk name of another tensor, so looking for both cannot find the wrong one."""
    for case in TINY:
        tiny = saved(case)
        for live, found in tiny.places().items():
            assert live not in tiny.disk or [place.disk for place in found] == [live], (case, live)


@pytest.mark.parametrize("case", TINY)
def test_conv1d_is_told_by_name(saved, case):
    tiny = saved(case)
    for name, module in tiny.model.named_modules():
        told = is_conv1d(tiny.config["model_type"], name, types_inside(tiny.config))
        assert told is (type(module).__name__ == "Conv1D") or (told is None and case == "vision-encoder-decoder"), name


@pytest.mark.parametrize("case", sorted(set(TINY) - IMAGES))
def test_embeddings_are_told_by_name(saved, case):
    model, model_type = saved(case).model, saved(case).config["model_type"]
    names = [name for name, module in model.named_modules() if hasattr(module, "weight")]
    for module, ends in (
        (model.get_input_embeddings(), input_embedding_names(model_type)),
        (model.get_output_embeddings(), output_embedding_names(model_type)),
    ):
        found = ([name for name in names if f".{name}".endswith(f".{end}")] for end in ends)
        first = next((names for names in found if names), [])
        assert all(model.get_submodule(name) is module for name in first), first
        assert first or module is None


@pytest.mark.parametrize("case", ["mixtral", "qwen3_moe", "granitemoe", "gpt_oss", "llama4_text", "llava-mixtral"])
def test_peft_wraps_experts_as_told(saved, case):
    peft = pytest.importorskip("peft")
    tiny = saved(case)
    types = tiny.config["model_type"], types_inside(tiny.config)
    order = parameter_order(*types)
    experts = next(name for name, _ in tiny.model.named_modules() if name.endswith(".experts"))
    assert tuple(name for name, _ in tiny.model.get_submodule(experts).named_parameters()) == order

    model = type(tiny.model)(tiny.model.config)
    config = peft.LoraConfig(r=2, target_modules=[], target_parameters=sorted(f"experts.{name}" for name in order))
    model = peft.get_peft_model(model, config)
    wrapper, wrapped = model.get_submodule("base_model.model." + experts), []
    while type(wrapper).__name__ == "ParamWrapper":
        wrapped.append(wrapper.parameter_name)
        shape = tuple(wrapper.get_param().shape)
        if len(shape) == 3:
            rows, columns = shape[1:]
            if stored_transposed(types[0], wrapper.parameter_name, types[1]):
                rows, columns = columns, rows
            assert tuple(wrapper.lora_A["default"].weight.shape) == (2 * shape[0], columns)
            assert tuple(wrapper.lora_B["default"].weight.shape) == (rows, 2 * shape[0])
        wrapper = wrapper.base_layer
    assert tuple(reversed(wrapped)) == order


def renamed(pattern, replacement):
    return lambda disk: {re.sub(pattern, replacement, name): array for name, array in disk.items()}


INSIDE_VISION_MODEL = renamed(r"\b(vision|image|video)_tower\.", r"\1_tower.vision_model.")


def gamma_and_beta(disk):
    disk = renamed(r"LayerNorm\.weight", "LayerNorm.gamma")(disk)
    return renamed(r"LayerNorm\.bias", "LayerNorm.beta")(disk)


def released_experts(disk):
    return {
        name: np.ascontiguousarray(np.swapaxes(array, 1, 2)) if ".experts." in name else array
        for name, array in disk.items()
    }


@pytest.mark.parametrize(
    ("case", "older"),
    [
        ("llava", INSIDE_VISION_MODEL),
        ("video_llava", INSIDE_VISION_MODEL),
        ("gemma3", INSIDE_VISION_MODEL),
        ("paligemma", INSIDE_VISION_MODEL),
        ("gemma3", renamed(r"^language_model\.model\.", "model.language_model.model.")),
        ("llava", renamed(r"^language_model\.model\.", "language_model.")),
        ("clip_vision_model", renamed("^", "vision_model.")),
        ("clip_text_model", renamed("^", "text_model.")),
        ("qwen3_5_text", renamed(r"^model\.", "model.language_model.")),
        ("bert", gamma_and_beta),
        ("qwen3_vl_moe", released_experts),
    ],
)
def test_older_files_are_read_as_transformers_reads_them(saved, case, older, tmp_path):
    from safetensors.numpy import save_file

    tiny = saved(case)
    disk = older(tiny.disk)
    save_file(disk, tmp_path / "model.safetensors", {"format": "pt"})
    tiny.model.config.save_pretrained(tmp_path)
    live = arrays_of(type(tiny.model).from_pretrained(tmp_path))
    np.testing.assert_equal(live, tiny.live)
    check_all_found(live, disk, places_of(tiny.config, disk))


def expert_names(projections=("gate_proj", "up_proj", "down_proj"), experts=range(2)):
    return [f"model.layers.0.mlp.experts.{e}.{name}.weight" for e in experts for name in projections]


def test_experts_by_hand():
    names = expert_names(experts=(1, 0))
    assert live_places("qwen3_moe", names) == {
        "model.layers.0.mlp.experts.gate_up_proj": (
            Place("model.layers.0.mlp.experts.0.gate_proj.weight", expert=0, part=(0, 2)),
            Place("model.layers.0.mlp.experts.0.up_proj.weight", expert=0, part=(1, 2)),
            Place("model.layers.0.mlp.experts.1.gate_proj.weight", expert=1, part=(0, 2)),
            Place("model.layers.0.mlp.experts.1.up_proj.weight", expert=1, part=(1, 2)),
        ),
        "model.layers.0.mlp.experts.down_proj": (
            Place("model.layers.0.mlp.experts.0.down_proj.weight", expert=0),
            Place("model.layers.0.mlp.experts.1.down_proj.weight", expert=1),
        ),
    }
    assert list(live_places("nemotron_h", ["backbone.layers.1.mixer.experts.0.up_proj.weight"])) == [
        "model.layers.1.mixer.experts.up_proj"
    ]


@pytest.mark.parametrize("model_type", [None, "llama", "unheard_of"])
def test_experts_of_other_architectures_stay_apart(model_type):
    assert live_places(model_type, expert_names()) == {name: (Place(name),) for name in expert_names()}


@pytest.mark.parametrize("lost", range(6))
def test_an_incomplete_stack_stays_apart(lost):
    """Half a stack under its live name would take half an update, and nobody would see it."""
    names = expert_names(experts=range(1, 3)) if lost == 5 else expert_names()
    lacking = [name for name in names if name != expert_names()[lost]]
    places = live_places("qwen3_moe", lacking)
    torn = "down_proj" if lost in (2, 5) else "gate_up_proj"
    assert f"model.layers.0.mlp.experts.{torn}" not in places
    assert sorted(place.disk for found in places.values() for place in found) == sorted(lacking)


def test_a_live_name_belongs_to_the_tensor_that_bears_it():
    names = ["language_model.lm_head.weight", "lm_head.weight", "vision_tower.a.weight"]
    assert live_places("llava", names) == {
        "language_model.lm_head.weight": (Place("language_model.lm_head.weight"),),
        "lm_head.weight": (Place("lm_head.weight"),),
        "model.vision_tower.a.weight": (Place("vision_tower.a.weight"),),
    }


def test_rules_match_whole_components_and_the_start():
    names = ["my_vision_tower.a", "x.vision_tower.a", "vision_towers.a", "language_model.lm_heads.weight"]
    assert [places[0].disk for places in live_places("llava", names).values()] == names
    assert list(live_places("llava", names)) == [*names[:3], "model.language_model.lm_heads.weight"]


GATE, DOWN = (f"model.language_model.layers.0.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj"))


@pytest.mark.parametrize(
    ("gate", "down", "flipped"),
    [
        ((4, 16, 24), (4, 12, 16), (True, True)),
        ((4, 24, 16), (4, 16, 12), (False, False)),
        ((4, 24, 24), (4, 12, 24), (False, True)),  # square: transformers loads it as it lies
        ((4, 24, 24), (4, 24, 12), (False, False)),
    ],
)
def test_shapes_tell_flipped_experts(gate, down, flipped):
    places = live_places("qwen3_vl_moe", {GATE: gate, DOWN: down})
    assert (places[GATE][0].flipped, places[DOWN][0].flipped) == flipped


@pytest.mark.parametrize(
    "names", [[GATE, DOWN], {GATE: (4, 16, 24)}, {GATE: (4, 16, 24), DOWN: (4, 16, 24)}, {GATE: (), DOWN: ()}]
)
def test_flipped_experts_without_fitting_shapes_are_refused(names):
    with pytest.raises(MatchError, match=r"experts\.gate_up_proj"):
        live_places("qwen3_vl_moe", names)


def test_types_inside_ignores_what_is_no_type():
    deep: dict[str, Any] = {"model_type": "innermost"}
    for _ in range(5000):
        deep = {"nested": deep}
    config = {"model_type": "a", "x_config": {"model_type": "b", "y": {"model_type": "c"}}, "z": {"model_type": 3}}
    assert types_inside(config | {"list": [1], "deep": deep}) == ("b", "c", "innermost")


def test_base_prefixes_are_whole_components():
    assert BASE_PREFIXES[0] == ""
    assert all(prefix.endswith(".") and not prefix.startswith(".") for prefix in BASE_PREFIXES[1:])
    assert len(set(BASE_PREFIXES)) == len(BASE_PREFIXES)
