#!/usr/bin/env python3
"""transformers loads what Warpo saved, and computes the same numbers.

usage: check_export.py WARPO RUN [RUN ...]
RUN is the folder of a finished run: RUN/final is a language model or a reward model, RUN/final-value,
if there is one, a value model. Runs under the Python of install.sh."""
import json, os, subprocess, sys

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", CUDA_VISIBLE_DEVICES="")
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

warpo, *runs = sys.argv[1:]
torch.manual_seed(0)
for folder in [f"{r}/{part}" for r in runs for part in ("final", "final-value")]:
    if not os.path.exists(folder):
        continue
    config = AutoConfig.from_pretrained(folder)
    scalar = "SequenceClassification" in config.architectures[0]
    kind = AutoModelForSequenceClassification if scalar else AutoModelForCausalLM
    # strict: a missing or an unexpected weight is an error
    model, info = kind.from_pretrained(folder, output_loading_info=True, dtype=torch.float64)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
    model.eval()
    rows = [torch.randint(3, config.vocab_size, (n,)).tolist() for n in (1, 2, 7, 33, 64)]
    text = "".join(json.dumps({"input_ids": r}) + "\n" for r in rows)
    flag = "--reward-model" if scalar else "--model"
    out = subprocess.run([warpo, "score", flag, folder], input=text, capture_output=True, text=True, check=True).stdout
    worst = 0.0
    for row, line in zip(rows, map(json.loads, out.splitlines())):
        ids = torch.tensor([row])
        with torch.no_grad():
            if scalar:
                hidden = model.base_model(ids).last_hidden_state[0, -1]
                want, got = [model.score(hidden)[0].item()], [line["reward"]]
            else:
                logp = torch.log_softmax(model(ids).logits[0, :-1], -1)
                want, got = logp.gather(-1, ids[0, 1:, None])[:, 0].tolist(), line["logprobs"]
        assert len(want) == len(got)
        worst = max([worst, *(abs(w - g) for w, g in zip(want, got))])
    print(f"{folder}: {config.architectures[0]}, largest difference to float64 {worst:.1e}")
    assert worst < 2e-4, worst
