"""Trees to threads, and which answers are trained on in which of them."""

from tests.support.conversations import check_funnel, run, trees_in_both_splits
from tests.support.rows import message


def test_all_threads_train_shared_beginnings_once():
    rows = [
        message("a", role="prompter"),
        message("a.1", "a", rank=0),
        message("a.1.p", "a.1", role="prompter"),
        message("a.1.p.x", "a.1.p", rank=1),
        message("a.1.p.y", "a.1.p", rank=0),
        message("a.1.q", "a.1", role="prompter"),  # a question without answer: no conversation of its own
        message("a.2", "a", rank=1),
    ]
    conversations, funnel = run(rows + trees_in_both_splits(), threads="all")
    chosen = conversations[conversations["message_tree_id"] == "a"]
    assert [(list(i), list(t)) for i, t in zip(chosen["message_ids"], chosen["trained"], strict=True)] == [
        (["a", "a.1", "a.1.p", "a.1.p.y"], [True, True]),
        (["a", "a.1", "a.1.p", "a.1.p.x"], [False, True]),
        (["a", "a.2"], [True]),
    ]
    check_funnel(funnel)


def test_an_answer_of_a_thread_too_short_to_keep_is_trained_in_a_longer_one():
    rows = [
        message("a", role="prompter"),
        message("a.1", "a"),
        message("a.1.q", "a.1", role="prompter", rank=0),
        message("a.1.p", "a.1", role="prompter", rank=1),
        message("a.1.p.x", "a.1.p"),
    ]
    long = [
        row
        for other in trees_in_both_splits()[::2]
        for row in (
            other,
            message(other["message_id"] + ".a", other["message_id"]),
            message(other["message_id"] + ".p", other["message_id"] + ".a", role="prompter"),
            message(other["message_id"] + ".x", other["message_id"] + ".p"),
        )
    ]
    conversations, _ = run(rows + long, threads="all", min_turns=2)
    chosen = conversations[conversations["message_tree_id"] == "a"]
    assert [list(trained) for trained in chosen["trained"]] == [[True, True]]
