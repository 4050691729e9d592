"""The recipe's section `data`."""

from typing import Literal

from pydantic import Field, model_validator

from dms.strict import Strict


class Data(Strict):
    """Where documents come from. Exactly one source."""

    source: Literal["builtin", "text", "jsonl", "dataset"]
    """builtin: standard-library sources with planted tasks; text / jsonl: local files; dataset: an id for `datasets`."""
    length: int = Field(ge=8)
    """Tokens of each training sequence."""
    path: str | None = None
    """File, folder or glob (text, jsonl), or the dataset's id (dataset)."""
    config: str | None = None
    """The dataset's configuration name."""
    split: str = "train"
    field: str = "text"
    """The column or key that holds a document's text."""
    items: list[int] = Field(default=[20, 40], min_length=2, max_length=2)
    """builtin: how many tasks are planted in a document, from and to."""

    @model_validator(mode="after")
    def _check(self):
        if self.source == "builtin" and self.path is not None:
            raise ValueError("data.path has no effect with source: builtin; remove it or choose source text, jsonl or dataset")
        if self.source != "builtin" and self.path is None:
            raise ValueError(
                f"data.path is missing: source {self.source} needs {'a dataset id' if self.source == 'dataset' else 'a file, folder or glob'}"
            )
        if not 0 <= self.items[0] <= self.items[1]:
            raise ValueError(f"data.items is {self.items}; give [from, to] with 0 <= from <= to")
        return self
