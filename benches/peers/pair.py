#!/usr/bin/env python3
"""Warpo and PyTorch in turn, A B A B, on the same work; prints the ratio of medians.

usage: pair.py ENV [--size tiny] [--pairs 5] [--warpo target/release/warpo] [--only sft/fast]
ENV is the folder that install.sh made. Each side of a pair is a fresh process that warms up once and
repeats three times; its time is the median. A ratio above 1 says that Warpo is faster."""
import argparse, json, os, shutil, statistics, subprocess, sys, tempfile

HERE = os.path.dirname(os.path.abspath(__file__))
WORK = [("generate", "hf"), ("generate", "fast"), ("sft", "fast"), ("sft", "fast_compile"), ("sft", "hf"), ("ppo", "fast"), ("ppo", "fast_compile")]

p = argparse.ArgumentParser()
p.add_argument("env")
p.add_argument("--size", default="tiny")
p.add_argument("--pairs", type=int, default=5)
p.add_argument("--reps", type=int, default=3)
p.add_argument("--warpo", default=os.path.join(HERE, "../../target/release/warpo"))
p.add_argument("--only", default="")
a = p.parse_args()
python = os.path.join(a.env, "venv/bin/python")
threads = len(os.sched_getaffinity(0))


def call(args):
    done = subprocess.run(args, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(args)}\n{done.stderr}")
    return done


def peer(what, impl):
    out = call([python, f"{HERE}/peer.py", what, "--impl", impl, "--size", a.size, "--reps", str(a.reps), "--threads", str(threads)])
    return statistics.median(json.loads(out.stdout.splitlines()[-1]))


def warpo(what, tmp):
    if what == "generate":
        times = []
        for _ in range(a.reps):
            done = call([a.warpo, "generate", "--model", f"{tmp}/model", "--data", f"{tmp}/prompts.jsonl", "--max-new-tokens", "64"])
            line = [l for l in done.stderr.splitlines() if " tokens in " in l][-1]
            times.append(float(line.split(" tokens in ")[1].split(" s,")[0]))
        return statistics.median(times)
    run = f"{tmp}/run"
    shutil.rmtree(run, ignore_errors=True)
    sets = {"model": f"{tmp}/model", "out": run, "steps": a.reps + 1, "checkpoint_every": 0}
    if what == "sft":
        sets |= {"data": f"{tmp}/texts.jsonl", "batch_size": 16, "learning_rate": 1e-4}
    else:
        sets |= {"data": f"{tmp}/prompts.jsonl", "reward_model": f"{tmp}/judge", "batch_size": 32, "max_new_tokens": 64, "temperature": 1.0,
                 "ppo_epochs": 4, "minibatches": 4, "learning_rate": 1e-5, "beta2": 0.95}
    call([a.warpo, "train", what, *[x for k, v in sets.items() for x in ("--set", f"{k}={v}")]])
    return statistics.median([json.loads(l)["seconds"] for l in open(f"{run}/timing.jsonl")][1:])


with tempfile.TemporaryDirectory() as tmp:
    call([python, f"{HERE}/peer.py", "make", tmp, "--size", a.size])
    print(f"size {a.size}, {threads} threads, {a.pairs} pairs; {call([a.warpo, 'doctor']).stdout.splitlines()[1]}")
    print(f"{'work':<24}{'Warpo s':>10}{'peer s':>10}{'ratio of medians':>18}   ratios of pairs")
    for what, impl in WORK:
        if a.only and a.only != f"{what}/{impl}":
            continue
        ours, theirs = [], []
        for _ in range(a.pairs):
            theirs.append(peer(what, impl))
            ours.append(warpo(what, tmp))
        ratios = sorted(t / o for t, o in zip(theirs, ours))
        o, t = statistics.median(ours), statistics.median(theirs)
        print(f"{what + '/' + impl:<24}{o:>10.3f}{t:>10.3f}{t / o:>18.2f}   {ratios[0]:.2f} to {ratios[-1]:.2f}", flush=True)
