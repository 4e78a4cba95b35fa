"""Every method on every kind of layer that it takes: the list that all laws run over."""

from __future__ import annotations

from dataclasses import replace

from peftarray import (
    AdaLoraConfig,
    BOFTConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    TrainableTokensConfig,
    VeraConfig,
)
from peftarray.testing import Case

_KINDS = (
    Case(LoraConfig()),
    Case(LoraConfig(), transposed=True),
    Case(LoraConfig(), "embedding", (12, 5)),
    Case(LoraConfig(), "conv", (6, 4, 3)),
    Case(LoraConfig(), "conv", (6, 4, 3, 2)),
    Case(LoraConfig(), "conv", (6, 4, 2, 1, 3)),
)
_VARIANTS = (
    LoraConfig(r=3, lora_alpha=5),
    LoraConfig(r=4, use_rslora=True),
    LoraConfig(r=2, use_dora=True),
    LoraConfig(r=2, kasa_config={"beta": 1e-4}),
    LoraConfig(r=20, lora_alpha=7),
)
CASES = [
    *(
        replace(kind, config=config)
        for kind in _KINDS
        for config in _VARIANTS
        if config.r <= 4 or kind.kind == "linear"
    ),
    Case(LoraConfig(r=2, lora_bias=True)),
    Case(LoraConfig(r=2, use_qalora=True, qalora_group_size=5)),
    Case(LoraConfig(r=2, use_qalora=True, qalora_group_size=2), transposed=True),
    Case(LoraConfig(r=4, use_bdlora={"target_modules_bd_a": ["proj"], "nblocks": 2})),
    Case(LoraConfig(r=4, use_bdlora={"target_modules_bd_b": ["proj"], "nblocks": 2})),
    Case(LoraConfig(r=2, rank_pattern={r"0\.proj": 3}, alpha_pattern={"proj": 11.5})),
    *(
        replace(case, config=config)
        for case in (Case(LoHaConfig()), Case(LoHaConfig(), transposed=True), *_KINDS[3:])
        for config in (LoHaConfig(r=2, alpha=3), LoHaConfig(r=1, use_effective_conv2d=True))
    ),
    Case(LoHaConfig(r=2), shape=(30, 40)),
    Case(LoHaConfig(r=2, use_effective_conv2d=True), "conv", (24, 6, 3, 3)),
    Case(LoHaConfig(rank_pattern={r"0\.proj": 3}, alpha_pattern={"proj": 11.5})),
    *(
        replace(case, config=config)
        for case in (Case(LoKrConfig()), Case(LoKrConfig(), transposed=True), *_KINDS[3:])
        for config in (
            LoKrConfig(r=1, use_effective_conv2d=True),
            LoKrConfig(r=1, alpha=3, init_weights="lycoris"),
            LoKrConfig(r=3, decompose_factor=2),
        )
    ),
    Case(LoKrConfig(r=1, decompose_both=True), shape=(30, 40)),
    Case(LoKrConfig(r=2, decompose_factor=2), shape=(72, 80)),
    Case(LoKrConfig(r=1, use_effective_conv2d=True, decompose_factor=3), "conv", (24, 9, 3, 3)),
    Case(LoKrConfig(r=2), shape=(7, 11)),
    Case(LoKrConfig(rank_pattern={r"0\.proj": 1}, alpha_pattern={"proj": 11.5})),
    *(
        Case(config, kind, shape, transposed)
        for kind, shape, transposed in (
            ("linear", (6, 12), False),
            ("linear", (12, 6), True),
            ("embedding", (12, 6), False),
            ("conv", (6, 4, 3), False),
            ("conv", (6, 4, 3, 2), False),
            ("conv", (6, 4, 2, 1, 3), False),
        )
        for config in (OFTConfig(oft_block_size=3), OFTConfig(r=2, oft_block_size=0, use_cayley_neumann=False))
    ),
    *(Case(OFTConfig(oft_block_size=5, num_cayley_neumann_terms=terms)) for terms in (2, 3, 4, 6)),
    *(
        Case(OFTConfig(oft_block_size=8, block_share=share, coft=True, eps=0.5), shape=(6, 80))
        for share in (True, False)
    ),
    *(Case(OFTConfig(oft_block_size=40, block_share=share), shape=(6, 80)) for share in (True, False)),
    *(
        Case(config, kind, shape, transposed)
        for kind, shape, transposed in (
            ("linear", (6, 12), False),
            ("linear", (12, 6), True),
            ("conv", (6, 4, 3), False),
            ("conv", (6, 4, 3, 2), False),
            ("conv", (6, 4, 2, 1, 3), False),
        )
        for config in (BOFTConfig(boft_block_size=2), BOFTConfig(boft_block_num=2, boft_block_size=0))
    ),
    *(Case(BOFTConfig(boft_n_butterfly_factor=factors), shape=(6, 80)) for factors in (1, 2, 3)),
    *(
        Case(BOFTConfig(boft_block_size=288 >> factors, boft_n_butterfly_factor=factors), shape=(6, 144))
        for factors in (2, 3)
    ),
    *(
        replace(case, config=config)
        for case in (*_KINDS[:2], *_KINDS[3:])
        for config in (IA3Config(), IA3Config(feedforward_modules=["roj"]))
    ),
    Case(IA3Config(feedforward_modules=r"block\.\d\.proj")),
    *(
        replace(case, config=config)
        for case in _KINDS[:2]
        for config in (VeraConfig(r=3), VeraConfig(r=7, save_projection=False, projection_prng_key=5, d_initial=1.0))
    ),
    Case(VeraConfig(r=4, save_projection=False), shape=(10, 6)),
    *(
        replace(case, config=config)
        for case in (*_KINDS[:2], *_KINDS[3:])
        for config in (
            AdaLoraConfig(init_r=3, lora_alpha=5),
            AdaLoraConfig(init_r=4, lora_alpha=0, rank_pattern={"block.0.proj.lora_E": [True, False, True, False]}),
        )
    ),
    Case(TrainableTokensConfig(token_indices=[3, 0, 11]), "embedding", (12, 5)),
]
IDS = [str(case) for case in CASES]
