"""Reads with transformers what a walk saved: config, tokenizer, chat template, names and shapes of weights.

usage: python check.py WARPO RUN [RUN ...]    (needs transformers and jinja2; no torch, so no weight is computed with)
"""
import json
import os
import pathlib
import subprocess
import sys

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")
import transformers
from make_model import HIDDEN, MODEL, weights

DATA = pathlib.Path(__file__).parent / "chats.jsonl"


def tokenized(binary, folder, algorithm):
    args = [binary, "tokenize", "--model", folder, "--data", DATA, "--algorithm", algorithm]
    done = subprocess.run(args, capture_output=True, text=True, check=True)
    return [json.loads(line)["input_ids"] for line in done.stdout.splitlines()]


def same(what, got, want):
    if got != want:
        sys.exit(f"{what}: got {got}, wanted {want}")


def check(binary, folder):
    config, base = (transformers.AutoConfig.from_pretrained(d) for d in (folder, MODEL))
    rates = config.architectures == ["Qwen2ForSequenceClassification"]
    for key in ["model_type", "hidden_size", "num_hidden_layers", "vocab_size", "rope_parameters", "dtype"]:
        same(f"{folder}: {key}", getattr(config, key), getattr(base, key))

    raw = (folder / "model.safetensors").read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    header.pop("__metadata__", None)
    shapes = {name: tuple(of["shape"]) for name, of in header.items()}
    head = {"score.weight": (1, HIDDEN)} if rates else {}
    same(f"{folder}: weights", shapes, dict(weights()) | head)
    same(f"{folder}: dtypes", {of["dtype"] for of in header.values()}, {"BF16"})

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ends = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    generation = json.loads((folder / "generation_config.json").read_text())
    same(f"{folder}: eos_token_id", generation["eos_token_id"], ends)
    chats = [json.loads(line)["messages"] for line in DATA.read_text().splitlines()]
    render = lambda chat, asks: tokenizer.apply_chat_template(chat, add_generation_prompt=asks)["input_ids"]
    same(f"{folder}: chats", tokenized(binary, folder, "sft"), [render(chat, False) for chat in chats])
    prompts = [chat[:-1] for chat in chats]
    same(f"{folder}: prompts", tokenized(binary, folder, "ppo"), [render(chat, True) for chat in prompts])
    print(f"{folder}: {config.architectures[0]}, {len(shapes)} weights, {len(chats)} chats rendered alike")


if __name__ == "__main__":
    for run in sys.argv[2:]:
        check(sys.argv[1], pathlib.Path(run) / "final")
