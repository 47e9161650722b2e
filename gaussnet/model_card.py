"""The README.md that a saved model brings: how to load it, what it is, and what it was made from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CARD = """---
{{ card_data }}
---

# {{ title }}

A denoiser D(x, sigma) = E[x_0 | x_0 + sigma n = x], made with gaussnet
(Wang and Vastola, [arXiv 2412.09726](https://arxiv.org/abs/2412.09726)).

```python
import gaussnet

model = gaussnet.from_pretrained("{{ repo_id | default("path or id of this repository", true) }}")
denoised = model(x, sigma)  # x of shape {{ shape }}
```

| | |
|---|---|
{% for name, value in facts.items() -%}
| {{ name }} | {{ value }} |
{% endfor %}
{%- for name, text in provenance.items() %}
## {{ name }}

{{ text }}
{% endfor -%}
"""


_SEAL = "<!-- gaussnet: replaced with its model unless it is edited; sha256 of what is above: "


def seal(card: Path) -> None:
    """Appends a checksum to a card, by which `is_edited` knows it."""
    text = card.read_text()
    card.write_text(f"{text.rstrip()}\n\n{_SEAL}{_checksum(text)} -->\n")


def is_edited(card: Path) -> bool:
    """Whether there is a card that is not, byte for byte, one that was sealed: the user's own."""
    if not card.exists():
        return False
    text, found, rest = card.read_text(errors="replace").rpartition(_SEAL)
    return not found or rest.strip() != f"{_checksum(text)} -->"


def _checksum(text: str) -> str:
    return hashlib.sha256(text.rstrip().encode()).hexdigest()


def tell(value: Any) -> str:
    """An entry of a provenance in Markdown: mappings of numbers and words as a table, texts as they are."""
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping) and not any(isinstance(part, Mapping) for part in value.values()):
        rows = [
            f"| {key} | {part if isinstance(part, str) else json.dumps(part)} |"
            for key, part in value.items()
        ]
        return "\n".join(["| | |", "|---|---|", *rows])
    return f"```json\n{json.dumps(value, indent=2)}\n```"
