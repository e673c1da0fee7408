"""Chat templates for tests: TRL's training templates, small ones of our own, and a tokenizer for each.

Run: `python -m tests.support.templates` writes docs/templates.md, which says what becomes of each of TRL's templates.
"""

import re
from functools import cache
from pathlib import Path

import trl
from transformers import PreTrainedTokenizerFast

from stages.common.artifacts import write_text
from stages.common.chat import Chat
from stages.common.errors import StageError
from tests.support.models import byte_level_bpe
from tests.support.project import ROOT

PAGE = ROOT / "docs/templates.md"
TRL = Path(trl.__file__).parent / "chat_templates"
TRL_TEMPLATES = {path.stem: path for path in sorted(TRL.glob("*.jinja"))}
TRAINING = [name for name in TRL_TEMPLATES if name.endswith("_training")]

# What templates write as special tokens.
SPECIAL = re.compile(
    r"<\|[^<>|\s']+\|>|</?s>|<(?:start|end)_of_\w+>|\[/?INST\]|<｜[^<>｜]+｜>|<turn\|>|<\|turn>|<end_of_utterance>"
)

LOOP = "{% for m in messages %}"
TURN = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
# Small templates, each with what it is there for.
SMALL = {
    "an_end_for_each_position": LOOP + "<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}{{ '<|stop|>' if loop.last else '<|im_end|>' }}{% endgeneration %}{% else %}"
    "{{ m.content }}<|im_end|>{% endif %}\n\n{% endfor %}" + PROMPT,
    "marks_on_lines": "{% for m in messages %}\n[{{ m.role }}]\n{% if m.role == 'assistant' %}\n    {% generation %}\n"
    "{{ m.content }}<|stop|>\n    {% endgeneration %}\n{% else %}\n{{ m.content }}\n{% endif %}\n{% endfor %}\n"
    "{% if add_generation_prompt %}\n[assistant]\n{% endif %}\n",
    "marks_with_signs": LOOP + "<|im_start|>{{ m.role }}\n{%- if m.role == 'assistant' %}\n  {%- generation -%}\n"
    "  {{ m.content }}<|im_end|>\n  {%- endgeneration %}\n{% else %}\n{{ m.content }}<|im_end|>\n{%- endif -%}\n"
    "{% endfor %}" + PROMPT,
    "sets_inside_marks": "{% set mine = 'outer' %}" + LOOP + "<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{% set mine = m.content %}{{ mine }}<|im_end|>{% endgeneration %}{{ mine }}{% else %}"
    "{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}" + PROMPT,
    "no_system": "{% if messages[0].role == 'system' %}{{ raise_exception('No system role') }}{% endif %}"
    + LOOP + TURN + PROMPT,
    "alternating": LOOP + "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate') }}{% endif %}" + TURN + PROMPT,
    "asks_for_tools": "{% if tools is not none or documents is not none %}<tools>{% endif %}" + LOOP + TURN + PROMPT,
    "begins_with_bos": "{{ bos_token }}" + LOOP + TURN + PROMPT,
    "strips": LOOP + TURN.replace("m.content", "m.content | trim") + PROMPT,
    "strips_line_breaks": LOOP + TURN.replace("m.content", "m.content.strip('\\n')") + PROMPT,
    "strips_left": LOOP + TURN.replace("m.content", "m.content.lstrip()") + PROMPT,
    "space_before_end": LOOP + TURN.replace("<|im_end|>", " \n<|im_end|>") + PROMPT,
    "system_in_first_question": "{% if messages[0].role == 'system' %}{% set first = messages[0].content + '\n\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set first = '' %}{% endif %}{% for m in messages %}"
    "<|im_start|>{{ m.role }}\n{{ first if loop.first }}{{ m.content | trim }}<|im_end|>\n{% endfor %}" + PROMPT,
    "system_in_last_question": LOOP + "{% if m.role != 'system' %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'user' and messages[0].role == 'system' and (loop.last or loop.revindex == 2) %}"
    "{{ messages[0].content }}\n{% endif %}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}" + PROMPT,
    "looks_at_the_user": LOOP + "<|im_start|>{{ m.role }}\n{% if m.role == 'user' and '?' in m.content %}(question) "
    "{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}" + PROMPT,
    "looks_at_the_user_and_has_words": LOOP + "<|im_start|>{{ m.role }}\n{% if '?' in m.content and m.role == 'user' %}"
    "(question) {% endif %}{% if m.role == 'assistant' %}<note>none</note>\n\n{% endif %}{{ m.content }}<|im_end|>\n"
    "{% endfor %}" + PROMPT,
    "words_before_an_answer": LOOP + "<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}<note>none</note>\n\n"
    "{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}" + PROMPT,
}  # fmt: skip


