"""What a recipe of `dms generate-data` says."""

from typing import Literal

from pydantic import Field, model_validator

from dms.strict_config import Strict
from dms_train.data.compressed import SUFFIXES
from dms_train.data.prompts import Prompts


class GenerateRecipe(Strict):
    """`dms generate-data`: the dense model's own completions of given prompts, as a file to retrofit it on."""

    model: str
    """A folder, a hub id, or `builtin:tiny`."""
    output: str
    """The JSONL file; a row has prompt, completion, text (both), finish_reason, the counts of tokens, and its number."""
    prompts: Prompts
    num_prompts: int | None = Field(default=None, ge=1)
    """None: each of the source's, once (not with builtin)."""
    samples: int = Field(default=1, ge=1)
    """Completions of each prompt."""
    max_new_tokens: int = Field(ge=1)
    """Most tokens of a completion."""
    temperature: float = Field(default=1.0, ge=0.0)
    """0: the likeliest token each time."""
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    """Draw from the likeliest tokens that make up this share."""
    batch_size: int = Field(default=16, ge=1)
    """Completions at a time."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: as the model is saved, on a CPU fp32."""
    seed: int = 0
    """Of sampling."""
    bad_shards: Literal["refuse", "skip"] = "refuse"
    """A file or row that cannot be read: an error that names it, or left out and counted."""
    overwrite: bool = False
    """Replace what another recipe wrote to `output`. Without it, that is refused."""

    @model_validator(mode="after")
    def _check(self):
        if self.output.lower().endswith(SUFFIXES):
            raise ValueError(f"output '{self.output}' has the name of a compressed file, and rows are written plainly; name a .jsonl file")
        if self.prompts.source == "builtin" and self.num_prompts is None:
            raise ValueError("num_prompts is missing: built-in documents never end")
        if self.temperature == 0 and (self.samples > 1 or self.top_p < 1):
            raise ValueError("samples and top_p have no effect with temperature 0: every completion would be the same; remove them")
        return self
