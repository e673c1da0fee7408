"""How a program uses the API, for the page."""

from collections.abc import Sequence


def usage(address: str, names: Sequence[str], needs_key: bool = False) -> str:
    """Markdown. `names`: the models; the examples use the first one. `needs_key`: the API answers nobody without it."""
    # A browser sends no key, so its link would only give an error.
    models = "`/v1/models`" if needs_key else f"[/v1/models]({address}/v1/models)"
    header = " \\\n    -H 'Authorization: Bearer KEY'" if needs_key else ""
    return f"""### Use this model from a program

This page's server also answers in the form of OpenAI's API. Its base address is `{address}/v1`.
{"It needs the key of this server: put it in the place of KEY." if needs_key else "It needs no key."}

| path | what it answers |
| --- | --- |
| `/v1/chat/completions` | answers, streamed or complete |
| `/v1/completions` | how a text goes on |
| {models} | the models: {", ".join(f"`{name}`" for name in names)} |
| [/health]({address}/health) | how many requests run and wait |

```bash
curl {address}/v1/chat/completions -H 'Content-Type: application/json'{header} \\
    -d '{{"model": "{names[0]}", "messages": [{{"role": "user", "content": "Why is the sky blue?"}}]}}'
```

```python
from openai import OpenAI

client = OpenAI(base_url="{address}/v1", api_key="{"KEY" if needs_key else "none"}")
messages = [{{"role": "user", "content": "Why is the sky blue?"}}]
for piece in client.chat.completions.create(model="{names[0]}", messages=messages, stream=True):
    print(piece.choices[0].delta.content or "", end="", flush=True)
```
"""
