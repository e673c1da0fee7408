"""How a program uses the API, for the page."""

from collections.abc import Sequence


def usage(address: str, names: Sequence[str]) -> str:
    """Markdown. `names`: the models; the examples use the first one."""
    return f"""### Use this model from a program

This page's server also answers in the form of OpenAI's API. Its base address is `{address}/v1`, and it needs no key.

| path | what it answers |
| --- | --- |
| `/v1/chat/completions` | answers, streamed or complete |
| [/v1/models]({address}/v1/models) | the models: {", ".join(f"`{name}`" for name in names)} |
| [/health]({address}/health) | how many requests run and wait |

```bash
curl {address}/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{{"model": "{names[0]}", "messages": [{{"role": "user", "content": "Why is the sky blue?"}}]}}'
```

```python
from openai import OpenAI

client = OpenAI(base_url="{address}/v1", api_key="none")
messages = [{{"role": "user", "content": "Why is the sky blue?"}}]
for piece in client.chat.completions.create(model="{names[0]}", messages=messages, stream=True):
    print(piece.choices[0].delta.content or "", end="", flush=True)
```
"""
