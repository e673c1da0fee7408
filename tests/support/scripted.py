"""Engines without models for tests of the page, and the figures of a project."""

from tests.support.exported_models import card
from tests.support.serving import Scripted

# What Markdown can show: each part has colours of its own.
MARKDOWN = """## A heading

A **bold** word, `code`, a [link](https://example.org) and a list:

1. one
2. two

> A quotation.

| name | value |
| --- | --- |
| a | 1 |

```python
# A comment
for i in range(3):
    print("text", i, None)
```
"""
LONG = "There are many reasons why a laptop is slow. " * 40
EVALUATION = {
    "held_out": {"conversations": 19, "supervised_tokens": 2569, "of": 38},
    "base": {"perplexity": 16.6824, "token_accuracy": 0.4512},
    "tuned": {"perplexity": 12.2857, "token_accuracy": 0.4811},
    "difference": {"loss": -0.306, "loss_ci95_low": -0.362, "loss_ci95_high": -0.245, "significant": True},
}


def scripted(tuned: str, base: str) -> dict[str, Scripted]:
    """Engines of these names that answer with these texts."""
    return {name: Scripted(text, card(name)) for name, text in (("tuned", tuned), ("base", base))}
