"""Calls a reward function: one JSON line in, one out. What it prints goes to standard error."""

import importlib.util
import json
import os
import sys
import traceback

file, function, form = sys.argv[1:]
answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
questions = os.fdopen(os.dup(0), encoding="utf-8")
os.dup2(2, 1)
os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
sys.argv = [file]
sys.path.insert(0, os.path.dirname(os.path.abspath(file)))


def load():
    spec = importlib.util.spec_from_file_location("warpo_reward", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules["warpo_reward"] = module
    spec.loader.exec_module(module)
    return getattr(module, function)


def score(reward, question):
    if form == "one":
        prompt, completion = question.pop("prompt"), question.pop("completion")
        return {"score": float(reward(prompt, completion, **question))}
    prompts, completions = question["prompts"], question["completions"]
    scores = [float(x) for x in reward(prompts, completions, **question["columns"])]
    if len(scores) != len(prompts):
        raise ValueError(f"{function} returned {len(scores)} scores of {len(prompts)} samples")
    return {"scores": scores}


reward = None
for line in questions:
    try:
        reward = reward or load()
        answer = score(reward, json.loads(line))
    except BaseException:
        answer = {"error": traceback.format_exc().strip()}
    answers.write(json.dumps(answer) + "\n")
    answers.flush()
