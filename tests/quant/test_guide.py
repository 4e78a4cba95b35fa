"""The table in docs/quantisation.md has every codec."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

from peftarray.quant import CODECS

PAGE = Path(__file__).parents[2] / "docs" / "quantisation.md"


def test_the_table_has_every_codec_and_setting():
    rows = dict(re.findall(r"^\| `([a-z0-9-]+)`[^|]*\|([^|]*)\|", PAGE.read_text(encoding="utf-8"), re.MULTILINE))
    assert rows.keys() == CODECS.keys()
    for name, settings in rows.items():
        for item in fields(CODECS[name]):
            if item.name not in ("act_order",) or name == "gptq":
                assert f"{item.name}={item.default!r}".replace("'", '"') in settings, (name, item.name)