def tokenizer_for(template: str) -> PreTrainedTokenizerFast:
    """A small byte-level tokenizer that has the special tokens that a template names."""
    special = sorted(set(SPECIAL.findall(template)) - {"<|endoftext|>"})
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_level_bpe(["<|endoftext|>", "<bos>", "<pad>", *special], 330 + len(special)),
        unk_token="<|endoftext|>",
        bos_token="<bos>",
        eos_token="<|endoftext|>",
        pad_token="<pad>",
    )
    tokenizer.chat_template = template
    return tokenizer


def template_of(name: str) -> str:
    return SMALL[name] if name in SMALL else TRL_TEMPLATES[name].read_text(encoding="utf-8")


@cache
def chat_of(name: str) -> Chat:
    """The chat of one of TRL's templates or of ours. Raises StageError when it is refused."""
    return Chat.of(tokenizer_for(template_of(name)), name)


def talk(*turns: str, system: str | None = None) -> list[dict[str, str]]:
    """Messages: the user's and the assistant's by turns, after a system message if there is one."""
    first = [] if system is None else [{"role": "system", "content": system}]
    roles = ("user", "assistant")
    return first + [{"role": roles[i % 2], "content": content} for i, content in enumerate(turns)]


def row(name: str) -> str:
    """A template's row in the table."""
    try:
        chat = chat_of(name)
        ends = ", ".join(f"`{end}`" for end in chat.end_tokens()).replace("|", "\\|")
        system = "yes"
        try:
            chat.encode([talk("Q", "A", "Q", "A", system="S")])
        except StageError:
            system = "refused"
            chat.encode([talk("Q", "A", "Q", "A")])
        notes = [note.removeprefix(name).lstrip(": ") for note in [*chat.notes(), *chat.warnings()]]
        remarks = " ".join(notes).replace("|", "\\|")
        answers = "right, but its prompt differs" if chat.warnings() else "right"
        return f"| {name} | {answers} | {ends} | {system} | {remarks} |"
    except StageError as error:
        reason = str(error).removeprefix(f"{name}: ").replace("|", "\\|")
        return f"| {name} | refused | | | {reason} |"


def page() -> str:
    """docs/templates.md."""
    tables = [[row(name) for name in TRL_TEMPLATES if (name in TRAINING) is training] for training in (True, False)]
    head = "| template | answers | end tokens | system message | remarks |\n| --- | --- | --- | --- | --- |"
    training, originals = ("\n".join([head, *rows]) for rows in tables)
    return f"""# Chat templates

Any chat template works if it writes each content as it is and closes each answer with a special token of the base
model. It needs no `{{% generation %}}` marks. `chat_template: NAME` takes `stages/templates/NAME.jinja`;
`chat_template: model` takes the base model's own, in TRL's form where TRL knows the family.

The tokenize stage finds each answer by its place between the literal texts of the template. It trains on the answer
from the end of its prompt up to the one token that closes it, checks every conversation, and stops at the first that it
cannot align. The same tokens are checked again in the merged and in the exported model. Generation stops at every token
that closes an answer anywhere.

A template is refused, in one line, when it

- writes the date, since every day would give other tokens: put a fixed date into a copy of it;
- takes content only in parts, as for images, or drops a content;
- refuses the roles of a conversation: a system message, or an order;
- closes an answer with no special token.

Text that spells a control token is kept as text: an invisible space is put inside it, in training as in the chat app.

Where the table says that a prompt differs, the template ends a prompt with text that it does not write before the
answers of a conversation. Training is right, but the model is asked with another text. The tokenize stage warns.

## TRL's training templates

`python -m tests.support.templates` makes these tables; a test compares.

{training}

## The models' own templates, as TRL has them

{originals}
"""


if __name__ == "__main__":
    write_text(PAGE, page())
