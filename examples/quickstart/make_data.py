#!/usr/bin/env python3
"""Cuts the quick-start's data out of pros_cons.jsonl (45,867 review sentences that their authors
labelled as a pro or a con of the product; Bing Liu 2008, CC-BY-4.0).

usage: make_data.py pros_cons.jsonl OUT_DIR

No sentence is in two files: the reward model, its held-out check and the judge see different
reviewers' labels."""
import json, random, sys

source, out = sys.argv[1:]
rows, seen = [], set()
for line in open(source):
    row = json.loads(line)
    text = " ".join(row["text"].split())
    key = text.lower()
    # Short enough for a 260K-parameter model with a 512-token vocabulary, long enough to say something.
    if key not in seen and 20 <= len(text) <= 70 and text.isascii():
        seen.add(key)
        rows.append({"text": text, "label": row["label"]})
random.Random(0).shuffle(rows)
pros = [r for r in rows if r["label"] == 1]
cons = [r for r in rows if r["label"] == 0]


def take(n):
    """n of each label, removed from what is left, mixed."""
    part = [pros.pop() for _ in range(n)] + [cons.pop() for _ in range(n)]
    random.Random(n).shuffle(part)
    return part


def write(name, part):
    with open(f"{out}/{name}", "w") as f:
        for row in part:
            f.write(json.dumps(row) + "\n")


write("heldout.jsonl", take(250))
write("judge.jsonl", take(3000))
write("reviews.jsonl", take(3000))
# Openings of sentences of both kinds, which no other file has.
words = [" ".join(r["text"].split()[:2]) for r in take(600)]
prompts = sorted({w for w in words if 6 <= len(w) <= 16 and w[-1].isalpha()})
random.Random(1).shuffle(prompts)
write("prompts.jsonl", [{"prompt": p} for p in prompts[:512]])
write("heldout_prompts.jsonl", [{"prompt": p} for p in prompts[512:640]])
