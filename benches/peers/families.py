"""Trains a step with each golden model, loads what Warpo saved with transformers in float64, and compares.

usage: python families.py WARPO [MODEL ...]    (models: folders of tests/golden; all that have outputs)
"""
import json
import pathlib
import subprocess
import sys
import tempfile

import torch
import transformers

GOLDEN = pathlib.Path(__file__).parents[2] / "tests/golden"
ROWS = [[5, 6, 7, 8, 9, 10, 11], [12, 3, 40, 41, 2, 60, 61, 9], [33, 34]]
MOST = 1e-5
# torch has grouped products of mixtures in 32 bits and fewer only.
EAGER = {"experts_implementation": "eager"}


def warpo(binary, *args):
    done = subprocess.run([binary, *map(str, args), "--device", "cpu"], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, args))}: {done.stderr}")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def load(kind, folder):
    return getattr(transformers, kind).from_pretrained(folder, dtype=torch.float64, **EAGER).eval()


def main(binary, names):
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    names = names or sorted(path.parent.name for path in GOLDEN.glob("*/io.safetensors"))
    wrong = []
    with tempfile.TemporaryDirectory() as work:
        work = pathlib.Path(work)
        texts, pairs = work / "texts.jsonl", work / "pairs.jsonl"
        texts.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in ROWS))
        pair = lambda row: {"prompt_ids": row[:1], "chosen_ids": row[1:], "rejected_ids": row[:0:-1]}
        pairs.write_text("".join(json.dumps(pair(row)) + "\n" for row in ROWS))
        for name in names:
            offs = []
            for algorithm, data, flag in [("sft", texts, "--model"), ("reward", pairs, "--reward-model")]:
                out = work / f"{name}-{algorithm}"
                settings = ["--set", "steps=1", "--set", "learning_rate=0.001"]
                warpo(binary, "train", algorithm, "--model", GOLDEN / name, "--data", data, "--out", out, *settings)
                ours = warpo(binary, "score", flag, out / "final", "--data", texts)
                try:
                    kind = "AutoModelForCausalLM" if algorithm == "sft" else "AutoModelForSequenceClassification"
                    theirs = load(kind, out / "final")
                except ValueError as error:
                    offs.append(f"{algorithm}: transformers has no such class ({str(error)[:60]}...)")
                    continue
                off = 0.0
                for row, line in zip(ROWS, ours):
                    with torch.no_grad():
                        logits = theirs(torch.tensor([row])).logits[0].double()
                    if algorithm == "sft":
                        logp = torch.log_softmax(logits, -1)[:-1].gather(1, torch.tensor(row[1:])[:, None])[:, 0]
                        off = max(off, (logp - torch.tensor(line["logprobs"])).abs().max().item())
                    else:
                        off = max(off, abs(logits[0].item() - line["reward"]))
                offs.append(f"{algorithm} off by {off:.1e}")
                if not off < MOST:
                    wrong.append(name)
            print(f"{name}: {', '.join(offs)}", flush=True)
    if wrong:
        sys.exit(f"more than {MOST}: {wrong}")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
