"""What a person's mistake puts on stderr."""


def one_line(text: str) -> str:
    """The text, which must be one line of texttok's."""
    assert text.startswith("texttok: ") and text.count("\n") == 1, text
    return text
