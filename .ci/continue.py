"""Continues a text with a retrofitted folder, evicting; prints the tokens and what the cache holds.

continue.py FOLDER                 with dms
continue.py FOLDER --exported      with transformers alone: nothing of this project may be installed
"""

import importlib.util
import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

folder, exported = sys.argv[1], sys.argv[2:] == ["--exported"]
if exported:
    here = [name for name in ("dms", "dms_kernels", "pydantic", "accelerate", "datasets") if importlib.util.find_spec(name)]
    if here:
        sys.exit(f"continue: {', '.join(here)} is installed here, and a bare environment was wanted")
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
else:
    import dms

    model = dms.load(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
text = Path(__file__).read_text(encoding="utf-8")
inputs = tokenizer(text, return_tensors="pt", return_token_type_ids=False)
output = model.generate(**inputs, max_new_tokens=32, do_sample=False, return_dict_in_generate=True)
print(*output.sequences[0, inputs["input_ids"].shape[1] :].tolist())
# transformers calls it "cache" from 5.24 on.
print(output["cache" if "cache" in output else "past_key_values"].report())
