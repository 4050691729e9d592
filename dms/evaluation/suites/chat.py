"""Documents as chats: what is given is the user's turn, what is decoded the assistant's."""

from dms.evaluation.document import Frame, encode

_USER, _ASSISTANT = "USER-TURN", "ASSISTANT-TURN"


def chat_frame(tokenizer, instruction: str) -> Frame:
    """The tokens of the chat template around a document; `instruction` ends the user's turn.

    Raises:
        ValueError: a tokenizer without a chat template, or a template that is no frame around two turns.
    """
    name = getattr(tokenizer, "name_or_path", "") or "this model"
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(f"the tokenizer of {name} has no chat template; evaluate without chat, or a model with one")
    turns = [{"role": "user", "content": _USER}, {"role": "assistant", "content": _ASSISTANT}]
    try:
        written = tokenizer.apply_chat_template(turns, tokenize=False)
    except Exception as error:
        # A template raises what its author chose, jinja's errors and Python's own.
        raise ValueError(
            f"the chat template of {name} refuses two turns: {type(error).__name__}: {error}; evaluate without chat"
        ) from error
    if written.count(_USER) != 1 or written.count(_ASSISTANT) != 1 or written.index(_USER) > written.index(_ASSISTANT):
        raise ValueError(f"the chat template of {name} does not write each of two turns once and in order; evaluate without chat")
    before, after = written.split(_USER)
    head, middle = encode(tokenizer, [before, f"\n{instruction}{after.split(_ASSISTANT)[0]}"])
    return Frame(head, middle)
