"""Gives the embedded model random gates, saves it, loads it and generates, evicting; the folder is left for others.

retrofit_and_load.py FOLDER
"""

import sys

import torch

import dms
from dms.hf_compat import output_cache
from dms.io import base_models, checkpoint
from dms.retrofitting import gate_parameters

if "site-packages" not in dms.__file__:
    sys.exit(f"retrofit_and_load: dms comes from {dms.__file__}, not from an installed wheel")
torch.manual_seed(0)
model = base_models.load_base("builtin:tiny", "float32", "cpu")
dms.retrofit(model, dms.DMSConfig(window=8, scale=1.0, offset=0.0))
with torch.no_grad():
    for parameter in gate_parameters(model).values():
        parameter.normal_(0, 0.3)
checkpoint.save(model, sys.argv[1], tokenizer=base_models.load_tokenizer("builtin:tiny"), base_name="builtin:tiny", target_cr=2.0)

model = dms.load(sys.argv[1])
tokens = torch.randint(10, 200, (1, 200))
output = model.generate(tokens, max_new_tokens=24, do_sample=False, return_dict_in_generate=True)
report = output_cache(output).report()
print(report)
if not 1.2 < report.cr < 20:
    sys.exit(f"retrofit_and_load: a cr of {report.cr}; gates of which about half of the outputs say evict were expected to keep about half")
