"""The only place where a conversation becomes text and tokens: the same ids in tokenize, merge, evaluate and export.

template.py  the Jinja text: compiled, freed of its {% generation %} marks, refused where it depends on the date
skeleton.py  where each content stands in the text that a template writes
tokens.py    the tokenizer: control tokens escaped, the tokens of a span
chat.py      Chat: text, token ids and the span of each answer, all of them checked
probes.py    conversations on which two readers of one template are compared
"""

from stages.common.chat.chat import Chat, Encoded, end_ids
from stages.common.chat.probes import check_same_ids, rendered_by
from stages.common.chat.skeleton import ChatError
from stages.common.chat.template import has_marks, plain_template

__all__ = ["Chat", "ChatError", "Encoded", "check_same_ids", "end_ids", "has_marks", "plain_template", "rendered_by"]
