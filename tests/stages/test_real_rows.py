"""Real rows of OASST1 through prepare and tokenize, where this machine has them."""

import pandas as pd
import pytest

from stages.common.schema import PrepareParams
from stages.conversations.messages import read_messages
from stages.prepare import prepare
from stages.tokenize import tokenize
from tests.support.chats import answer_spans
from tests.support.params import section
from tests.support.project import SHARED_OASST1
from tests.support.training import tokenizer_of


@pytest.mark.skipif(not SHARED_OASST1.is_dir(), reason="the real OASST1 rows are not here")
@pytest.mark.parametrize("model, template", [("tiny_llama", "chatml"), ("tiny_phi", "phi2")])
def test_every_answer_of_real_rows_is_supervised_up_to_its_end(model, template, request, tmp_path):
    (tmp_path / "x.jsonl").symlink_to(SHARED_OASST1 / "en_validation_first95trees.jsonl")
    splits, _ = prepare(read_messages(tmp_path), section(PrepareParams, languages=[], system_prompt=""))
    prepared = pd.concat(splits.values(), ignore_index=True)
    tokenizer = tokenizer_of(request.getfixturevalue(model), template)
    frame, counts = tokenize(prepared, tokenizer, 100_000)
    assert counts["conversations"] == 93 and not any(counts["dropped"].values())
    for talk, ids, mask in zip(prepared["messages"], frame["input_ids"], frame["assistant_masks"], strict=True):
        answers = [m["content"] for m in talk if m["role"] == "assistant"]
        supervised = [tokenizer.decode(ids[start:end]).strip() for start, end in answer_spans(mask)]
        assert supervised == [answer + tokenizer.eos_token for answer in answers]
