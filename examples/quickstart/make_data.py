#!/usr/bin/env python3
"""Cuts the quick-start's data out of pros_cons.jsonl (45,867 review sentences that their authors
labelled as a pro or a con of the product; Bing Liu 2008, CC-BY-4.0).

usage: make_data.py pros_cons.jsonl OUT_DIR

The source keeps the sentences of a review together, so the files are cut from distant stretches of
it: the first for SFT and reward model, the last for the judge, the middle for everything held out.
No sentence is in two files, and no sentence of another file begins with a held-out opening."""
import json, random, sys

source, out = sys.argv[1:]
rows, seen = {0: [], 1: []}, set()
for line in open(source):
    row = json.loads(line)
    text = " ".join(row["text"].split())
    key = text.lower()
    # Short enough for a 260K-parameter model with a 512-token vocabulary, long enough to say something.
    if key not in seen and 20 <= len(text) <= 70 and text.isascii():
        seen.add(key)
        rows[row["label"]].append(text)


def write(name, part):
    with open(f"{out}/{name}", "w") as f:
        for row in part:
            f.write(json.dumps(row) + "\n")


def labelled(seed, *parts):
    mixed = [{"text": t, "label": label} for label, part in parts for t in part]
    random.Random(seed).shuffle(mixed)
    return mixed


def opening(text):
    return " ".join(text.split()[:2])


first = [(label, rows[label][:3000]) for label in (1, 0)]
last = [(label, rows[label][-3000:]) for label in (1, 0)]
middle = {label: rows[label][3000:-3000] for label in (1, 0)}
for label in (1, 0):
    random.Random(label).shuffle(middle[label])
write("reviews.jsonl", labelled(1, *first))
write("judge.jsonl", labelled(2, *last))
write("heldout.jsonl", labelled(3, *((label, middle[label][:250]) for label in (1, 0))))

# Openings: the first two words of sentences of both kinds that are in no other file.
pool, used = [], set()
for pair in zip(middle[1][250:], middle[0][250:]):
    for words in map(opening, pair):
        if 6 <= len(words) <= 16 and words[-1].isalpha() and words.lower() not in used:
            used.add(words.lower())
            pool.append(words)
prompts, rest = pool[:512], pool[512:]
trained = {opening(t).lower() for _, part in first + last for t in part}
held_out = [w for w in rest if not any(t.startswith(w.lower()) for t in trained)][:128]
write("prompts.jsonl", [{"prompt": p} for p in prompts])
write("heldout_prompts.jsonl", [{"prompt": p} for p in held_out])
