"""The size of published data sets at commits that many have counted: a check that all of the data was read."""

OASST1 = "fdf72ae0827c1cda404aff25b6603abec9e3399b"
# (source, revision) -> (messages, trees)
KNOWN_COUNTS = {
    ("OpenAssistant/oasst1", OASST1): (88_838, 10_364),
    ("OpenAssistant/oasst1/2023-04-12_oasst_ready.trees.jsonl.gz", OASST1): (88_838, 10_364),
    ("OpenAssistant/oasst1/2023-04-12_oasst_all.trees.jsonl.gz", OASST1): (161_443, 66_497),
}


def check_known(source: str, revision: str | None, messages: int, trees: int) -> str | None:
    """A warning when a known data set was read with other counts of messages and trees, or None."""
    known = KNOWN_COUNTS.get((source, revision or ""))
    if known is None or known == (messages, trees):
        return None
    return (
        f"warning: {source} at this commit has {known[0]} messages in {known[1]} trees, but "
        f"{messages} in {trees} were read. Fetch it again."
    )
